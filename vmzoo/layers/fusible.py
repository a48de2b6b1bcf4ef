"""Batch norms with the layer before or after them, which are one layer after training: `fuse` folds them into it.

`timm.models.reparameterize_model` calls `fuse` of every module that has it.
"""

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .linear import Linear


class ConvNorm(nn.Sequential):
    """Convolution without bias and batch norm; keeps the size of a map, but for the stride.

    Args:
        in_dim: Channels of the input.
        dim: Channels of the output.
        kernel_size: Of the convolution, odd.
        stride: Of the convolution.
        groups: Of the convolution.
        norm_init: Initial weight of the norm.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        norm_init: float = 1.0,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        conv = nn.Conv2d(in_dim, dim, kernel_size, stride, kernel_size // 2, groups=groups, bias=False, **dd)
        super().__init__(OrderedDict(c=conv, bn=nn.BatchNorm2d(dim, **dd)))
        self.norm_init = norm_init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weight of the norm."""
        nn.init.constant_(self.bn.weight, self.norm_init)

    def fuse(self) -> nn.Module:
        """The same function in evaluation as one layer."""
        return fuse_conv_bn_eval(self.c, self.bn)


class PointwiseNorm(ConvNorm):
    """1x1 convolution and batch norm of a channels-last map."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, in_dim] -> [B, H, W, dim]."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The same function in evaluation as one layer."""
        conv = super().fuse()
        layer = Linear(conv.in_channels, conv.out_channels, device=conv.weight.device, dtype=conv.weight.dtype)
        layer.weight.copy_(conv.weight.flatten(1))
        layer.bias.copy_(conv.bias)
        return layer


class NormLinear(nn.Sequential):
    """Batch norm and linear layer, on vectors.

    Args:
        in_features: Channels of the input.
        out_features: Channels of the output.
    """

    def __init__(self, in_features: int, out_features: int, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__(
            OrderedDict(bn=nn.BatchNorm1d(in_features, **dd), l=nn.Linear(in_features, out_features, **dd))
        )

    @torch.no_grad()
    def fuse(self) -> nn.Linear:
        """The same function in evaluation as one layer."""
        norm, linear = self.bn, self.l
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        layer = copy.deepcopy(linear)
        layer.weight *= scale
        layer.bias += linear.weight @ (norm.bias - norm.running_mean * scale)
        return layer
