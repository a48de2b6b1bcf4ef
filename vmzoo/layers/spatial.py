"""Convolutions and tokens for pictures [B, C, H, W] and volumes [B, C, D, H, W] alike."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

_CONVS = {2: nn.Conv2d, 3: nn.Conv3d}
_LINEAR_MODES = {2: 'bilinear', 3: 'trilinear'}


def conv_nd(ndim: int, in_dim: int, out_dim: int, kernel_size: int | tuple[int, ...] = 1, **kwargs: Any) -> nn.Module:
    """Convolution over `ndim` axes that pads by half its kernel; extra arguments are `nn.Conv2d`'s.

    Raises:
        ValueError: `ndim` is neither 2 nor 3.
    """
    if ndim not in _CONVS:
        raise ValueError(f'ndim must be 2 (pictures) or 3 (volumes), got {ndim}.')
    kernel = (kernel_size,) * ndim if isinstance(kernel_size, int) else tuple(kernel_size)
    return _CONVS[ndim](in_dim, out_dim, kernel, padding=tuple(side // 2 for side in kernel), **kwargs)


def resize_linear(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Map [B, C, *old] -> [B, C, *size], bilinear or trilinear with half-pixel centres."""
    return F.interpolate(x, size=size, mode=_LINEAR_MODES[len(size)], align_corners=False)


def to_tokens(x: Tensor) -> Tensor:
    """Map [B, C, *size] -> tokens [B, L, C] in raster order, the last axis fastest: a view."""
    return x.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, size: tuple[int, ...]) -> Tensor:
    """Tokens [B, L, C] in raster order -> map [B, C, *size]."""
    return tokens.transpose(1, 2).unflatten(2, size)
