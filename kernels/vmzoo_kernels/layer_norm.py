"""Layer norm and RMS norm over channels, whose result may have another dtype than their input.

On CUDA tensors Triton kernels do it in one pass; everywhere else, and wherever something looks into the computation
(compilers, transforms, higher derivatives), it is torch's own norm and a cast.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .backends import resolve_backend, why_not_triton
from .common import runs_plainly

_MAX_CHANNELS = 8192  # a row stays in the registers of one program
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``F.layer_norm`` over the last dimension, computed in at least float32.

    Args:
        x: [..., C], floating.
        weight: [C], of any floating dtype.
        bias: [C], of any floating dtype.
        eps: Added to the variance.
        out_dtype: dtype of the result; default: that of ``x``, also under autocast.

    Returns:
        [..., C].

    Raises:
        RuntimeError: A weight or bias that is not [C].
    """
    return _norm(x, weight, bias, eps, out_dtype or x.dtype, True)


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-5, out_dtype: torch.dtype | None = None
) -> Tensor:
    """``F.rms_norm`` over the last dimension; arguments as in :func:`layer_norm`."""
    return _norm(x, weight, None, eps, out_dtype or x.dtype, False)


def _norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype, center: bool
) -> Tensor:
    norm = _fused_norm if _can_fuse(x, weight, bias, out_dtype) else _torch_norm
    return norm(x, weight, bias, eps, out_dtype, center)


@functools.cache
def _device_has_triton(device: torch.device) -> bool:
    return device.type == 'cuda' and resolve_backend('auto', device) != 'torch' and why_not_triton(device) is None


def _can_fuse(x: Tensor, weight: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype) -> bool:
    device = x.device
    if not runs_plainly(x, weight, bias) or not _device_has_triton(device):
        return False
    shape = x.shape[-1:]
    for v in (weight, bias):
        if v is not None and not (v.dtype in _DTYPES and v.device == device and v.shape == shape):
            return False
    return (
        x.dtype in _DTYPES
        and out_dtype in _DTYPES
        and x.numel() > 0
        and x.ndim > 0
        and shape.numel() <= _MAX_CHANNELS
        and forward_ad._current_level < 0
    )


def _torch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype, center: bool
) -> Tensor:
    # Torch takes weights as wide as the input; on a CPU wider ones too.
    dtype = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    if x.device.type != 'cpu':
        x = x.to(dtype)
    weight, bias = (None if v is None else v.to(dtype) for v in (weight, bias))
    if center:
        y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    else:
        y = F.rms_norm(x.to(dtype), x.shape[-1:], weight, eps)
    return y.to(out_dtype)


def _fused_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype, center: bool
) -> Tensor:
    from . import triton_layer_norm

    x = x.contiguous()
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (x, weight, bias)):
        return _FusedNorm.apply(x, weight, bias, eps, out_dtype, center)
    return triton_layer_norm.forward(x, weight, bias, eps, out_dtype, center, save_stats=False)[0]


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, out_dtype, center):
        from . import triton_layer_norm

        y, stats = triton_layer_norm.forward(x, weight, bias, eps, out_dtype, center, save_stats=True)
        ctx.save_for_backward(x, weight, bias, stats)
        ctx.options = (eps, out_dtype, center)
        return y

    @staticmethod
    def backward(ctx, dy):
        from . import triton_layer_norm

        x, weight, bias, stats = ctx.saved_tensors
        eps, out_dtype, center = ctx.options
        needed = ctx.needs_input_grad[:3]
        nothing = (None,) * 3
        if torch.is_grad_enabled():  # create_graph: these gradients are to have gradients
            y = _torch_norm(x, weight, bias, eps, out_dtype, center)
            wanted = [v for v, need in zip((x, weight, bias), needed) if need]
            grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
            return *(next(grads) if need else None for need in needed), *nothing
        dtypes = (v.dtype if need else None for v, need in zip((weight, bias), needed[1:]))
        return *triton_layer_norm.backward(dy.contiguous(), x, weight, stats, center, *dtypes), *nothing
