"""The ``torch`` backend: a two-level scan in plain torch, on any device and in any float dtype.

The sequence is cut into chunks of about sqrt(T) steps. One vectorised pass runs all chunks side by side, a short pass
carries the state across them, and a last one adds what each chunk inherited. State is kept for one of the N state
channels at a time and recomputed in the backward pass, so nothing of size B·D·N·L is ever stored. Batch items and
routes are worked off in blocks that fit a CPU's caches.

Inside this file a tensor "in lanes" is [B, K, T, M, ...]: step ``t`` of every lane is contiguous, and the M = S·C lanes
are the C chunks of each of the S sequences of a route. Rows are put in lanes, and back, by ``embedding_bag``: a gather
that sums over routes on the way, in a fixed order, and on a CPU many times faster than ``index_select``.
"""

import math
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .common import ScanInputs, compute_dtype

_NEUTRAL = -2  # fills the last chunk up: a step that leaves the state alone
_BLOCK_VALUES = 2**19  # of one tensor in lanes


class _Lanes(NamedTuple):
    """How K routes of S sequences of T steps over L positions are cut into lanes."""

    gather: Tensor  # [K, T, M] position that each step reads; 0 where `unread`
    unread: Tensor | None  # [K, T, M], or None if every step reads one
    neutral: Tensor | None  # [K, T, M], steps past the end of their sequence, if there are any
    merge: Tensor  # as `gather`, for the positions written
    unwritten: Tensor | None
    reader: Tensor  # [L, K] step of the route that reads each position, counted over its T·M; -1 for none
    writer: Tensor
    num_sequences: int
    complete: bool  # every route reads and writes every position once


_CACHE = WeakIdKeyDictionary()  # by gather table, which calls share; its entries keep no table alive


def _version(table: Tensor) -> int | None:
    return None if table.is_inference() else table._version


