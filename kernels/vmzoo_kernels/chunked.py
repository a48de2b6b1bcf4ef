"""The ``torch`` backend: a two-level scan in plain torch, on any device and in any float dtype.

The sequence is cut into chunks of about sqrt(T) steps. One vectorised pass runs all chunks side by side, a short pass
carries the state across them, and a last one adds what each chunk inherited. State is kept for one of the N state
channels at a time and recomputed in the backward pass, so nothing of size B·D·N·L is ever stored. Batch items and
routes are worked off in blocks that a CPU's caches hold.

Inside this file a tensor "in lanes" is [K, B, T, M, ...]: step ``t`` of every lane is contiguous, and the M = S·C lanes
are the C chunks of each of the S sequences of a route. Rows get back to their positions by ``embedding_bag``: a gather
that sums over routes on the way, in a fixed order.
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
_FORWARD_BLOCK = 2**21  # values of one tensor in lanes
_BACKWARD_BLOCK = 2**19  # which has four times as many tensors


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


def _lanes(gather: Tensor, merge: Tensor, num_positions: int, complete: bool, segment: int = 0) -> _Lanes:
    key = (num_positions, complete, segment, _version(gather), _version(merge))
    merge_ref, cached_key, cached = _CACHE.get(gather, (None, None, None))
    if cached_key == key and merge_ref() is merge:
        return cached
    steps = gather.shape[-1]
    length = max(1, math.isqrt(steps))
    if segment:  # lanes of whole segments
        length = min(-(-length // segment) * segment, steps)
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


def _range(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, device=like.device)


def _pick(rows: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows [R, F] at an index [...]: [..., F], in the contiguous ``out`` if given."""
    out = rows.new_empty(*index.shape, rows.shape[-1]) if out is None else out
    torch.index_select(rows, 0, index.reshape(-1), out=out.view(-1, rows.shape[-1]))
    return out


