"""Convolutions."""

import torch
from torch import Tensor, nn


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution that keeps the size of a channels-last map.

    To PyTorch such a map is a tensor in channels_last format: nothing is copied.

    Args:
        dim: Channels C.
        kernel_size: Side of the kernels, odd.
    """

    def __init__(self, dim: int, kernel_size: int = 3, device=None, dtype=None):
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class MultiScaleConv(nn.ModuleList):
    """Depthwise convolutions of several sizes, each on its part of the channels, whose outputs are interleaved.

    Args:
        dim: Channels C.
        kernel_sizes: Sides of the kernels, odd.

    Raises:
        ValueError: The channels do not divide into as many parts as there are sizes.
    """

    def __init__(self, dim: int, kernel_sizes: tuple[int, ...] = (3, 5, 7, 9), device=None, dtype=None):
        parts = len(kernel_sizes)
        if dim % parts:
            raise ValueError(f'The channels must be a multiple of {parts}, the number of kernel sizes, got {dim}.')
        super().__init__(DepthwiseConv(dim // parts, size, device, dtype) for size in kernel_sizes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        parts = [conv(part) for conv, part in zip(self, x.chunk(len(self), dim=-1))]
        return torch.stack(parts, dim=-1).flatten(-2)


def conv_bn(in_dim: int, dim: int, kernel_size: int, stride: int = 1, groups: int = 1, **dd) -> list[nn.Module]:
    """Layers of a convolution without bias, which keeps a map's size but for the stride, and of its batch norm."""
    padding = kernel_size // 2
    conv = nn.Conv2d(in_dim, dim, kernel_size, stride=stride, padding=padding, groups=groups, bias=False, **dd)
    return [conv, nn.BatchNorm2d(dim, **dd)]