def _lanes(gather: Tensor, merge: Tensor, num_positions: int, complete: bool) -> _Lanes:
    key = (num_positions, complete, _version(gather), _version(merge))
    merge_ref, cached_key, cached = _CACHE.get(gather, (None, None, None))
    if cached_key == key and merge_ref() is merge:
        return cached
    steps = gather.shape[-1]
    length = max(1, math.isqrt(steps))
    chunks = -(-steps // length)
    filled = chunks * length == steps

    def cut(table: Tensor) -> Tensor:
        if not filled:
            table = F.pad(table, (0, chunks * length - steps), value=_NEUTRAL)
        return table.unflatten(-1, (chunks, length)).permute(0, 3, 1, 2).flatten(2).long()  # [K, T, S·C]

    def invert(table: Tensor) -> Tensor:
        table = table.flatten(1)
        steps = torch.arange(table.shape[1], device=table.device).expand_as(table)
        inverse = steps.new_full((table.shape[0], num_positions + 1), -1)
        inverse.scatter_(1, torch.where(table < 0, num_positions, table), steps)  # the last column takes the rest
        return inverse[:, :num_positions].t().contiguous()

    read, written = cut(gather), cut(merge)
    all_real = filled and complete
    lanes = _Lanes(
        gather=read.clamp(min=0),
        unread=None if all_real else read < 0,
        neutral=None if filled else read == _NEUTRAL,
        merge=written.clamp(min=0),
        unwritten=None if all_real else written < 0,
        reader=invert(read),
        writer=invert(written),
        num_sequences=gather.shape[1],
        complete=complete,
    )
    _CACHE[gather] = (weakref.ref(merge), key, lanes)
    return lanes


def _pick(rows: Tensor, index: Tensor) -> Tensor:
    """Rows [R, F] at an index [...]: [..., F]."""
    return F.embedding_bag(index.reshape(-1, 1), rows, mode='sum').view(*index.shape, rows.shape[-1])


class _Block(NamedTuple):
    """Batch items and routes that are worked off together."""

    batch: slice
    routes: slice
    lanes: _Lanes

    def read(self, x: Tensor) -> Tensor:
        """[B, L, F] or [B, L, K, F] in this block's lanes; zeros where nothing is read."""
        return self._in_lanes(x, self.lanes.gather, self.lanes.unread)

    def written(self, dy: Tensor) -> Tensor:
        """What arrives at the positions that this block's steps write."""
        return self._in_lanes(dy, self.lanes.merge, self.lanes.unwritten)

    def _in_lanes(self, x: Tensor, table: Tensor, absent: Tensor | None) -> Tensor:
        x, index = x[self.batch], table[self.routes]
        per_item = x[0].numel() // x.shape[-1]
        if x.ndim == 4:
            index = index * x.shape[2] + torch.arange(x.shape[2], device=x.device)[self.routes, None, None]
        starts = per_item * torch.arange(x.shape[0], device=x.device).view(-1, 1, 1, 1)
        out = _pick(x.reshape(-1, x.shape[-1]), index + starts)
        return out if absent is None else out.masked_fill_(absent[self.routes].unsqueeze(-1), 0.0)

    def step_sizes(
        self, dt: Tensor, weight: Tensor | None, bias: Tensor | None, softplus: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """delta, what went into its softplus [B, K, T, M, D], and dt in lanes [B, K, T, M, R or D]."""
        routed = self.read(dt)
        raw = routed
        if weight is not None:
            raw = (routed.flatten(2, 3) @ weight[self.routes].mT).unflatten(2, routed.shape[2:4])
        if bias is not None:
            raw = raw + bias[self.routes, None, None] if raw is routed else raw.add_(bias[self.routes, None, None])
        delta = _softplus(raw) if softplus else raw
        if self.lanes.neutral is not None:
            delta = delta.masked_fill(self.lanes.neutral[self.routes].unsqueeze(-1), 0.0)
        return delta, raw, routed


def _blocks(in_lanes: Tensor, lanes: _Lanes) -> Iterator[_Block]:
    """The whole of a tensor [B, K, T, M, D] in blocks: on a CPU of few enough values, elsewhere in one."""
    items, routes = batch, num_routes = in_lanes.shape[:2]
    if in_lanes.device.type == 'cpu':
        items = max(1, _BLOCK_VALUES * batch // max(1, in_lanes.numel()))
        routes = num_routes if items > 1 else max(1, _BLOCK_VALUES * batch * num_routes // max(1, in_lanes.numel()))
    for b in range(0, batch, items):
        for k in range(0, num_routes, routes):
            yield _Block(slice(b, b + items), slice(k, k + routes), lanes)


def _put_back(y: Tensor, steps: Tensor, lanes: _Lanes, reduce: bool) -> Tensor:
    """[B, K, T, M, F] to the positions given by steps [L, K]: [B, L, F] summed over routes, or [B, L, K, F]."""
    batch, num_routes, features = y.shape[0], y.shape[1], y.shape[-1]
    lanes_steps = y.shape[2] * y.shape[3]
    starts = lanes_steps * torch.arange(batch * num_routes, device=y.device).view(batch, 1, num_routes)
    index = steps.clamp(min=0) + starts  # [B, L, K]
    rows = y.reshape(-1, features)
    if reduce and lanes.complete:
        return F.embedding_bag(index.view(-1, num_routes), rows, mode='sum').view(batch, len(steps), features)
    out = _pick(rows, index)
    if not lanes.complete:  # by a mask, not by a weight of zero: 0 * NaN would reach where no route goes
        out = out.masked_fill_((steps < 0).unsqueeze(-1), 0.0)
    return out.sum(2) if reduce else out


def _softplus(x: Tensor) -> Tensor:
    """softplus, small values too, to a few roundings; ``F.softplus`` takes ten times as long on a CPU at times."""
    e = x.clamp(max=30.0).mul_(1 / math.log(2)).exp2_()
    w = e + 1.0
    out = w.log()
    # log1p(e) = log(w) + (e - (w - 1)) / w restores what the rounding of 1 + e lost.
    out.addcdiv_(e.sub_(w - 1.0), w)
    return torch.maximum(out, x, out=out)


def _decay(delta: Tensor, a: Tensor, out: Tensor | None = None) -> Tensor:
    """exp(delta A); on a CPU torch's exp2 is four times faster than its exp."""
    return torch.mul(delta, a / math.log(2), out=out).exp2_()


def _carry(local: Tensor, decay: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
    """States that lanes inherit, from their own end states and total decays (all [B, K, M, D]), and the last states."""
    inherited = torch.zeros_like(local)
    lanes = [v.unflatten(2, (sequences, -1)).unbind(3) for v in (local, decay, inherited)]  # C times [B, K, S, D]
    end, total, start = lanes
    for c in range(1, len(end)):
        torch.addcmul(end[c - 1], total[c - 1], start[c - 1], out=start[c])
    return inherited, torch.addcmul(end[-1], total[-1], start[-1])


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
    inherited = torch.zeros_like(steps[0])
    lanes = (a[0] * steps[0], a[0] * product[0], inherited)  # what each lane hands to the one before it
    out, total, start = (v.unflatten(2, (sequences, -1)).unbind(3) for v in lanes)
    for c in range(len(out) - 2, -1, -1):
        torch.addcmul(out[c + 1], total[c + 1], start[c + 1], out=start[c])
    return g.addcmul_(later, inherited.unsqueeze(2))


def forward(inputs: ScanInputs, out: Tensor, last: Tensor) -> None:
    """Scan of :mod:`vmzoo_kernels.ops` into ``out`` ([B, L, D] summed over routes, or [B, L, K, D]) and ``last``."""
    inputs = inputs.in_dtype(compute_dtype(inputs.x.dtype))
    x, dt, B, C, A, D, dt_weight, dt_bias, gather, merge, complete, softplus = inputs
    lanes = _lanes(gather, merge, x.shape[1], complete)
    y = x.new_empty(x.shape[0], *lanes.gather.shape, x.shape[-1])
    for block in _blocks(y, lanes):
        delta, _, _ = block.step_sizes(dt, dt_weight, dt_bias, softplus)
        u, b, c = (block.read(v) for v in (x, B, C))
        y_block = y[block.batch, block.routes]
        if D is None:
            y_block.zero_()
        else:
            torch.mul(u, D[block.routes, None, None], out=y_block)
        delta_u = u.mul_(delta)
        for n in range(A.shape[-1]):
            final = n == A.shape[-1] - 1  # overwrite: memory that is new costs a CPU more than the arithmetic
            added = torch.mul(delta_u, b[..., n : n + 1], out=delta_u if final else None)
            decay = _decay(delta, A[block.routes, None, None, :, n], out=delta if final else None)
            h, _, end = _states(decay, added, lanes.num_sequences)
            last[block.batch, block.routes, ..., n] = end
            y_block.addcmul_(h, c[..., n : n + 1])
    out.copy_(_put_back(y, lanes.writer, lanes, reduce=out.ndim == 3))


def backward(dy: Tensor, inputs: ScanInputs) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, B, C, A, D, dt_weight and dt_bias in the compute dtype; None for those not given."""
    inputs = inputs.in_dtype(compute_dtype(inputs.x.dtype))
    x, dt, B, C, A, D, dt_weight, dt_bias, gather, merge, complete, softplus = inputs
    dy = dy.to(x.dtype)
    lanes = _lanes(gather, merge, x.shape[1], complete)
    in_lanes = (x.shape[0], *lanes.gather.shape)
    du, d_dt, db, dc = (x.new_empty(*in_lanes, v.shape[-1]) for v in (x, dt, B, C))
    dA, dD, d_weight, d_bias = (v if v is None else torch.zeros_like(v) for v in (A, D, dt_weight, dt_bias))
    for block in _blocks(du, lanes):
        here, k = (block.batch, block.routes), block.routes
        delta, raw, routed_dt = block.step_sizes(dt, dt_weight, dt_bias, softplus)
        u, b, c = (block.read(v) for v in (x, B, C))
        dy_block = block.written(dy)
        delta_u = delta * u
        d_delta, d_delta_u = torch.zeros_like(delta), torch.zeros_like(delta)
        for n in range(A.shape[-1]):
            a = A[k, None, None, :, n]
            bn, cn = b[..., n : n + 1], c[..., n : n + 1]
            decay = _decay(delta, a)
            h, inherited, _ = _states(decay.clone(), delta_u * bn, lanes.num_sequences)
            g = _adjoint_states(decay, dy_block * cn, lanes.num_sequences)
            dc[block.batch, k, ..., n] = (dy_block * h).sum(-1)
            db[block.batch, k, ..., n] = (g * delta_u).sum(-1)
            d_delta_u.addcmul_(g, bn)
            decayed = decay.mul_(g)  # g_t exp(delta_t A) h_{t-1}
            decayed[:, :, 1:].mul_(h[:, :, :-1])
            decayed[:, :, 0].mul_(inherited)
            d_delta.addcmul_(decayed, a)
            dA[k, :, n] += (decayed * delta).sum((0, 2, 3))

        torch.mul(d_delta_u, delta, out=du[here])
        d_delta.addcmul_(d_delta_u, u)
        if D is not None:
            du[here].addcmul_(dy_block, D[k, None, None])
            dD[k] += (dy_block * u).sum((0, 2, 3))
        if softplus:
            d_delta.mul_(torch.sigmoid(raw))
        if lanes.neutral is not None:
            d_delta.masked_fill_(lanes.neutral[k].unsqueeze(-1), 0.0)
        if dt_bias is not None:
            d_bias[k] += d_delta.sum((0, 2, 3))
        if dt_weight is None:
            d_dt[here] = d_delta
        else:
            flat = d_delta.flatten(2, 3)  # [B, K, T·M, D]
            d_weight[k] += (flat.mT @ routed_dt.flatten(2, 3)).sum(0)
            d_dt[here] = (flat @ dt_weight[k]).view_as(routed_dt)

    dx = _put_back(du, lanes.reader, lanes, reduce=x.ndim == 3)
    d_dt, db, dc = (_put_back(v, lanes.reader, lanes, reduce=False) for v in (d_dt, db, dc))
    return dx, d_dt, db, dc, dA, dD, d_weight, d_bias
