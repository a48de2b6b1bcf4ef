"""LightM-UNet

Paper: `LightM-UNet: Mamba Assists in Lightweight UNet for Medical Image Segmentation` - https://arxiv.org/abs/2403.05246
Code: https://github.com/MrBlankness/LightM-UNet (Apache-2.0); no weights are published

A U-Net for pictures and for volumes whose encoder mixes tokens with Mamba, one scan a layer in raster order, and whose
decoder has one light convolutional block a stage; skips are added. One LayerNorm serves both before and after the
mixer.

Written from the paper and a description of the published code's function. What differs:
* maps of odd sides are enlarged to the size of the encoder's map, where the published decoder doubles them, so that
  images of any size from `2^(stages - 1)` on are taken;
* stochastic depth, and the scan's decay, skip and step bias are exempt from weight decay.
"""

import logging
import re
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import LayerNorm, Linear, MambaMixer, conv_nd, resize_linear, to_map, to_tokens
from ._builder import build_model
from ._conv_unet import ConvUNet, segmentation_cfg
from ._hierarchical import stage_dims

__all__ = ['LightMUNet']

_logger = logging.getLogger(__name__)

_GROUPS = 8
_DROPOUTS = {2: nn.Dropout2d, 3: nn.Dropout3d}
_POOLS = {2: nn.MaxPool2d, 3: nn.MaxPool3d}


def separable_conv(ndim: int, in_dim: int, out_dim: int, **dd: Any) -> nn.Sequential:
    """Depthwise 3x3(x3) convolution, then a pointwise one, without biases."""
    depthwise = conv_nd(ndim, in_dim, in_dim, 3, groups=in_dim, bias=False, **dd)
    return nn.Sequential(depthwise, conv_nd(ndim, in_dim, out_dim, bias=False, **dd))


