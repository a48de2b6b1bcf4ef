"""``vmzoo::sequence_scan``: the 1-D scan in mamba-ssm's layout, as the kernels of the ``cuda`` backend take it."""

from collections.abc import Callable

import torch
from torch import Tensor

from . import cuda_sequence
from .operators import direct_call, empty_grads, own_grads, register, register_autocast


def _empty_outputs(u: Tensor, A: Tensor, save_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised y, last states, and those that the backward pass wants kept."""
    batch, _, length = u.shape
    kept = (batch, -(-length // cuda_sequence.TILE), *A.shape) if save_states else (0,)
    return (
        u.new_empty(u.shape),
        u.new_empty((batch, *A.shape), dtype=torch.float32),
        u.new_empty(kept, dtype=torch.float32),
    )


def _forward(
    u: Tensor,
    delta: Tensor,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, D, L], the last states [B, D, N], and what the backward pass wants kept (empty if nothing)."""
    y, last, states = _empty_outputs(u, A, save_states)
    cuda_sequence.forward((u, delta, B, C, A, D, delta_bias), softplus, y, last, states)
    return y, last, states


def _backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    states: Tensor,
    softplus: bool,
) -> list[Tensor]:
    """Gradients of u, delta, B, C, A, D and delta_bias; empty for those not given."""
    inputs = (u, delta, B, C, A, D, delta_bias)
    return own_grads(inputs, cuda_sequence.backward(dy, inputs, states, softplus), apart=True)


def _setup_context(ctx, inputs, output):
    *tensors, softplus, _save_states = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, output[2])
    ctx.softplus = softplus


def _gradients(ctx, dy: Tensor | None, backward: Callable[..., list[Tensor]]) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    *tensors, states = ctx.saved_tensors
    grads = backward(dy, *tensors, states, ctx.softplus)
    return (*(None if v is None else grad for v, grad in zip(tensors, grads)), None, None)


def _autograd(ctx, dy, *unused):
    return _gradients(ctx, dy, torch.ops.vmzoo.sequence_scan_backward)


def _fake(u, delta, B, C, A, D, delta_bias, softplus, save_states):
    return _empty_outputs(u, A, save_states)


def _fake_backward(dy, u, delta, B, C, A, D, delta_bias, states, softplus):
    return empty_grads((u, delta, B, C, A, D, delta_bias))


register('sequence_scan', _forward, _fake, _autograd, _setup_context)
register('sequence_scan_backward', _backward, _fake_backward)
register_autocast('sequence_scan', 7)

scan = direct_call('sequence_scan', _forward, _setup_context, _gradients, _backward)
"""y, last states and kept states of ((u, delta, B, C, A, D, delta_bias), softplus, save_states)."""
