"""The operators users call, and the ``torch.library`` operator behind them.

``vmzoo::scan`` is the general form: it reads K routes of a channels-last map (or one map a route), forms the step
sizes from their low-rank factors (or takes them whole), scans, and puts the outputs back. :func:`route_scan` is that
operator; :func:`selective_scan` is it with full step sizes, along the sequence itself, or
``vmzoo::sequence_scan`` where kernels take its layout as it is.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from . import chunked, cuda_scan, cuda_sequence, sequence
from .backends import resolve_backend
from .common import STATE_INTERVAL, ScanInputs, compute_dtype, state_interval
from .operators import direct_call, empty_grads, own_grads, register, register_autocast
from .routes import Routes, get_routes


def empty_outputs(
    x: Tensor, A: Tensor, gather: Tensor, segment: int, reduce: bool, out_dtype: torch.dtype, keep: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised y, last states [B, K, S, D, N], and the states that the backward pass of ``backend`` wants kept."""
    num_routes, sequences, steps = gather.shape
    (batch, length), (dim, d_state) = x.shape[:2], A.shape[1:]
    acc = compute_dtype(x.dtype)
    if reduce:
        y = x.new_empty((batch, length, dim), dtype=out_dtype)
    elif x.ndim == 3:
        y = x.new_empty((batch, length, num_routes, dim), dtype=out_dtype)
    else:
        y = torch.empty_like(x, dtype=out_dtype)  # in the memory order of x
    last = x.new_empty((batch, num_routes, sequences, dim, d_state), dtype=acc)
    kept = {
        'triton': (batch, num_routes, sequences, -(-steps // state_interval(segment)), dim, d_state),
        'cuda': (batch, num_routes, -(-sequences * steps // cuda_scan.TILE), d_state, dim),
    }
    return y, last, x.new_empty(kept.get(backend, 0) if keep else 0, dtype=acc)


def _forward(
    x: Tensor,
    dt: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    gather: Tensor,
    merge: Tensor,
    complete: bool,
    softplus: bool,
    segment: int,
    reduce: bool,
    out_dtype: torch.dtype,
    save_states: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last states [B, K, S, D, N], and what the backward pass wants kept (empty if nothing)."""
    out, last, states = empty_outputs(x, A, gather, segment, reduce, out_dtype, save_states, backend)
    inputs = ScanInputs(x, dt, B, C, A, D, dt_weight, dt_bias, gather, merge, complete, softplus, segment)
    if backend == 'cuda':
        cuda_scan.forward(inputs, out, last, states)
    elif backend == 'triton':
        from . import triton_scan

        triton_scan.forward(inputs, out, last, states)
    else:
        chunked.forward(inputs, out, last)
    return out, last, states


def _fake(
    x,
    dt,
    B,
    C,
    A,
    D,
    dt_weight,
    dt_bias,
    gather,
    merge,
    complete,
    softplus,
    segment,
    reduce,
    out_dtype,
    save_states,
    backend,
):
    return empty_outputs(x, A, gather, segment, reduce, out_dtype, save_states, backend)


def _backward(
    dy: Tensor,
    x: Tensor,
    dt: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    states: Tensor,
    gather: Tensor,
    merge: Tensor,
    complete: bool,
    softplus: bool,
    segment: int,
    backend: str,
) -> list[Tensor]:
    """Gradients of x, dt, B, C, A, D, dt_weight and dt_bias; empty for those not given."""
    inputs = ScanInputs(x, dt, B, C, A, D, dt_weight, dt_bias, gather, merge, complete, softplus, segment)
    if backend == 'cuda':
        grads = cuda_scan.backward(dy, inputs, states)
    elif backend == 'triton':
        from . import triton_scan

        grads = triton_scan.backward(dy, inputs, states)
    else:
        grads = chunked.backward(dy, inputs)
    if B is None and grads[2] is not None:
        dx, d_dt, d_B, d_C, *others = grads
        beyond = [d_dt.new_zeros(()).expand(*dt.shape[:3], dt.shape[3] - d_dt.shape[3] - 2 * d_B.shape[3])]
        grads = (dx, torch.cat((d_dt, d_B, d_C, *beyond), dim=-1), None, None, *others)
    return own_grads(inputs[:8], grads, apart=backend == 'cuda')


def _fake_backward(
    dy, x, dt, B, C, A, D, dt_weight, dt_bias, states, gather, merge, complete, softplus, segment, backend
):
    return empty_grads((x, dt, B, C, A, D, dt_weight, dt_bias))


def _setup_context(ctx, inputs, output):
    *tensors, gather, merge, complete, softplus, segment, _reduce, _out_dtype, _save_states, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, output[2], gather, merge)
    ctx.options = (complete, softplus, segment, backend)


def _gradients(ctx, dy: Tensor | None, backward: Callable[..., list[Tensor]]) -> tuple[Tensor | None, ...]:
    *tensors, states, gather, merge = ctx.saved_tensors
    nothing = (None,) * 9
    if dy is None:
        return (None,) * 8 + nothing
    grads = backward(dy, *tensors, states, gather, merge, *ctx.options)
    return tuple(None if v is None else grad for v, grad in zip(tensors, grads)) + nothing


def _autograd(ctx, dy, *unused):
    return _gradients(ctx, dy, torch.ops.vmzoo.scan_backward)


register('scan', _forward, _fake, _autograd, _setup_context)
register('scan_backward', _backward, _fake_backward)
register_autocast('scan', 8)
_call = direct_call('scan', _forward, _setup_context, _gradients, _backward)


def scan_flops(
    batch: int,
    steps: int,
    routes: int,
    dim: int,
    d_state: int,
    dt_rank: int,
    skip: bool,
    projected: bool,
    segments: bool = False,
) -> int:
    """Floating-point operations of a scan, as the field counts them.

    9·B·K·T·D·N for the scan (a multiply-add is two), B·K·T·D for the D term, 2·B·K·T·D·R for the step sizes where the
    operator projects them from low rank, and 3·B·K·T·D·N for a backward scan of segments, which shares all factors.
    """
    lanes = batch * routes * steps * dim
    return lanes * ((12 if segments else 9) * d_state + int(skip) + 2 * dt_rank * int(projected))


def _shape_flops(x, A, D, dt_weight, gather, segment) -> int:
    num_routes, sequences, steps = gather
    rank = dt_weight[-1] if dt_weight is not None else 0
    options = (D is not None, dt_weight is not None, segment > 0)
    return scan_flops(x[0], sequences * steps, num_routes, A[1], A[2], rank, *options)


@register_flop_formula(torch.ops.vmzoo.scan)
def _(x, dt, B, C, A, D, dt_weight, dt_bias, gather, merge, complete, softplus, segment, *args, **kwargs) -> int:
    return _shape_flops(x, A, D, dt_weight, gather, segment)


@register_flop_formula(torch.ops.vmzoo.scan_backward)
def _(
    dy, x, dt, B, C, A, D, dt_weight, dt_bias, states, gather, merge, complete, softplus, segment, *args, **kw
) -> int:
    return 2 * _shape_flops(x, A, D, dt_weight, gather, segment)


@register_flop_formula(torch.ops.vmzoo.sequence_scan)
def _(u, delta, B, C, A, D, *args, out_shape=None, **kwargs) -> int:
    return scan_flops(u[0], u[2], 1, *A, 0, D is not None, False)


@register_flop_formula(torch.ops.vmzoo.sequence_scan_backward)
def _(dy, u, delta, B, C, A, D, *args, out_shape=None, **kwargs) -> int:
    return 2 * scan_flops(u[0], u[2], 1, *A, 0, D is not None, False)


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f'{name} should be {meaning} = {shape}, got {tuple(tensor.shape)}')
    if not tensor.is_floating_point():
        raise TypeError(f'{name} should be real floating point, got {tensor.dtype}')


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether gradients may be asked for; refuses forward-mode ones, which torch would silently drop."""
    given = [v for v in tensors if v is not None]
    forward_mode = not torch.compiler.is_compiling() and forward_ad._current_level >= 0
    if forward_mode and any(forward_ad.unpack_dual(v).tangent is not None for v in given):
        raise RuntimeError('the selective scan has no forward-mode derivative (jvp): use backward()')
    return torch.is_grad_enabled() and any(v.requires_grad for v in given)


def _segment_steps(segment: int | str, steps: int) -> int:
    """Steps of the segments that are also scanned backwards, in sequences of so many steps; 0 for none."""
    if segment == 'auto':
        return 4 if steps <= 128 else 8 if steps <= 256 else 16
    if isinstance(segment, str) or segment < 1:
        raise ValueError(f"segment should be a number of steps, at least 1, 'auto' or None, got {segment!r}")
    return 0 if segment == 1 else segment  # of a single step there is nothing to scan


_ONE_WAY = 'it takes scans in one direction, not segments that are also scanned backwards'


def _unfit_triton(segment: int) -> str | None:
    """Why the Triton kernels do not take a scan; None if they do."""
    if segment > STATE_INTERVAL:
        return f'it takes segments of up to {STATE_INTERVAL} steps, not {segment}'
    return None


def route_scan(
    x: Tensor,
    x_dbl: Tensor,
    A: Tensor,
    D: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    routes: Routes,
    merge: bool = True,
    out_dtype: torch.dtype | None = None,
    segment: int | Literal['auto'] | None = None,
    backend: str = 'auto',
) -> Tensor:
    """Selective scan of a channels-last map along K routes, in one operator.

    Along each route ``delta = softplus(dt_weight @ dt + dt_bias)``, ``h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t``
    and ``y_t = C_t · h_t + D x_t``; then the outputs go back to their positions and are summed (VMamba's SS2D, arXiv
    2401.10166, without expanding its inputs K times). The projections are pointwise, so they are given per position,
    not per route step. State, softplus, exp and sums are float32, or float64 for float64 inputs. Under autocast ``x``
    and ``x_dbl`` take the autocast dtype and the parameters float32.

    Args:
        x: [B, L, D], the map flattened row-major and shared by all routes, or [B, L, K, D], one map a route.
        x_dbl: [B, L, K, R + 2N], for each position and route: low-rank step size (R), B (N) and C (N). It may be
            filled up to a multiple of 8 columns, with which GPUs are faster.
        A: [K, D, N], negative.
        D: [K, D].
        dt_weight: [K, D, R].
        dt_bias: [K, D], added before the softplus.
        routes: K routes over L positions.
        merge: Sum over routes; otherwise return each route's outputs.
        out_dtype: dtype of the result; default: that of ``x`` (after autocast). Sums over routes can leave the range
            of float16.
        segment: Also scan every segment of so many steps backwards, as :func:`selective_scan` does.
        backend: 'auto', 'torch', 'triton' or 'cuda'.

    Returns:
        [B, L, D], or [B, L, K, D] if not ``merge``, in row-major positions.

    Raises:
        ValueError: Shapes that do not fit together, routes on another device, or a segment below one step.
        TypeError: Complex or integer tensors.
        RuntimeError: A backend asked for by name that cannot run here, or forward-mode differentiation.
    """
    num_routes, dim, rank = dt_weight.shape if dt_weight.ndim == 3 else (-1, -1, -1)
    d_state = A.shape[-1]
    batch = x.shape[0]
    if x.ndim not in (3, 4):
        raise ValueError(f'x should be [B, L, D] or [B, L, K, D], got {tuple(x.shape)}')
    if dt_weight.ndim != 3:
        raise ValueError(f'dt_weight should be [K, D, R], got {tuple(dt_weight.shape)}')
    if routes.num_routes != num_routes or routes.num_positions != x.shape[1]:
        raise ValueError(
            f'{routes.num_routes} routes over {routes.num_positions} positions do not fit parameters for {num_routes} '
            f'routes and an input of {x.shape[1]} positions'
        )
    if routes.gather.device != x.device:
        raise ValueError(
            f'routes are on {routes.gather.device}, x is on {x.device}: make them with get_routes(..., device=x.device)'
        )
    length = x.shape[1]
    shape, meaning = (
        ((batch, length, dim), '[B, L, D]') if x.ndim == 3 else ((batch, length, num_routes, dim), '[B, L, K, D]')
    )
    _expect('x', x, shape, meaning)
    width = rank + 2 * d_state
    if x_dbl.shape[-1] == -(-width // 8) * 8:
        width = x_dbl.shape[-1]
    _expect('x_dbl', x_dbl, (batch, length, num_routes, width), '[B, L, K, R + 2N]')
    _expect('A', A, (num_routes, dim, d_state), '[K, D, N]')
    _expect('D', D, (num_routes, dim), '[K, D]')
    _expect('dt_weight', dt_weight, (num_routes, dim, rank), '[K, D, R]')
    _expect('dt_bias', dt_bias, (num_routes, dim), '[K, D]')
    flowing = flowing_dtype(x)
    out_dtype = out_dtype or flowing
    segment = 0 if segment is None else _segment_steps(segment, routes.gather.shape[2])
    unfit = _ONE_WAY if segment else cuda_scan.why_not(flowing, out_dtype, dim, d_state, rank, routes.complete)
    return _call(
        (x, x_dbl, None, None, A, D, dt_weight, dt_bias),
        routes.gather,
        routes.merge,
        routes.complete,
        True,
        segment,
        merge,
        out_dtype,
        needs_grad(x, x_dbl, A, D, dt_weight, dt_bias),
        resolve_backend(backend, x.device, x.dtype, unfit, _unfit_triton(segment) if segment else None),
    )[0]


def flowing_dtype(x: Tensor) -> torch.dtype:
    """dtype in which ``x`` reaches the operator."""
    if x.dtype != torch.float64 and x.device.type in ('cpu', 'cuda') and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _grouped(name: str, v: Tensor, u: Tensor, d_state: int) -> Tensor:
    """B or C in any of mamba-ssm's forms as [B, G, N, L]."""
    batch, dim, length = u.shape
    if v.is_complex():
        raise TypeError(f'{name} is complex: only real selective scans are supported')
    if v.ndim == 2:  # the same at every step, different in every channel: as many groups as channels
        _expect(name, v, (dim, d_state), '[D, N]')
        return v[None, :, :, None].expand(batch, dim, d_state, length)
    if v.ndim == 3:
        v = v.unsqueeze(1)
    if v.ndim != 4 or v.shape[0] != batch or v.shape[2:] != (d_state, length) or dim % v.shape[1]:
        raise ValueError(
            f'{name} should be [B, N, L], [B, G, N, L] with G dividing D, or [D, N], for B={batch}, D={dim}, '
            f'N={d_state}, L={length}; got {tuple(v.shape)}'
        )
    return v


def _scan_channels_last(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
    segment: int,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y [B, D, L] and the last states [B, D, N] of ``vmzoo::scan``, each of G groups being a route."""
    groups, length = B.shape[1], u.shape[2]

    def channels(v: Tensor) -> Tensor:  # [B, D, L] -> [B, L, G, D/G]
        v = v.unflatten(1, (groups, -1)).permute(0, 3, 1, 2)
        # A copy costs less than kernels that read against the grain.
        return v.contiguous() if backend == 'triton' else v

    order = get_routes('forward', 1, length, device=u.device)
    table = order.gather if groups == 1 else order.gather.expand(groups, 1, length)
    tensors = (
        channels(u),
        channels(delta),
        B.permute(0, 3, 1, 2),
        C.permute(0, 3, 1, 2),
        A.unflatten(0, (groups, -1)),
        None if D is None else D.unflatten(0, (groups, -1)),
        None,
        None if delta_bias is None else delta_bias.unflatten(0, (groups, -1)),
    )
    options = (table, table, True, softplus, segment, False, flowing_dtype(u), keep, backend)
    y, last, _ = _call(tensors, *options)
    return y.permute(0, 2, 3, 1).flatten(1, 2), last.flatten(1, 3)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    segment: int | Literal['auto'] | None = None,
    backend: str = 'auto',
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan along a sequence: a drop-in for mamba-ssm's ``selective_scan_fn`` (Mamba, arXiv 2312.00752).

    ``delta' = softplus(delta + delta_bias)``, ``h_t = exp(delta'_t A) h_{t-1} + delta'_t B_t u_t``,
    ``y_t = C_t · h_t + D u_t``, times ``SiLU(z)`` if given. State and accumulation are float32 (float64 for float64).

    With segments the scan is locally bidirectional (LBMamba, arXiv 2506.15976): ``h_t + r_t`` takes the place of
    ``h_t`` in ``y_t``, where ``r_t = exp(delta'_t A) (r_{t+1} + delta'_{t+1} B_{t+1} u_{t+1})`` is what the later steps
    of the same segment add. The state that is carried on, and returned, is ``h_t``.

    Args:
        u: [B, D, L] input.
        delta: [B, D, L] step sizes.
        A: [D, N], negative.
        B: [B, N, L], [B, G, N, L] with G groups of D/G channels, or [D, N].
        C: As ``B``.
        D: [D] skip.
        z: [B, D, L] gate.
        delta_bias: [D], added to ``delta`` before the softplus.
        delta_softplus: Apply softplus to ``delta``.
        return_last_state: Return the last state too (no gradient flows through it).
        segment: Also scan every segment of so many steps backwards, counted from the first step; the last one may be
            shorter. 'auto' is the published choice: 4 in sequences of up to 128 steps, 8 of up to 256, else 16. A
            segment of one step is a plain scan. Triton takes up to 32 steps, torch any number, in time that grows with
            it.
        backend: 'auto', 'torch', 'triton' or 'cuda'.

    Returns:
        y [B, D, L] in the dtype of ``u``; with ``return_last_state`` also the state [B, D, N] in float32.

    Raises:
        ValueError: Shapes that do not fit together, an empty sequence, or a segment below one step.
        TypeError: Complex or integer tensors.
        RuntimeError: A backend asked for by name that cannot run here, or forward-mode differentiation.
    """
    if u.ndim != 3 or A.ndim != 2:
        raise ValueError(f'u should be [B, D, L] and A [D, N], got {tuple(u.shape)} and {tuple(A.shape)}')
    batch, dim, length = u.shape
    d_state = A.shape[1]
    if length == 0:
        raise ValueError(f'u has no step to scan: {tuple(u.shape)}')
    _expect('delta', delta, (batch, dim, length), '[B, D, L]')
    _expect('A', A, (dim, d_state), '[D, N]')
    for name, v in (('D', D), ('delta_bias', delta_bias)):
        if v is not None:
            _expect(name, v, (dim,), '[D]')
    if z is not None:
        _expect('z', z, (batch, dim, length), '[B, D, L]')
    B, C = _grouped('B', B, u, d_state), _grouped('C', C, u, d_state)
    groups = max(B.shape[1], C.shape[1])
    if groups % B.shape[1] or groups % C.shape[1]:
        raise ValueError(f'B has {B.shape[1]} groups and C {C.shape[1]}: one must divide the other')
    B, C = (v.repeat_interleave(groups // v.shape[1], dim=1) if v.shape[1] != groups else v for v in (B, C))

    segment = 0 if segment is None else _segment_steps(segment, length)
    keep = needs_grad(u, delta, A, B, C, D, delta_bias)
    dtypes = [flowing_dtype(v) for v in (u, delta, B, C)]
    unfit = _ONE_WAY if segment else cuda_sequence.why_not(dtypes, dim, groups, d_state)
    backend = resolve_backend(backend, u.device, u.dtype, unfit, _unfit_triton(segment) if segment else None)
    if backend == 'cuda':
        y, last, _ = sequence.scan((u, delta, B, C, A, D, delta_bias), delta_softplus, keep)
    else:
        y, last = _scan_channels_last(u, delta, A, B, C, D, delta_bias, delta_softplus, segment, keep, backend)
    if z is not None:
        y = (y * torch.nn.functional.silu(z)).to(y.dtype)
    return (y, last) if return_last_state else y
