"""Mamba-YOLO: the backbone.

Paper: `Mamba YOLO: A Simple Baseline for Object Detection with State Space Model` - https://arxiv.org/abs/2406.05835
(AAAI 2025)
Code: https://github.com/HZAI-ZJNU/Mamba-YOLO (AGPL-3.0); no weights are published

A YOLOv8-shaped detector whose blocks scan. This is its backbone, with a classifier for pretraining: a convolutional
stem, four stages of ODSS blocks (a gated scan of what a local convolution prepared, and a gated MLP), vision clue
merging between them, and pyramid pooling as the last block. Neck and head, and so the detector, are in `vmzoo.mm`.

Written for timm from the paper's description of the function. What differs from the published code:
* maps are channels-last, and pointwise convolutions on them linear layers;
* vision clue merging is the strided convolution that it equals, and odd maps are filled up with zeros;
* the scan's decay, skip and step bias are exempt from weight decay.
"""

import re
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import ConvBnAct, NormPoolHead, ODSSBlock
from ._builder import build_model, imagenet_cfg
from ._hierarchical import HierarchicalBackbone, Stage, stage_dims

__all__ = ['MambaYOLO']


class SimpleStem(nn.Sequential):
    """Two overlapping convolutions that together reduce an image four times: [B, C_in, H, W] -> [B, H', W', C].

    Args:
        in_chans: Channels of the image.
        dim: Channels of the output.
    """

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__(
            ConvBnAct(in_chans, dim // 2, 3, stride=2, act_layer=nn.GELU, **dd),
            ConvBnAct(dim // 2, dim, 3, stride=2, **dd),
        )

    def min_input(self, size: int) -> int:
        """Smallest image side that gives `size` output positions."""
        return 4 * size - 3

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).permute(0, 2, 3, 1)


class VisionClueMerge(nn.Module):
    """Halve a map: the four pixels of each 2x2 cell side by side, mixed by a linear layer with norm and activation.

    Args:
        dim: Channels of the input.
        out_dim: Channels of the output.
    """

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        super().__init__()
        self.pw_linear = ConvBnAct(dim, out_dim, 2, stride=2, bias=True, device=device, dtype=dtype)

    def min_input(self, size: int) -> int:
        """Smallest side that gives `size` output positions."""
        return 2 * size - 1

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H', W', C'], sides rounded up."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        return self.pw_linear(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SPPF(nn.Module):
    """Spatial pyramid pooling: maxima over growing windows, beside the map itself.

    Args:
        dim: Channels of input and output.
        kernel_size: Of the pooling, applied once, twice and three times.
    """

    def __init__(self, dim: int, kernel_size: int = 5, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.cv1 = ConvBnAct(dim, dim // 2, **dd)
        self.cv2 = ConvBnAct(dim // 2 * 4, dim, **dd)
        self.pool = nn.MaxPool2d(kernel_size, stride=1, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        maps = [self.cv1(x.permute(0, 3, 1, 2))]
        for _ in range(3):
            maps.append(self.pool(maps[-1]))
        return self.cv2(torch.cat(maps, dim=1)).permute(0, 2, 3, 1)


class MambaYOLO(HierarchicalBackbone):
    """Backbone of Mamba-YOLO and a classifier. Takes images [B, in_chans, H, W] of any size.

    Features of the stages are P2 to P5 of the detector, at strides 4, 8, 16 and 32; the last is pooled by `SPPF`.

    Args:
        in_chans: Channels of the image.
        num_classes: Outputs of the classifier; 0 for none.
        global_pool: Pooling before the classifier, '' for none.
        output_stride: Accepted for timm's sake: only the network's own stride is possible.
        depths: Blocks of each stage.
        embed_dim: Channels of each stage, or those of the first, which then double from stage to stage.
        d_state: State size of the scan.
        ssm_ratio: Width of the scan over that of the block.
        mlp_ratio: Hidden width of the gated MLPs over that of the block, of which a third is taken off.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; it grows linearly from zero.

    Raises:
        ValueError: `embed_dim` and `depths` differ in their number of stages, or another `output_stride`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        output_stride: int | None = None,
        depths: tuple[int, ...] = (1, 1, 3, 1),
        embed_dim: int | tuple[int, ...] = 32,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        dims = stage_dims(embed_dim, depths)
        options = {'d_state': d_state, 'ssm_ratio': ssm_ratio, 'mlp_ratio': mlp_ratio, **dd}
        stages = []
        for i, rates in enumerate(calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)):
            dim = dims[i]
            blocks = [ODSSBlock(dim, ConvBnAct(dim, dim, bias=True, **dd), drop_path=rate, **options) for rate in rates]
            if i + 1 < len(depths):
                stages.append(Stage(blocks, VisionClueMerge(dim, dims[i + 1], **dd)))
            else:
                stages.append(Stage([*blocks, SPPF(dim, **dd)]))
        super().__init__(
            SimpleStem(in_chans, dims[0], **dd),
            stages,
            dims,
            in_chans,
            num_classes,
            output_stride=output_stride,
            classifier=NormPoolHead(dims[-1], num_classes, global_pool, drop_rate, nn.Identity(), **dd),
        )

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise every parameter as its constructor does, which is the published way; nothing else to do."""
        if needs_reset:
            self.apply(lambda module: module.reset_parameters() if hasattr(module, 'reset_parameters') else None)


_BLOCK_RENAMES = [
    (r'^(?:proj_conv|in_proj)\.0\.', 'proj.conv.'),
    (r'^(?:proj_conv|in_proj)\.1\.', 'proj.bn.'),
    (r'^(norm2?)\.norm\.', r'\1.'),
    (r'^op\.', 'ss2d.0.'),
]
_STEM_RENAMES = {'conv.0.': '0.conv.', 'conv.1.': '0.bn.', 'conv.3.': '1.conv.', 'conv.4.': '1.bn.'}
_POINTWISE = re.compile(r'(lsblock\.fc[23]|mlp\.fc[12]|ss2d\.\d+\.(in|out)_proj)\.weight$')


def convert_block(name: str, value: Tensor) -> tuple[str, Tensor]:
    """Name and value of a published block's parameter in an `ODSSBlock`."""
    for pattern, new in _BLOCK_RENAMES:
        name = re.sub(pattern, new, name)
    return name, value.flatten(1) if _POINTWISE.search(name) else value


def _convert_merge(name: str, value: Tensor) -> tuple[str, Tensor]:
    """The same of a `VisionClueMerge`: pixels of a cell come down its columns, and each with all channels."""
    name = name.replace('pw_linear.0.', 'pw_linear.conv.').replace('pw_linear.1.', 'pw_linear.bn.')
    if value.ndim == 4:
        value = value.flatten(1).unflatten(1, (2, 2, -1)).permute(0, 3, 2, 1)  # column, row, C -> C, row, column
    return name, value


def split_layers(state_dict: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Published weights by the number of their layer; none of them if these are not the published names."""
    layers: dict[int, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        if match := re.match(r'(?:model\.)?(\d+)\.(.+)', key):
            layers.setdefault(int(match[1]), {})[match[2]] = value
    return layers


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Map the backbone of a published detector to ours.

    Args:
        state_dict: Unwrapped weights of the detector (neck and head are left out), or of a model of ours.
        model: The model they are for.
    """
    layers = split_layers(state_dict)
    if not layers:
        return state_dict
    out = {}
    for key, value in layers.get(0, {}).items():
        prefix = re.match(r'conv\.\d\.', key)[0]
        out[f'patch_embed.{_STEM_RENAMES[prefix]}{key.removeprefix(prefix)}'] = value
    for stage in range(4):
        for key, value in layers.get(2 * stage + 1, {}).items():
            block, name = re.match(r'(?:(\d+)\.)?(.+)', key).groups()
            name, value = convert_block(name, value)
            out[f'layers.{stage}.blocks.{block or 0}.{name}'] = value
        for key, value in layers.get(2 * stage + 2, {}).items() if stage < 3 else ():
            name, value = _convert_merge(key, value)
            out[f'layers.{stage}.downsample.{name}'] = value
    blocks = 1 + max((int(match[1]) for key in layers.get(7, {}) if (match := re.match(r'(\d+)\.', key))), default=0)
    out.update((f'layers.3.blocks.{blocks}.{key}', value) for key, value in layers.get(8, {}).items())
    return out


_cfg = partial(
    imagenet_cfg,
    input_size=(3, 640, 640),
    pool_size=(20, 20),
    crop_pct=1.0,
    interpolation='bilinear',
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    first_conv='patch_embed.0.conv',
    classifier='classifier.head',
    license='apache-2.0',
    origin_url='https://github.com/HZAI-ZJNU/Mamba-YOLO',
    paper_name='Mamba YOLO: A Simple Baseline for Object Detection with State Space Model',
    paper_ids='arXiv:2406.05835',
)


default_cfgs = generate_default_cfgs(
    {
        'mambayolo_tiny.untrained': _cfg(),
        'mambayolo_base.untrained': _cfg(),
        'mambayolo_large.untrained': _cfg(),
    }
)

_create_mambayolo = partial(build_model, MambaYOLO, pretrained_filter_fn=checkpoint_filter_fn)


@register_model
def mambayolo_tiny(pretrained: bool = False, **kwargs) -> MambaYOLO:
    """Backbone of Mamba-YOLO-T; the detector has 6.1 M parameters and 44.5 AP on COCO."""
    model_args = {'depths': (1, 1, 3, 1), 'embed_dim': (32, 64, 128, 256)}
    return _create_mambayolo('mambayolo_tiny', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def mambayolo_base(pretrained: bool = False, **kwargs) -> MambaYOLO:
    """Backbone of Mamba-YOLO-B; the detector has 21.8 M parameters and 49.1 AP on COCO."""
    model_args = {'depths': (1, 1, 3, 1), 'embed_dim': (64, 128, 256, 512)}
    return _create_mambayolo('mambayolo_base', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def mambayolo_large(pretrained: bool = False, **kwargs) -> MambaYOLO:
    """Backbone of Mamba-YOLO-L; the detector has 57.6 M parameters and 52.1 AP on COCO."""
    model_args = {'depths': (2, 2, 6, 2), 'embed_dim': (96, 192, 384, 576)}
    return _create_mambayolo('mambayolo_large', pretrained=pretrained, **dict(model_args, **kwargs))
