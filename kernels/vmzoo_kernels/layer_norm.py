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


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``x + branch``, as a residual stream goes on, and its :func:`layer_norm`, in one pass.

    Args:
        x: [..., C], floating.
        branch: [..., C], of a dtype no wider than that of ``x``.
        weight, bias, eps, out_dtype: As :func:`layer_norm` takes them.

    Returns:
        Both [..., C]; the sum in the dtype of ``x``.
    """
    out_dtype = out_dtype or x.dtype
    same = branch.shape == x.shape and branch.device == x.device and branch.dtype in _DTYPES
    wide = torch.promote_types(x.dtype, branch.dtype) == x.dtype
    if same and wide and runs_plainly(branch) and _can_fuse(x, weight, bias, out_dtype):
        return _fused_norm(x, branch, weight, bias, eps, out_dtype, True)
    total = x + branch
    return total, _torch_norm(total, weight, bias, eps, out_dtype, True)


def _norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype, center: bool
) -> Tensor:
    if _can_fuse(x, weight, bias, out_dtype):
        return _fused_norm(x, None, weight, bias, eps, out_dtype, center)[1]
    return _torch_norm(x, weight, bias, eps, out_dtype, center)


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
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    center: bool,
) -> tuple[Tensor, Tensor]:
    from . import triton_layer_norm

    x = x.contiguous()
    branch = branch if branch is None else branch.contiguous()
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (x, branch, weight, bias)):
        outputs = _FusedNorm.apply(x, branch, weight, bias, eps, out_dtype, center)
        return (x, outputs) if branch is None else outputs
    return triton_layer_norm.forward(x, branch, weight, bias, eps, out_dtype, center, save_stats=False)[:2]


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, weight, bias, eps, out_dtype, center):
        from . import triton_layer_norm

        total, y, stats = triton_layer_norm.forward(x, branch, weight, bias, eps, out_dtype, center, save_stats=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, bias, stats)
        ctx.options = (eps, out_dtype, center)
        ctx.branch_dtype = None if branch is None else branch.dtype
        return y if branch is None else (total, y)

    @staticmethod
    def backward(ctx, *grads):
        from . import triton_layer_norm

        x, weight, bias, stats = ctx.saved_tensors
        eps, out_dtype, center = ctx.options
        dtotal, dy = grads if len(grads) == 2 else (None, *grads)
        nothing = (None,) * 3
        needed = ctx.needs_input_grad[:4]
        if dy is None:  # the sum alone is used
            dbranch = dtotal if dtotal is None or not needed[1] else dtotal.to(ctx.branch_dtype)
            return dtotal, dbranch, None, None, *nothing
        if torch.is_grad_enabled():  # create_graph: these gradients are to have gradients
            y = _torch_norm(x, weight, bias, eps, out_dtype, center)
            wanted = (needed[0] or needed[1], *needed[2:])
            leaves = [v for v, need in zip((x, weight, bias), wanted) if need]
            found = iter(torch.autograd.grad(y, leaves, dy, create_graph=True))
            dx, dweight, dbias = (next(found) if need else None for need in wanted)
            if dx is not None and dtotal is not None:
                dx = dx + dtotal
            return dx, dx.to(ctx.branch_dtype) if needed[1] else None, dweight, dbias, *nothing
        dtypes = (v.dtype if need else None for v, need in zip((weight, bias), needed[2:]))
        dtotal = dtotal if dtotal is None else dtotal.contiguous()
        dbranch_dtype = ctx.branch_dtype if needed[1] else None
        grads = triton_layer_norm.backward(dy.contiguous(), dtotal, x, weight, stats, center, dbranch_dtype, *dtypes)
        return *grads, *nothing
