"""The scan of a map together with the projections of its step sizes, B and C: the core of an SS2D layer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cuda_scan
from .backends import resolve_backend
from .common import ScanInputs, compute_dtype, runs_plainly
from .ops import empty_outputs, flowing_dtype, needs_grad, route_scan
from .routes import Routes


class _Projected(torch.autograd.Function):
    """Both matrix products and the CUDA scan as one node: the host takes longer for each node than the GPU for a small
    map, and the gradient of the projection is added to that of the scan in the product itself."""

    @staticmethod
    def forward(ctx, x, x_proj, A_log, D, dt_weight, dt_bias, routes, out_dtype, save_states):
        A = torch.exp(A_log.float()).neg_()
        batch, length, dim = x.shape
        num_routes, columns, _ = x_proj.shape
        padded = -(-columns // 8) * 8  # rows of a multiple of 16 bytes
        weight = x_proj
        if padded != columns:
            weight = x.new_zeros((num_routes, padded, dim))
            weight[:, :columns] = x_proj
        elif x_proj.dtype != x.dtype:
            weight = x_proj.to(x.dtype)
        weight = weight.reshape(-1, dim)
        flat = x.reshape(-1, dim)
        rows = torch.mm(flat, weight.t()).view(batch, length, num_routes, padded)
        out, last, states = empty_outputs(x, A, routes.gather, 0, True, out_dtype, save_states, 'cuda')
        inputs = (x, rows, None, None, A, D, dt_weight, dt_bias, *_options(routes))
        cuda_scan.forward(ScanInputs(*inputs), out, last, states)
        if save_states:
            ctx.save_for_backward(x, rows, weight, A, D, dt_weight, dt_bias, states)
            ctx.routes = routes
            ctx.columns = columns
        return out

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():  # create_graph
            return _OnlyFirst.apply(ctx, dy, *ctx.saved_tensors)
        return _Projected._gradients(ctx, dy)

    @staticmethod
    def _gradients(ctx, dy):
        x, rows, weight, A, D, dt_weight, dt_bias, states = ctx.saved_tensors
        inputs = ScanInputs(x, rows, None, None, A, D, dt_weight, dt_bias, *_options(ctx.routes))
        dx, d_rows, _, _, d_A, d_D, d_weight, d_bias = cuda_scan.backward(dy, inputs, states)
        flat, d_rows = x.reshape(-1, x.shape[2]), d_rows.view(-1, weight.shape[0])
        d_A *= A
        if ctx.needs_input_grad[0]:
            dx.view(flat.shape).addmm_(d_rows, weight)
        d_proj = None
        if ctx.needs_input_grad[1]:
            d_proj = torch.mm(d_rows.t(), flat).view(A.shape[0], -1, x.shape[2])
            if d_proj.shape[1] != ctx.columns:
                d_proj = d_proj[:, : ctx.columns]
        return dx, d_proj, d_A, d_D, d_weight, d_bias, None, None, None


class _OnlyFirst(torch.autograd.Function):
    """Gradients that say that they have none themselves."""

    @staticmethod
    def forward(ctx, of, dy, *tensors):
        return _Projected._gradients(of, dy)

    @staticmethod
    def backward(ctx, *unused):
        raise RuntimeError('the selective scan has no second derivative')


def _options(routes: Routes) -> tuple:
    """What follows the tensors in ``ScanInputs``."""
    return routes.gather, routes.merge, routes.complete, True, 0


def projected_scan(
    x: Tensor,
    x_proj: Tensor,
    A_log: Tensor,
    D: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    routes: Routes,
    out_dtype: torch.dtype | None = None,
    backend: str = 'auto',
) -> Tensor:
    """:func:`route_scan` of ``x`` with ``x_dbl = x @ x_proj.T`` and ``A = -exp(A_log)``, summed over routes.

    Args:
        x: [B, L, D], the map flattened row-major.
        x_proj: [K, R + 2N, D], projection to low-rank step size (R), B (N) and C (N) of each route. Under autocast it
            takes the autocast dtype, as ``x`` does.
        A_log: [K, D, N].
        D, dt_weight, dt_bias, routes, out_dtype, backend: As :func:`route_scan` takes them.

    Returns:
        [B, L, D].

    Raises:
        ValueError: Shapes that do not fit together, or routes on another device.
        TypeError: Complex or integer tensors.
        RuntimeError: A backend asked for by name that cannot run here, or forward-mode differentiation.
    """
    tensors = (x, x_proj, A_log, D, dt_weight, dt_bias)
    if _fits(*tensors, routes) and runs_plainly(*tensors):
        dtype = flowing_dtype(x)
        rank, d_state = dt_weight.shape[2], A_log.shape[2]
        unfit = cuda_scan.why_not(dtype, out_dtype or dtype, x.shape[2], d_state, rank, routes.complete)
        if resolve_backend(backend, x.device, x.dtype, unfit) == 'cuda':
            x = x if x.dtype == dtype else x.to(dtype)
            return _Projected.apply(x, *tensors[1:], routes, out_dtype or dtype, needs_grad(*tensors))
    columns = x_proj.shape[1]
    if x.is_cuda:
        x_proj = F.pad(x_proj, (0, 0, 0, -columns % 8))
    x_dbl = F.linear(x, x_proj.flatten(0, 1)).unflatten(-1, x_proj.shape[:2])
    A = -torch.exp(A_log.to(compute_dtype(A_log.dtype)))
    return route_scan(x, x_dbl, A, D, dt_weight, dt_bias, routes, out_dtype=out_dtype, backend=backend)


def _fits(x, x_proj, A_log, D, dt_weight, dt_bias, routes) -> bool:
    """Whether shapes are as they should be; if not, :func:`route_scan` says what is wrong."""
    if x.ndim != 3 or A_log.ndim != 3 or dt_weight.ndim != 3 or x.numel() == 0 or routes.gather.device != x.device:
        return False
    num_routes, dim, d_state = A_log.shape
    rank = dt_weight.shape[2]
    return (
        x.shape[1:] == (routes.num_positions, dim)
        and x_proj.shape == (num_routes, rank + 2 * d_state, dim)
        and dt_weight.shape[:2] == D.shape == dt_bias.shape == (num_routes, dim)
        and num_routes == routes.gather.shape[0]
        and x.is_floating_point()
    )