class _Block(NamedTuple):
    """Batch items and routes that are worked off together."""

    batch: slice
    routes: slice
    lanes: _Lanes

    def read(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """[B, L, F] or [B, L, K, F] in this block's lanes; zeros where nothing is read."""
        return self._in_lanes(x, self.lanes.gather, self.lanes.unread, out)

    def written(self, dy: Tensor) -> Tensor:
        """What arrives at the positions that this block's steps write."""
        return self._in_lanes(dy, self.lanes.merge, self.lanes.unwritten)

    def _in_lanes(self, x: Tensor, table: Tensor, absent: Tensor | None, out: Tensor | None = None) -> Tensor:
        x, index = x[self.batch], table[self.routes].unsqueeze(1)  # [K, 1, T, M]
        if x.ndim == 4:
            index = index * x.shape[2] + _range(x.shape[2], x)[self.routes].view(-1, 1, 1, 1)
        rows = x.reshape(-1, x.shape[-1])
        if len(x) > 1:
            index = index + (len(rows) // len(x) * _range(len(x), x)).view(-1, 1, 1)
        out = _pick(rows, index, out)
        return out if absent is None else out.masked_fill_(absent[self.routes, None, ..., None], 0.0)

    def parameter(self, v: Tensor) -> Tensor:
        """[K, D] against tensors in lanes."""
        return v[self.routes, None, None, None]

    def project(self, dt: Tensor, weight: Tensor | None, bias: Tensor | None, out: Tensor) -> Tensor:
        """Step sizes before the softplus, from dt in lanes, into ``out``."""
        if weight is None:
            return out.copy_(dt) if bias is None else torch.add(dt, self.parameter(bias), out=out)
        rows, weight = dt.flatten(1, 3), weight[self.routes].mT  # [K, B·T·M, R] and [K, R, D]
        if bias is None:
            torch.bmm(rows, weight, out=out.flatten(1, 3))
        else:
            torch.baddbmm(bias[self.routes].unsqueeze(1), rows, weight, out=out.flatten(1, 3))
        return out

    def rest(self, delta: Tensor) -> Tensor:
        """Step sizes with those past the end of a sequence set to zero, in place: they leave the state alone."""
        if self.lanes.neutral is None:
            return delta
        return delta.masked_fill_(self.lanes.neutral[self.routes, None, ..., None], 0.0)

    def put_back(self, y: Tensor, steps: Tensor, out: Tensor) -> None:
        """This block's [K, B, T, M, F], at the positions given by steps [L, K], into its part of ``out``.

        That is [B, L, F], to which routes are added one after the other, or [B, L, K, F].
        """
        reduce = out.ndim == 3
        steps = steps[:, self.routes]
        num_routes, items, features = y.shape[0], y.shape[1], y.shape[-1]
        starts = y.shape[2] * y.shape[3] * _range(num_routes * items, y).view(num_routes, items)
        index = steps.clamp(min=0) + starts.t().unsqueeze(1)  # [B, L, K]
        rows = y.reshape(-1, features)
        if reduce and self.lanes.complete:
            placed = F.embedding_bag(index.reshape(-1, num_routes), rows, mode='sum').view(items, len(steps), features)
        else:
            placed = _pick(rows, index)
            if not self.lanes.complete:  # by a mask, not by a weight of zero: 0 * NaN would reach where no route goes
                placed.masked_fill_((steps < 0).unsqueeze(-1), 0.0)
            placed = placed.sum(2) if reduce else placed
        if not reduce:
            out[self.batch, :, self.routes] = placed
        elif self.routes.start == 0:
            out[self.batch] = placed
        else:
            out[self.batch] += placed


def _evenly(total: int, most: int) -> int:
    """Size of the parts, of at most ``most``, that divide ``total`` most evenly."""
    return -(-total // -(-total // most))


def _blocks(x: Tensor, lanes: _Lanes, most: int) -> Iterator[_Block]:
    """All batch items [B, ...] and routes in blocks: on a CPU of at most so many values, elsewhere in one."""
    batch, num_routes = x.shape[0], lanes.gather.shape[0]
    if batch == 0:
        return
    items, routes = batch, num_routes
    if x.device.type == 'cpu':
        values = x.shape[-1] * lanes.gather[0].numel()  # of an item along a route
        items = _evenly(batch, max(1, most // (values * num_routes)))
        routes = num_routes if items > 1 else _evenly(num_routes, max(1, most // values))
    for b in range(0, batch, items):
        for k in range(0, num_routes, routes):
            yield _Block(slice(b, b + items), slice(k, k + routes), lanes)


def _decay(delta: Tensor, a: Tensor, out: Tensor | None = None) -> Tensor:
    """exp(delta A); on a CPU torch's exp2 is four times faster than its exp."""
    return torch.mul(delta, a / math.log(2), out=out).exp2_()


def _states(decay: Tensor, inputs: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
    """States of one state channel in lanes, from exp(delta A) and delta u B (both overwritten).

    Returns h_t, in the memory of ``inputs``, and each lane's last state [K, B, S, C, D], a part of it.
    """
    h, a = inputs.unbind(2), decay.unbind(2)
    for t in range(1, len(h)):
        h[t].addcmul_(a[t], h[t - 1])
        a[t].mul_(a[t - 1])
    inputs, decay = (v.unflatten(3, (sequences, -1)) for v in (inputs, decay))  # [K, B, T, S, C, D]
    end, total = inputs[:, :, -1].unbind(3), decay[:, :, -1].unbind(3)
    for c in range(1, len(end)):
        end[c].addcmul_(total[c], end[c - 1])
    inputs[:, :, :-1, :, 1:].addcmul_(decay[:, :, :-1, :, 1:], inputs[:, :, -1:, :, :-1])
    return inputs.flatten(3, 4), inputs[:, :, -1]


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


def _later_steps(decay: Tensor, inputs: Tensor, segment: int) -> Tensor:
    """What the later steps of a segment add to each state in lanes: r_t = decay_t (r_{t+1} + inputs_{t+1})."""
    later = torch.zeros_like(inputs)
    r, a, added = later.unbind(2), decay.unbind(2), inputs.unbind(2)
    for t in range(len(r) - 2, -1, -1):
        if (t + 1) % segment:
            torch.add(r[t + 1], added[t + 1], out=r[t]).mul_(a[t])
    return later


def _earlier_steps(decay: Tensor, g: Tensor, segment: int) -> Tensor:
    """Its adjoint in lanes: e_t = decay_{t-1} (e_{t-1} + g_{t-1}) within a segment."""
    earlier = torch.zeros_like(g)
    e, a, given = earlier.unbind(2), decay.unbind(2), g.unbind(2)
    for t in range(1, len(e)):
        if t % segment:
            torch.add(e[t - 1], given[t - 1], out=e[t]).mul_(a[t - 1])
    return earlier


def _factors(inputs: ScanInputs) -> tuple[Tensor, list[int]]:
    """dt, B and C side by side [B, L, K, R + 2N], to be read at once, and their widths."""
    apart = inputs.unpacked()
    widths = [v.shape[-1] for v in (apart.dt, apart.B, apart.C)]
    if inputs.B is None:
        return inputs.dt[..., : sum(widths)], widths
    return torch.cat((inputs.dt, inputs.B, inputs.C), -1), widths


def forward(inputs: ScanInputs, out: Tensor, last: Tensor) -> None:
    """Scan of :mod:`vmzoo_kernels.ops` into ``out`` ([B, L, D] summed over routes, or [B, L, K, D]) and ``last``."""
    inputs = inputs.in_dtype(compute_dtype(inputs.x.dtype))
    x, _, _, _, A, D, dt_weight, dt_bias, gather, merge, complete, softplus, segment = inputs
    lanes = _lanes(gather, merge, x.shape[1], complete, segment)
    factors, widths = _factors(inputs)
    result = out if out.dtype == x.dtype else torch.empty_like(out, dtype=x.dtype)
    last_state = A.shape[-1] - 1
    for block in _blocks(x, lanes, _FORWARD_BLOCK):
        dt, b, c = block.read(factors).split(widths, -1)
        # In one piece: the larger what is freed, the more of it malloc keeps, and new pages cost more than arithmetic.
        u, delta, y, *spare = x.new_empty(5 if last_state else 3, *dt.shape[:-1], x.shape[-1])
        block.read(x, out=u)
        block.project(dt, dt_weight, dt_bias, out=delta)
        if softplus:
            torch.ops.aten.softplus.out(delta, out=delta)
        block.rest(delta)
        if D is None:
            y.zero_()
        else:
            torch.mul(u, block.parameter(D), out=y)
        delta_u = u.mul_(delta)
        for n in range(last_state + 1):
            added, decay = spare if n < last_state else (delta_u, delta)
            torch.mul(delta_u, b[..., n : n + 1], out=added)
            _decay(delta, block.parameter(A[..., n]), out=decay)
            if segment:
                y.addcmul_(_later_steps(decay, added, segment), c[..., n : n + 1])
            h, ends = _states(decay, added, lanes.num_sequences)
            last[block.batch, block.routes, ..., n] = ends[:, :, :, -1].transpose(0, 1)
            y.addcmul_(h, c[..., n : n + 1])
        block.put_back(y, lanes.writer, result)
    if result is not out:
        out.copy_(result)


def backward(dy: Tensor, inputs: ScanInputs) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, B, C, A, D, dt_weight and dt_bias in the compute dtype; None for those not given."""
    inputs = inputs.in_dtype(compute_dtype(inputs.x.dtype))
    x, _, _, _, A, D, dt_weight, dt_bias, gather, merge, complete, softplus, segment = inputs
    dy = dy.to(x.dtype)
    lanes = _lanes(gather, merge, x.shape[1], complete, segment)
    factors, widths = _factors(inputs)
    dx, d_factors = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, factors))
    dA, dD, d_weight, d_bias = (v if v is None else torch.zeros_like(v) for v in (A, D, dt_weight, dt_bias))
    for block in _blocks(x, lanes, _BACKWARD_BLOCK):
        k = block.routes
        routed = block.read(factors)
        routed_dt, b, c = routed.split(widths, -1)
        d_routed = torch.empty_like(routed)
        d_dt, db, dc = d_routed.split(widths, -1)
        u = block.read(x)
        raw = block.project(routed_dt, dt_weight, dt_bias, out=u.new_empty(u.shape))
        delta = block.rest(F.softplus(raw) if softplus else raw)
        dy_block = block.written(dy)
        delta_u = delta * u
        d_delta, d_delta_u = torch.zeros_like(delta), torch.zeros_like(delta)
        for n in range(A.shape[-1]):
            a = block.parameter(A[..., n])
            bn, cn = b[..., n : n + 1], c[..., n : n + 1]
            decay = _decay(delta, a)
            added, g = delta_u * bn, dy_block * cn
            if segment:
                later, earlier = _later_steps(decay, added, segment), _earlier_steps(decay, g, segment)
                dc_local = (dy_block * later).sum(-1)
                db_local = (earlier * delta_u).sum(-1)
                d_delta_u.addcmul_(earlier, bn)
                decayed_local = later.mul_(earlier.add_(g))
            h, ends = _states(decay.clone(), added, lanes.num_sequences)
            g = _adjoint_states(decay, g, lanes.num_sequences)
            dc[..., n] = (dy_block * h).sum(-1)
            db[..., n] = (g * delta_u).sum(-1)
            d_delta_u.addcmul_(g, bn)
            decayed = decay.mul_(g)  # g_t exp(delta_t A) h_{t-1}
            decayed[:, :, 1:].mul_(h[:, :, :-1])
            first = decayed[:, :, 0].unflatten(2, (lanes.num_sequences, -1))
            first[:, :, :, 1:].mul_(ends[:, :, :, :-1])
            first[:, :, :, 0].zero_()
            if segment:
                dc[..., n] += dc_local
                db[..., n] += db_local
                decayed += decayed_local
            d_delta.addcmul_(decayed, a)
            dA[k, :, n] += (decayed * delta).sum((1, 2, 3))

        du = d_delta_u * delta
        d_delta.addcmul_(d_delta_u, u)
        if D is not None:
            du.addcmul_(dy_block, block.parameter(D))
            dD[k] += (dy_block * u).sum((1, 2, 3))
        if softplus:
            d_delta.mul_(torch.sigmoid(raw))
        block.rest(d_delta)
        if dt_bias is not None:
            d_bias[k] += d_delta.sum((1, 2, 3))
        if dt_weight is None:
            d_dt.copy_(d_delta)
        else:
            flat = d_delta.flatten(1, 3)  # [K, B·T·M, D]
            d_weight[k] += flat.mT @ routed_dt.flatten(1, 3)
            d_dt.copy_((flat @ dt_weight[k]).view_as(d_dt))
        block.put_back(du, lanes.reader, dx)
        block.put_back(d_routed, lanes.reader, d_factors)

    return dx, *d_factors.split(widths, -1), dA, dD, d_weight, d_bias
