"""EfficientVMamba.

Paper: `EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba` - https://arxiv.org/abs/2403.09977
(AAAI 2025)
Weights: https://github.com/TerryPei/EfficientVMamba (Apache-2.0, as its README states)

A light four-stage backbone. Blocks of the first two stages pair VMamba's gated scan with a depthwise convolution, each
weighted by the same channel attention. The scan is atrous: each of its four routes visits a quarter of the map, so that
every position is scanned once instead of four times. The last two stages, whose maps are small, are inverted residuals
with squeeze-and-excitation.

Written for timm from the paper's description of the function. The scan and the inverted residuals are the ones that
vmzoo and timm have, so `checkpoint_filter_fn` maps the published names. The network is channels-last up to the
convolutional stages, and the map's quarters go through one fused operator. The scan's decay, skip and step bias are
exempt from weight decay.
"""

import re
from functools import partial

from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from torch import Tensor, nn

from ..layers import SS2D, ChannelAttention, PatchMerging, PatchStem, VSSBlock
from ._builder import build_model, imagenet_cfg
from ._hierarchical import ChannelsFirstStage, HierarchicalBackbone, Stage, stage_dims

__all__ = ['EfficientVMamba']


class ScanConvMixer(nn.Module):
    """A gated scan and a depthwise convolution side by side, each weighted by the same channel attention.

    Args:
        dim: Channels of input and output.
        scan_kwargs: Options of the scan (`SS2D`).
    """

    def __init__(self, dim: int, device=None, dtype=None, **scan_kwargs):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.scan = SS2D(dim, gate=True, conv_bias=True, **scan_kwargs, **dd)
        self.conv_branch = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd),
            nn.BatchNorm2d(dim, **dd),
            nn.GELU(),
            nn.Conv2d(dim, dim, 1, **dd),
        )
        self.se = ChannelAttention(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        convolved = self.conv_branch(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.se(self.scan(x)) + self.se(convolved)


class EfficientVMamba(HierarchicalBackbone):
    """EfficientVMamba backbone and classifier. Takes images [B, in_chans, H, W] of any size of at least 4x4.

    Args:
        in_chans: Channels of the image.
        num_classes: Outputs of the classifier; 0 for none.
        global_pool: Pooling before the classifier, '' for none.
        output_stride: Accepted for timm's sake: only the network's own stride is possible.
        patch_size: Stride of the stem.
        depths: Blocks of each stage.
        embed_dim: Channels of each stage, or those of the first, which then double from stage to stage.
        num_scan_stages: How many of the first stages scan; the others are convolutional.
        d_state: State size of the scan.
        ssm_ratio: Width of the scan over that of the block.
        dt_rank: Rank of the scan's step projection; 'auto' is a sixteenth of the block's width.
        scan: Order of the scan, one of `vmzoo.layers.scan_names()`.
        mlp_ratio: Hidden width of MLPs after the mixers over that of the block; 0 for none.
        expand_ratio: Hidden width of the inverted residuals over that of the block.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; it grows linearly from zero.

    Raises:
        ValueError: An option outside its choices.
    """

    out_norms = True

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        output_stride: int | None = None,
        patch_size: int = 4,
        depths: tuple[int, ...] = (2, 2, 4, 2),
        embed_dim: int | tuple[int, ...] = 48,
        num_scan_stages: int = 2,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: int | str = 'auto',
        scan: str = 'atrous',
        mlp_ratio: float = 0.0,
        expand_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        embed_dim = stage_dims(embed_dim, depths)
        scan_block = partial(
            VSSBlock,
            mixer_layer=ScanConvMixer,
            mlp_ratio=mlp_ratio,
            d_state=d_state,
            ssm_ratio=ssm_ratio,
            dt_rank=dt_rank,
            scan=scan,
        )
        stages = []
        for i, rates in enumerate(calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)):
            dim = embed_dim[i]
            down = PatchMerging(dim, embed_dim[i + 1], **dd) if i + 1 < len(depths) else None
            if i < num_scan_stages:
                stages.append(Stage([scan_block(dim, drop_path=rate, **dd) for rate in rates], down))
            else:
                stages.append(
                    ChannelsFirstStage([_inverted_residual(dim, expand_ratio, rate, dd) for rate in rates], down)
                )
        stem = PatchStem(in_chans, embed_dim[0], patch_size, **dd)
        super().__init__(
            stem, stages, embed_dim, in_chans, num_classes, global_pool, patch_size, drop_rate, output_stride, **dd
        )
        self.init_weights(needs_reset=False)


def _inverted_residual(dim: int, expand_ratio: float, drop_path: float, dd: dict) -> InvertedResidual:
    squeeze = partial(SqueezeExcite, rd_ratio=0.125)
    return InvertedResidual(dim, dim, exp_ratio=expand_ratio, se_layer=squeeze, drop_path_rate=drop_path, **dd)


_RENAMES = [
    # first VMamba release
    (r'^patch_embed\.proj\.', 'patch_embed.0.'),
    (r'^patch_embed\.norm\.', 'patch_embed.2.'),
    (r'^norm\.', 'classifier.norm.'),
    (r'^head\.', 'classifier.head.'),
    (r'\.ln_1\.', '.norm.'),
    (r'\.self_attention\.', '.op.'),
    # blocks
    (r'(\.blocks\.\d+)\.op\.(?!scan\.|conv_branch\.|se\.)', r'\1.op.scan.'),
    (r'(\.blocks\.\d+)\.(conv_branch|se)\.(?!conv_)', r'\1.op.\2.'),
    # convolutional stages, whose blocks and downsampling are one sequence
    (r'^layers\.(\d+)\.\d+\.(reduction|norm)\.', r'layers.\1.downsample.\2.'),
    (r'\.conv_pw\.0\.', '.conv_pw.'),
    (r'\.conv_pw\.1\.', '.bn1.'),
    (r'\.conv_dw\.0\.', '.conv_dw.'),
    (r'\.conv_dw\.1\.', '.bn2.'),
    (r'\.conv_pw2\.0\.', '.conv_pwl.'),
    (r'\.conv_pw2\.1\.', '.bn3.'),
]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Map published names to ours.

    Args:
        state_dict: Unwrapped weights, with the published names or ours.
        model: The model they are for.
    """
    out = {}
    for name, value in state_dict.items():
        for pattern, new in _RENAMES:
            name = re.sub(pattern, new, name)
        # a permutation comes before the blocks, so they are counted from 1
        name = re.sub(r'^layers\.(\d+)\.(\d+)\.', lambda m: f'layers.{m[1]}.blocks.{int(m[2]) - 1}.', name)
        out[name] = value
    return out


def _cfg(size: str) -> dict:
    repo = f'https://huggingface.co/TerryPei/EfficientVMamba-{size.title()}/resolve/main'
    return imagenet_cfg(
        url=f'{repo}/efficient_vmamba_{size}.ckpt',
        first_conv='patch_embed.0',
        classifier='classifier.head',
        license='apache-2.0',
        origin_url='https://github.com/TerryPei/EfficientVMamba',
        paper_name='EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba',
        paper_ids='arXiv:2403.09977',
    )


default_cfgs = generate_default_cfgs(
    {
        'efficientvmamba_tiny.in1k': _cfg('tiny'),
        'efficientvmamba_small.in1k': _cfg('small'),
        'efficientvmamba_base.in1k': _cfg('base'),
    }
)

_create_efficientvmamba = partial(build_model, EfficientVMamba, pretrained_filter_fn=checkpoint_filter_fn)


@register_model
def efficientvmamba_tiny(pretrained: bool = False, **kwargs) -> EfficientVMamba:
    """EfficientVMamba-T, 6.5 M parameters, 76.5 % top-1 on ImageNet-1k (drop path 0.1)."""
    model_args = {'depths': (2, 2, 4, 2), 'embed_dim': 48}
    return _create_efficientvmamba('efficientvmamba_tiny', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def efficientvmamba_small(pretrained: bool = False, **kwargs) -> EfficientVMamba:
    """EfficientVMamba-S, 11.3 M parameters, 78.7 % top-1 on ImageNet-1k (drop path 0.1)."""
    model_args = {'depths': (2, 2, 4, 2), 'embed_dim': 64}
    return _create_efficientvmamba('efficientvmamba_small', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def efficientvmamba_base(pretrained: bool = False, **kwargs) -> EfficientVMamba:
    """EfficientVMamba-B, 33.7 M parameters, 81.8 % top-1 on ImageNet-1k (drop path 0.1)."""
    model_args = {'depths': (2, 2, 9, 2), 'embed_dim': 96}
    return _create_efficientvmamba('efficientvmamba_base', pretrained=pretrained, **dict(model_args, **kwargs))
