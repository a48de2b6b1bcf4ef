"""Norms over the channels of channels-last maps and token sequences."""

import torch
from torch import Tensor, nn

from vmzoo_kernels.layer_norm import add_layer_norm, layer_norm, rms_norm


def is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module does what its class does, and nobody looks on."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and not any(hooks)


def _out_dtype(x: Tensor, weight: Tensor, float32: bool) -> torch.dtype:
    if x.is_cuda and x.dtype != torch.float64 and torch.is_autocast_enabled('cuda'):
        return torch.float32 if float32 else torch.get_autocast_dtype('cuda')
    return weight.dtype if weight.dtype.itemsize < x.dtype.itemsize else x.dtype


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension, in one pass on a GPU, whose result has the dtype that the next layer takes.

    Under autocast on a GPU that is the autocast dtype, where `nn.LayerNorm` returns float32 for the next layer to cast.
    Otherwise it is the narrower of the dtypes of input and weights: a half-precision model may hand over float32, as
    its scans and residual streams do, and goes on in half precision.

    Args:
        dim: Channels.
        eps: Added to the variance.
        float32: Return float32 under autocast: for what a residual stream starts with, or a model returns.
    """

    def __init__(self, dim: int, eps: float = 1e-5, float32: bool = False, device=None, dtype=None):
        super().__init__(dim, eps=eps, device=device, dtype=dtype)
        self.float32 = float32

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        return layer_norm(x, self.weight, self.bias, self.eps, _out_dtype(x, self.weight, self.float32))


def add_norm(norm: nn.Module, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """``x + branch`` and its norm: one pass on a GPU where the norm is a :class:`LayerNorm`.

    Args:
        norm: Over the last dimension.
        x: [..., dim], a residual stream.
        branch: [..., dim].

    Returns:
        Both [..., dim].
    """
    if x.is_cuda and is_bare(norm, LayerNorm):
        dtype = _out_dtype(x, norm.weight, norm.float32)
        return add_layer_norm(x, branch, norm.weight, norm.bias, norm.eps, dtype)
    x = x + branch
    return x, norm(x)


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last dimension; arguments and dtypes as in :class:`LayerNorm`."""

    def __init__(self, dim: int, eps: float = 1e-5, float32: bool = False, device=None, dtype=None):
        super().__init__(dim, eps=eps, device=device, dtype=dtype)
        self.float32 = float32

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        return rms_norm(x, self.weight, self.eps, _out_dtype(x, self.weight, self.float32))