class MambaLayer(nn.Module):
    """Mamba over the positions of a map in raster order, with a scaled skip; norm before and after, then linear.

    Args:
        dim: Channels of the input.
        out_dim: Channels of the output.
        mixer_args: Arguments of :class:`..layers.mamba.MambaMixer`.
    """

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None, **mixer_args: Any):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.skip_scale = nn.Parameter(torch.empty(1, **dd))
        self.norm = LayerNorm(dim, **dd)
        self.mamba = MambaMixer(dim, scan='forward', **mixer_args, **dd)
        self.proj = Linear(dim, out_dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the skip's scale; the layers initialise themselves."""
        nn.init.ones_(self.skip_scale)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, *size] -> [B, C', *size]."""
        tokens = to_tokens(x)  # [B, L, C]
        mixed = self.mamba(self.norm(tokens)) + self.skip_scale * tokens
        return to_map(self.proj(self.norm(mixed)), x.shape[2:])


class MambaBlock(nn.Module):
    """Residual block of two :class:`MambaLayer`, each after a norm and a ReLU.

    Args:
        dim: Channels, a multiple of 8.
        drop_path: Stochastic depth rate.
        mixer_args: Arguments of :class:`..layers.mamba.MambaMixer`.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, device=None, dtype=None, **mixer_args: Any):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm1 = nn.GroupNorm(_GROUPS, dim, **dd)
        self.norm2 = nn.GroupNorm(_GROUPS, dim, **dd)
        self.conv1 = MambaLayer(dim, dim, **mixer_args, **dd)  # published names
        self.conv2 = MambaLayer(dim, dim, **mixer_args, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, *size] -> [B, C, *size]."""
        y = self.conv1(self.norm1(x).relu())
        return x + self.drop_path(self.conv2(self.norm2(y).relu()))


class LightBlock(nn.Module):
    """Decoder block: a separable convolution with a scaled skip, between norms and ReLUs.

    Args:
        ndim: Axes of a map.
        dim: Channels, a multiple of 8.
    """

    def __init__(self, ndim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.skip_scale = nn.Parameter(torch.empty(1, **dd))
        self.norm1 = nn.GroupNorm(_GROUPS, dim, **dd)
        self.norm2 = nn.GroupNorm(_GROUPS, dim, **dd)
        self.conv = separable_conv(ndim, dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the skip's scale; the layers initialise themselves."""
        nn.init.ones_(self.skip_scale)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, *size] -> [B, C, *size]."""
        return self.norm2(self.conv(self.norm1(x).relu()) + self.skip_scale * x).relu()


class DecoderStage(nn.Module):
    """Enlarge a map to the encoder's, add that, and apply light blocks.

    Args:
        ndim: Axes of a map.
        dim: Channels of the input.
        out_dim: Channels of the encoder's map, and of the output.
        depth: Number of blocks.
    """

    def __init__(self, ndim: int, dim: int, out_dim: int, depth: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.up = conv_nd(ndim, dim, out_dim, bias=False, **dd)
        self.blocks = nn.Sequential(*(LightBlock(ndim, out_dim, **dd) for _ in range(depth)))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """[B, C, *size] and the encoder's [B, C', *larger] -> [B, C', *larger]."""
        return self.blocks(resize_linear(self.up(x), skip.shape[2:]) + skip)


class LightMUNet(ConvUNet):
    """LightM-UNet. Takes pictures or volumes of any size that leaves the last stage a map.

    Args:
        ndim: 2 for pictures [B, in_chans, H, W], 3 for volumes [B, in_chans, D, H, W].
        in_chans: Channels of the image.
        num_classes: Channels of the logits; 0 for features.
        depths: Blocks of each encoder stage.
        decoder_depths: Blocks of each decoder stage, from the deepest on; one each if None.
        embed_dim: Channels of each stage, or those of the first, which then double from stage to stage; multiples of 8.
        d_state: State size of the scan.
        d_conv: Kernel of the mixer's causal convolution.
        expand: Width of the scan over that of the map.
        drop_rate: Dropout of whole channels after the stem.
        drop_path_rate: Stochastic depth rate of the last encoder block; it grows linearly from zero.

    Raises:
        ValueError: Depths and widths that do not fit together.
    """

    def __init__(
        self,
        ndim: int = 2,
        in_chans: int = 3,
        num_classes: int = 2,
        depths: tuple[int, ...] = (1, 2, 2, 4),
        decoder_depths: tuple[int, ...] | None = None,
        embed_dim: int | tuple[int, ...] = 32,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        dims = stage_dims(embed_dim, depths)
        decoder_depths = (1,) * (len(dims) - 1) if decoder_depths is None else tuple(decoder_depths)
        if len(decoder_depths) != len(dims) - 1:
            raise ValueError(f'{len(dims)} depths need {len(dims) - 1} decoder_depths, got {decoder_depths}.')
        if any(dim % _GROUPS for dim in dims):
            raise ValueError(f'The norms have {_GROUPS} groups: embed_dim must be multiples of that, got {dims}.')
        mixer_args = {'d_state': d_state, 'd_conv': d_conv, 'expand': expand, **dd}
        stem = separable_conv(ndim, in_chans, dims[0], **dd)
        stem.append(_DROPOUTS[ndim](drop_rate))
        stages = []
        for i, rates in enumerate(calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)):
            down = nn.Identity()
            if i > 0:
                down = nn.Sequential(MambaLayer(dims[i - 1], dims[i], **mixer_args), _POOLS[ndim](2))
            blocks = (MambaBlock(dims[i], drop_path=rate, **mixer_args) for rate in rates)
            stages.append(nn.Sequential(down, *blocks))
        # its convolution is depthwise and 1x1: a scale and a bias for every channel
        conv = conv_nd(ndim, dims[0], dims[0], groups=dims[0], **dd)
        final = nn.Sequential(nn.GroupNorm(_GROUPS, dims[0], **dd), nn.ReLU(), conv)
        up = zip(dims[:0:-1], dims[-2::-1], decoder_depths, strict=True)
        super().__init__(
            ndim,
            stem,
            stages,
            dims,
            tuple(2**i for i in range(len(dims))),
            [DecoderStage(ndim, dim, out_dim, depth, **dd) for dim, out_dim, depth in up],
            final,
            in_chans,
            num_classes,
            **dd,
        )

    def _check_size(self, size: tuple[int, ...]) -> None:
        smallest = 2 ** (len(self.stages) - 1)
        if min(size) < smallest:
            raise ValueError(
                f'The image is {"x".join(map(str, size))}, but this model halves it {len(self.stages) - 1} times and '
                f'needs at least {smallest} pixels a side: resize or pad it.'
            )


_RENAMES = (
    (r'^convInit\.', 'stem.'),
    (r'^down_layers\.', 'stages.'),
    (r'^up_samples\.(\d+)\.0\.', r'decoder.\1.up.'),
    (r'^up_layers\.(\d+)\.', r'decoder.\1.blocks.'),
    (r'^conv_final\.2\.1\.', 'head.'),
    (r'^conv_final\.2\.0\.', 'final.2.'),
    (r'^conv_final\.', 'final.'),
    (r'\.conv\.(weight|bias)$', r'.\1'),
)


def _our_key(key: str) -> str:
    for pattern, new in _RENAMES:
        key = re.sub(pattern, new, key)
    return key


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: LightMUNet) -> dict[str, Tensor]:
    """Fit a published checkpoint (nnU-Net's), or one of ours, to `model`.

    A stem for another number of channels stays as initialised in the model, with a warning: its depthwise convolution
    has a kernel a channel, which no rule carries over to other channels.
    """
    state_dict = {_our_key(key): value for key, value in state_dict.items()}
    target, stem = model.state_dict(), 'stem.0.weight'
    if stem in state_dict and state_dict[stem].shape[0] != target[stem].shape[0]:
        _logger.warning(
            'Checkpoint and model differ in the stem: %d → %d channels, as initialised in the model',
            state_dict[stem].shape[0],
            target[stem].shape[0],
        )
        state_dict |= {key: value for key, value in target.items() if key.startswith('stem.')}
    return state_dict


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return segmentation_cfg(
        **kwargs,
        first_conv=('stem.0', 'stem.1'),
        license='apache-2.0',
        origin_url='https://github.com/MrBlankness/LightM-UNet',
        paper_name='LightM-UNet: Mamba Assists in Lightweight UNet for Medical Image Segmentation',
        paper_ids='arXiv:2403.05246',
    )


default_cfgs = generate_default_cfgs(
    {
        'lightmunet_2d.untrained': _cfg(input_size=(3, 512, 512), num_classes=2),
        'lightmunet_3d.untrained': _cfg(input_size=(1, 128, 128, 128), num_classes=3),
        'lightmunet_3d_f8.untrained': _cfg(input_size=(1, 128, 128, 128), num_classes=2),
    }
)

_create_lightmunet = partial(build_model, LightMUNet, pretrained_filter_fn=checkpoint_filter_fn)


@register_model
def lightmunet_2d(pretrained: bool = False, **kwargs: Any) -> LightMUNet:
    """LightM-UNet for pictures, 5.0 M parameters; lungs and background in X-rays by default."""
    model_args = {'ndim': 2, 'embed_dim': 32}
    return _create_lightmunet('lightmunet_2d', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def lightmunet_3d(pretrained: bool = False, **kwargs: Any) -> LightMUNet:
    """LightM-UNet for volumes, 5.0 M parameters; liver, tumour and background in CT by default."""
    model_args = {'ndim': 3, 'embed_dim': 32}
    return _create_lightmunet('lightmunet_3d', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def lightmunet_3d_f8(pretrained: bool = False, **kwargs: Any) -> LightMUNet:
    """LightM-UNet for volumes with a quarter of the channels, 0.4 M parameters: the published code's defaults."""
    model_args = {'ndim': 3, 'embed_dim': 8}
    return _create_lightmunet('lightmunet_3d_f8', pretrained=pretrained, **dict(model_args, **kwargs))
