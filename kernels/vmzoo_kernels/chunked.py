"""The ``torch`` backend: a two-level scan in plain torch, on any device and in any float dtype.

The sequence is cut into chunks of about sqrt(T) steps. One vectorised pass runs all chunks side by side, a short pass
carries the state across them, and a last one adds what each chunk inherited. State is kept for one of the N state
channels at a time and recomputed in the backward pass, so nothing of size B·D·N·L is ever stored.

Inside this file a tensor "in lanes" is [B, K, T, M, ...]: step ``t`` of every lane is contiguous, and the M = S·C lanes
are the C chunks of each of the S sequences of a route.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import compute_dtype

_NEUTRAL = -2  # fills the last chunk up: a step that leaves the state alone
_PADDING = -1  # a zero token of the route: the state decays


class _Lanes(NamedTuple):
    """How K routes of S sequences of T steps are cut into lanes."""

    gather: Tensor  # [K, T, M] positions read, or _PADDING, or _NEUTRAL
    merge: Tensor  # [K, T, M] positions written, negative for none
    num_sequences: int  # S
    num_positions: int  # L
    complete: bool
    filled: bool  # no negative entry in `gather`


def _chunk_length(steps: int) -> int:
    return max(1, math.isqrt(steps))


def _make_lanes(gather: Tensor, merge: Tensor, num_positions: int, complete: bool) -> _Lanes:
    steps = gather.shape[-1]
    length = _chunk_length(steps)
    chunks = -(-steps // length)

    def cut(table: Tensor) -> Tensor:
        if chunks * length != steps:
            table = F.pad(table, (0, chunks * length - steps), value=_NEUTRAL)
        return table.unflatten(-1, (chunks, length)).permute(0, 3, 1, 2).flatten(2).long()  # [K, T, S*C]

    lanes_gather = cut(gather)
    lanes_merge = lanes_gather if merge is gather else cut(merge)
    filled = complete and chunks * length == steps
    return _Lanes(lanes_gather, lanes_merge, gather.shape[1], num_positions, complete, filled)


def _flat_index(table: Tensor, x: Tensor) -> Tensor:
    """Indices of a [K, T, M] table into ``x`` with its positions (and routes, if it has its own for each) flattened."""
    table = table.clamp(min=0)
    if x.ndim == 4:
        k = x.shape[2]
        table = table * k + torch.arange(k, device=table.device)[:, None, None]
    return table.reshape(-1)


def _to_lanes(x: Tensor, table: Tensor, dtype: torch.dtype, mask: bool) -> Tensor:
    """[B, L, F] or [B, L, K, F] in the order of a table: [B, K, T, M, F]."""
    rows = x.flatten(1, 2) if x.ndim == 4 else x
    out = rows.index_select(1, _flat_index(table, x)).to(dtype).unflatten(1, table.shape)
    return out.masked_fill_((table < 0).unsqueeze(-1), 0.0) if mask else out


def _from_lanes(y: Tensor, table: Tensor, lanes: _Lanes, reduce: bool) -> Tensor:
    """[B, K, T, M, F] back to positions: [B, L, F] summed over routes, or [B, L, K, F]."""
    batch, num_routes, features = y.shape[0], y.shape[1], y.shape[-1]
    size, positions = table[0].numel(), lanes.num_positions
    y = y.reshape(batch, num_routes * size, features)
    if not lanes.complete or not lanes.filled:
        y = torch.cat((y, y.new_zeros(batch, 1, features)), dim=1)  # where positions that no step writes read from
    # Invert the table, so that the merge is a gather too: no atomics, hence deterministic.
    steps = torch.arange(num_routes * size, device=table.device).view(num_routes, size)
    inverse = steps.new_full((num_routes, positions + 1), num_routes * size)
    flat = table.reshape(num_routes, size)
    inverse.scatter_(1, torch.where(flat < 0, positions, flat), steps)  # the extra column takes what goes nowhere
    inverse = inverse[:, :positions]
    if not reduce:
        return y.index_select(1, inverse.t().reshape(-1)).unflatten(1, (positions, num_routes))
    out = y.index_select(1, inverse[0])
    for k in range(1, num_routes):
        out += y.index_select(1, inverse[k])
    return out


def _softplus(x: Tensor) -> Tensor:
    """softplus to full relative precision; on a CPU several times faster than ``F.softplus``, whose log1p is scalar."""
    e = x.clamp(max=30.0).exp_()
    w = e + 1.0
    out = w.log()
    # log1p(e) = log(w) + (e - (w - 1)) / w restores what the rounding of 1 + e lost.
    out.addcdiv_(e.sub_(w - 1.0), w)
    return torch.maximum(out, x)


def _step_sizes(
    dt: Tensor, lanes: _Lanes, dt_weight: Tensor | None, dt_bias: Tensor | None, softplus: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """delta, what went into its softplus, and the routed dt: [B, K, T, M, D], the same, [B, K, T, M, R or D]."""
    routed = _to_lanes(dt, lanes.gather, dtype, mask=not lanes.filled)
    raw = routed
    if dt_weight is not None:
        raw = (routed.flatten(2, 3) @ dt_weight.mT).unflatten(2, routed.shape[2:4])
    if dt_bias is not None:
        raw = raw + dt_bias[:, None, None]
    delta = _softplus(raw) if softplus else raw
    if not lanes.filled:
        delta = delta.masked_fill((lanes.gather == _NEUTRAL).unsqueeze(-1), 0.0)
    return delta, raw, routed


def _carry(local: Tensor, decay: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
    """States that lanes inherit, from their own end states and total decays (all [B, K, M, D]), and the last states."""
    local, decay = (v.unflatten(2, (sequences, -1)) for v in (local, decay))  # [B, K, S, C, D]
    inherited = torch.zeros_like(local)
    for c in range(1, local.shape[3]):
        torch.addcmul(local[..., c - 1, :], decay[..., c - 1, :], inherited[..., c - 1, :], out=inherited[..., c, :])
    last = torch.addcmul(local[..., -1, :], decay[..., -1, :], inherited[..., -1, :])
    return inherited.flatten(2, 3), last


def _states(decay: Tensor, inputs: Tensor, sequences: int) -> tuple[Tensor, Tensor, Tensor]:
    """States of one state channel in lanes, from exp(delta A) and delta u B (both overwritten).

    Returns h_t, what each lane inherited [B, K, M, D], and the sequences' last states [B, K, S, D].
    """
    h, a = inputs.unbind(2), decay.unbind(2)
    for t in range(1, len(h)):
        h[t].addcmul_(a[t], h[t - 1])
        a[t].mul_(a[t - 1])
    inherited, last = _carry(h[-1], a[-1], sequences)
    return inputs.addcmul_(decay, inherited.unsqueeze(2)), inherited, last


def _adjoint_states(decay: Tensor, g: Tensor, sequences: int) -> Tensor:
    """dL/dh_t in lanes from ``g`` = C_t dL/dy_t (overwritten): g_t += decay_{t+1} g_{t+1}, across lanes too."""
    later = torch.ones_like(decay)  # product of decay_{t+1} ... decay_{T-1}
    steps, a, product = g.unbind(2), decay.unbind(2), later.unbind(2)
    for t in range(len(steps) - 2, -1, -1):
        steps[t].addcmul_(a[t + 1], steps[t + 1])
        torch.mul(a[t + 1], product[t + 1], out=product[t])
    out = (a[0] * steps[0]).unflatten(2, (sequences, -1))  # what each lane hands to the one before it
    total = (a[0] * product[0]).unflatten(2, (sequences, -1))
    inherited = torch.zeros_like(out)
    for c in range(out.shape[3] - 2, -1, -1):
        torch.addcmul(out[..., c + 1, :], total[..., c + 1, :], inherited[..., c + 1, :], out=inherited[..., c, :])
    return g.addcmul_(later, inherited.flatten(2, 3).unsqueeze(2))


def forward(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    gather: Tensor,
    merge: Tensor,
    complete: bool,
    softplus: bool,
    out: Tensor,
    last: Tensor,
) -> None:
    """Scan of :mod:`vmzoo_kernels.ops` into ``out`` ([B, L, D] summed over routes, or [B, L, K, D]) and ``last``."""
    dtype = compute_dtype(x.dtype)
    A, D, dt_weight, dt_bias = (v if v is None else v.to(dtype) for v in (A, D, dt_weight, dt_bias))
    lanes = _make_lanes(gather, merge, x.shape[1], complete)
    mask = not lanes.filled
    delta = _step_sizes(dt, lanes, dt_weight, dt_bias, softplus, dtype)[0]
    u = _to_lanes(x, lanes.gather, dtype, mask)
    b, c = (_to_lanes(v, lanes.gather, dtype, mask) for v in (B, C))
    delta_u = delta * u
    y = None
    for n in range(A.shape[-1]):
        decay = (delta * A[:, None, None, :, n]).exp_()
        h, _, last[..., n] = _states(decay, delta_u * b[..., n : n + 1], lanes.num_sequences)
        y = h.mul_(c[..., n : n + 1]) if y is None else y.addcmul_(h, c[..., n : n + 1])
    if D is not None:
        y = y.addcmul_(u, D[:, None, None])
    out.copy_(_from_lanes(y, lanes.merge, lanes, reduce=out.ndim == 3))


def backward(
    dy: Tensor,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    gather: Tensor,
    merge: Tensor,
    complete: bool,
    softplus: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, B, C, A, D, dt_weight and dt_bias in the compute dtype; None for those not given."""
    dtype = compute_dtype(x.dtype)
    A, D, dt_weight, dt_bias = (v if v is None else v.to(dtype) for v in (A, D, dt_weight, dt_bias))
    lanes = _make_lanes(gather, merge, x.shape[1], complete)
    mask = not lanes.filled
    delta, raw, routed_dt = _step_sizes(dt, lanes, dt_weight, dt_bias, softplus, dtype)
    u = _to_lanes(x, lanes.gather, dtype, mask)
    b, c = (_to_lanes(v, lanes.gather, dtype, mask) for v in (B, C))
    dy = _to_lanes(dy, lanes.merge, dtype, mask)
    delta_u = delta * u

    d_delta, d_delta_u = torch.zeros_like(delta), torch.zeros_like(delta)
    db, dc, dA = torch.empty_like(b), torch.empty_like(c), torch.empty_like(A)
    for n in range(A.shape[-1]):
        a = A[:, None, None, :, n]
        bn, cn = b[..., n : n + 1], c[..., n : n + 1]
        decay = (delta * a).exp_()
        h, inherited, _ = _states(decay.clone(), delta_u * bn, lanes.num_sequences)
        g = _adjoint_states(decay, dy * cn, lanes.num_sequences)
        dc[..., n] = (dy * h).sum(-1)
        db[..., n] = (g * delta_u).sum(-1)
        d_delta_u.addcmul_(g, bn)
        decayed = decay.mul_(g)  # g_t exp(delta_t A) h_{t-1}
        decayed[:, :, 1:].mul_(h[:, :, :-1])
        decayed[:, :, 0].mul_(inherited)
        d_delta.addcmul_(decayed, a)
        dA[..., n] = (decayed * delta).sum((0, 2, 3))

    du = d_delta_u * delta
    d_delta.addcmul_(d_delta_u, u)
    dD = None
    if D is not None:
        du.addcmul_(dy, D[:, None, None])
        dD = (dy * u).sum((0, 2, 3))
    if softplus:
        d_delta.mul_(torch.sigmoid(raw))
    if mask:
        d_delta.masked_fill_((lanes.gather == _NEUTRAL).unsqueeze(-1), 0.0)
    d_bias = d_delta.sum((0, 2, 3)) if dt_bias is not None else None
    d_weight = None
    d_dt = d_delta
    if dt_weight is not None:
        flat = d_delta.flatten(2, 3)  # [B, K, T*M, D]
        d_weight = (flat.mT @ routed_dt.flatten(2, 3)).sum(0)
        d_dt = (flat @ dt_weight).unflatten(2, d_delta.shape[2:4])

    dx = _from_lanes(du, lanes.gather, lanes, reduce=x.ndim == 3)
    d_dt, db, dc = (_from_lanes(v, lanes.gather, lanes, reduce=False) for v in (d_dt, db, dc))
    return dx, d_dt, db, dc, dA, dD, d_weight, d_bias
