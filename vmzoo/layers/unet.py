"""Decoder parts of U-Nets, on channels-last maps."""

import torch
from torch import Tensor, nn

from .linear import Linear
from .norm import LayerNorm


def spread_channels(x: Tensor, scale: int) -> Tensor:
    """Make a cell of `scale` x `scale` pixels of each: [B, H, W, scale² · C] -> [B, scale · H, scale · W, C].

    Channels are read as (row of the cell, column, channel), unlike those of :func:`torch.nn.functional.pixel_shuffle`.
    """
    x = x.unflatten(3, (scale, scale, -1))  # [B, H, W, row, column, C]
    return x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)


class PatchExpand(nn.Module):
    """Enlarge a map: a linear layer, whose channels become the pixels of a cell, then norm (arXiv 2105.05537).

    Args:
        dim: Channels of the input.
        out_dim: Channels of the output.
        scale: By how much either side grows.
    """

    def __init__(self, dim: int, out_dim: int, scale: int = 2, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.scale = scale
        self.expand = Linear(dim, scale**2 * out_dim, bias=False, **dd)
        self.norm = LayerNorm(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, scale · H, scale · W, C']."""
        return self.norm(spread_channels(self.expand(x), self.scale))


class ConcatFusion(nn.Module):
    """Fuse a decoder's map with the encoder's of the same size: both side by side, mixed by a linear layer.

    Args:
        dim: Channels of either map, and of the output.
    """

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.proj = Linear(2 * dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Two maps [B, H, W, C] -> one."""
        return self.proj(torch.cat((x, skip), dim=-1))
