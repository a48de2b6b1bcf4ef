"""The ``cuda`` backend: CUDA C++ kernels, compiled at first use by NVRTC, for NVIDIA GPUs.

They hold a tile of a route in the layout of the matrix unit, so that step sizes come from it, threads scan in registers
and warps hand the state on (see ``cuda/scan.cuh``). A unit (one batch item, 16 channels) works all routes in turn and
sums their outputs in shared memory where the map fits, so that x is read and y written about once. Longer maps are split
into segments, which start from states that a first pass finds, and summed in memory, a route and its reverse at a time.
"""

import functools
import math
import struct
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import nvrtc
from .common import ScanInputs

TILE = 56  # steps; scan.cuh
CHANNELS = 16
_SOURCES = Path(__file__).parent / 'cuda'
_TYPES = {torch.float16: 'half_t', torch.bfloat16: 'bfloat_t', torch.float32: 'float'}
_MAX_WORDS = 16  # 128 columns of dt, B and C

def load(*args):
    return nvrtc.load(*args)



def why_not(dtype: torch.dtype, dim: int, d_state: int, rank: int) -> str | None:
    """Why these kernels do not take a scan; None if they do."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f'it takes float16 and bfloat16, not {dtype}'
    if dim % CHANNELS:
        return f'it takes a multiple of {CHANNELS} channels, not {dim}'
    if not rank:
        return 'it takes low-rank step sizes'
    if _words(rank + 2 * d_state) > _MAX_WORDS:
        return f'it takes dt_rank + 2 d_state up to {8 * _MAX_WORDS}, not {rank + 2 * d_state}'
    return None


def _words(columns: int) -> int:
    """32-bit words that each of 4 lanes loads of a row."""
    words = -(-columns // 8)
    return words if words < 3 else -(-words // 4) * 4


def _staged_bytes(inputs: ScanInputs) -> int:
    """Shared memory of a warp for the rows of a tile."""
    return 16 * TILE * _words(inputs.dt_weight.shape[-1] + 2 * inputs.A.shape[-1])


class _Device(NamedTuple):
    shared_bytes: int  # of a block
    multiprocessors: int


@functools.cache
def _device(device: torch.device) -> _Device:
    if device.type != 'cuda':  # the emulator
        return _Device(232448, 4)
    properties = torch.cuda.get_device_properties(device)
    return _Device(properties.shared_memory_per_block_optin, properties.multi_processor_count)


class _Plan(NamedTuple):
    """How a scan is cut into blocks."""

    warps: int  # of a unit
    units: int  # of a block
    items: int  # batch items of a unit, one after the other
    num_segments: int
    segment_steps: int
    shared_sum: bool
    groups: int  # of batch items, a block each (and for every channel block and segment)
    shared_bytes: int  # of a block


@functools.lru_cache(maxsize=1024)
def _plan(
    device: torch.device,
    max_warps: int,
    batch: int,
    blocks: int,
    positions: int,
    steps: int,
    sums: bool,
    warp_bytes: int,
) -> _Plan:
    """A plan that fills the GPU.

    Args:
        device: Where it runs.
        max_warps: That a multiprocessor has registers for.
        batch: Batch items.
        blocks: Blocks of 16 channels.
        positions: L.
        steps: Of a route.
        sums: Routes are summed.
        warp_bytes: Shared memory of a warp.
    """
    limit, multiprocessors = _device(device)
    capacity = max_warps * multiprocessors
    tiles = -(-steps // TILE)
    map_bytes = 64 * positions if sums else 0
    shared_sum = map_bytes + warp_bytes * max_warps <= limit
    num_segments, segment_tiles = 1, tiles
    if not shared_sum:
        map_bytes = 0
        segment_tiles = max(4 * max_warps, -(-tiles * batch * blocks // (4 * multiprocessors)))
        segment_tiles = min(tiles, -(-segment_tiles // max_warps) * max_warps)
        num_segments = -(-tiles // segment_tiles)
    # As many warps as there are registers for, of units whose tiles leave few of them idle.
    best_score, warps = 0.0, 1
    for candidate in range(1, min(max_warps, segment_tiles) + 1):
        room = limit // (map_bytes + candidate * warp_bytes + 1024)
        resident = candidate * min(room, max_warps // candidate)
        filled = min(1.0, batch * blocks * num_segments * candidate / capacity)
        score = resident * filled * segment_tiles / (-(-segment_tiles // candidate) * candidate)
        if score > 1.01 * best_score:
            best_score, warps = score, candidate
    items = 1
    if warps == 1 and num_segments == 1:
        room = (limit - 8192) // max_warps - warp_bytes
        items = max(1, min(-(-batch * blocks // capacity), room // max(map_bytes, 1), 8))
    units = max(1, 4 // warps)
    shared_bytes = units * (items * map_bytes + warps * warp_bytes)
    groups = -(-batch // (units * items))
    return _Plan(warps, units, items, num_segments, segment_tiles * TILE, shared_sum, groups, shared_bytes)


def _contiguous(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.to(torch.float32).contiguous()


def _address(v: Tensor | None) -> int:
    return 0 if v is None else v.data_ptr()


def _rows(dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """dt | B | C [B, L, K, >= R + 2 N] with rows that start at multiples of 16 bytes."""
    rank, d_state = dt.shape[-1], B.shape[-1]
    width = rank + 2 * d_state
    together = (
        B.data_ptr() == dt.data_ptr() + 2 * rank
        and C.data_ptr() == B.data_ptr() + 2 * d_state
        and dt.stride() == B.stride() == C.stride()
    )
    batch_stride, row_stride, route_stride, last = dt.stride()
    aligned = not any(s % 8 for s in (batch_stride, row_stride, route_stride)) and dt.data_ptr() % 16 == 0 and last == 1
    if together and aligned:
        room = 8 * (-(-width // 8))
        return torch.as_strided(dt, (*dt.shape[:3], room), dt.stride(), dt.storage_offset())
    rows = dt.new_zeros((*dt.shape[:3], 8 * (-(-width // 8))))
    rows[..., :rank], rows[..., rank : rank + d_state], rows[..., rank + d_state : width] = dt, B, C
    return rows


_FORWARD = struct.Struct('14Q3q25i0q')
_BACKWARD = struct.Struct('16Q4q27i0q')


class _Scan:
    """What the forward and the backward launches share: inputs as the kernels want them, sizes, constants, the plan."""

    def __init__(self, inputs: ScanInputs, max_warps: int, sums: bool, warp_bytes: int):
        x, dt, B, C, A, D, weight, bias, gather, merge, complete, _ = inputs
        self.num_routes, self.dim, self.d_state = A.shape
        self.rank = weight.shape[-1]
        self.x = x = x if _aligned(x) else x.contiguous()
        self.rows = _rows(dt, B, C)
        self.A, self.D, self.weight, self.bias = (_contiguous(v) for v in (A, D, weight, bias))
        self.batch, self.positions = x.shape[:2]
        self.steps, self.sequence = gather[0].numel(), gather.shape[2]
        self.same = gather.data_ptr() == merge.data_ptr()
        self.gather, self.merge = gather.contiguous(), merge.contiguous()
        self.blocks = self.dim // CHANNELS
        self.plan = _plan(
            x.device, max_warps, self.batch, self.blocks, self.positions, self.steps, sums, warp_bytes
        )
        self.mirrored = False
        self.defines = (
            ('IO', _TYPES[x.dtype]),
            ('RANK', self.rank),
            ('D_STATE', self.d_state),
            ('WORDS', _words(self.rank + 2 * self.d_state)),
            ('MAX_WARPS', max_warps),
            ('SHARED_SUM', int(self.plan.shared_sum)),
            ('SAME_TABLE', int(self.same)),
            ('SEQUENCES', int(self.sequence != self.steps)),
            ('PADDED', int(not complete)),
        )
        self.segment_states = self.segment_deltas = None
        if self.plan.num_segments > 1:
            shape = (self.batch, self.num_routes, self.plan.num_segments, self.d_state, self.dim)
            self.segment_states = x.new_empty(shape, dtype=torch.float32)
            self.segment_deltas = x.new_empty((*shape[:3], self.plan.warps, self.dim), dtype=torch.float32)


def _aligned(v: Tensor) -> bool:
    """Whether four neighbouring channels can be loaded at once everywhere."""
    return v.stride(-1) == 1 and not any(s % 4 for s in v.stride()[:-1]) and not v.data_ptr() % (4 * v.element_size())


def _strides(v: Tensor) -> tuple[int, int, int]:
    """Over batch items (elements), positions (bytes) and routes (elements) of [B, L, D] or [B, L, K, D]."""
    return v.stride(0), v.stride(1) * v.element_size(), v.stride(2) if v.ndim == 4 else 0


def forward(inputs: ScanInputs, out: Tensor, last: Tensor, states: Tensor) -> None:
    """Scan of :mod:`vmzoo_kernels.ops` into ``out``, ``last`` and, unless it is empty, ``states``."""
    if out.numel() == 0:
        last.zero_()
        return
    d_state, num_routes = inputs.A.shape[-1], inputs.A.shape[0]
    reduce = out.ndim == 3 and num_routes > 1
    max_warps = _max_warps(d_state)
    scan = _Scan(inputs, max_warps, reduce, 64 * d_state + 16 + _staged_bytes(inputs))
    plan, x, rows = scan.plan, scan.x, scan.rows
    shared_x = x.ndim == 3
    sums = None
    if reduce and not plan.shared_sum:
        sums = out if out.dtype == torch.float32 else torch.empty(out.shape, dtype=torch.float32, device=out.device)
    defines = (
        *scan.defines,
        ('OUT', _TYPES[out.dtype]),
        ('REDUCE', int(reduce)),
        ('SKIP_ONCE', int(reduce and scan.same and shared_x)),
    )
    tensors = (
        *(x, rows, scan.A, scan.D, scan.weight, scan.bias, scan.gather, scan.merge, out, sums),
        *(states if states.numel() else None, last, scan.segment_states, scan.segment_deltas),
    )
    (x_b, x_l, x_k), (rows_b, rows_l, rows_k), (y_b, y_l, y_k) = _strides(x), _strides(rows), _strides(out)

    def launch(summary: bool, first: int, step: int, count: int, starts: bool, ends: bool) -> None:
        kernel = load(_SOURCES / 'scan_forward.cu', (*defines, ('SUMMARY', int(summary))), 'scan_forward', x.device)
        params = _FORWARD.pack(
            *(_address(v) for v in tensors),
            *(x_b, rows_b, y_b, x_l, rows_l, y_l, x_k, rows_k, y_k, rows.shape[3]),
            *(scan.positions, scan.steps, scan.sequence, scan.dim, num_routes),
            *(scan.batch, scan.blocks, plan.warps, plan.units, plan.items),
            *(plan.segment_steps, plan.num_segments, first, step, count, scan.mirrored, starts, ends),
        )
        grid = plan.groups * plan.num_segments * scan.blocks
        kernel.launch((grid,), 32 * plan.warps * plan.units, plan.shared_bytes, params)

    launch(False, 0, 1, num_routes, True, True)


_BACKWARD_WARPS = 8


def _max_warps(d_state: int) -> int:
    return 12 if d_state == 1 else 8


def backward(dy: Tensor, inputs: ScanInputs, states: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, B, C, A, D, dt_weight and dt_bias; None for those not given."""
    num_routes, dim, d_state = inputs.A.shape
    rank = inputs.dt_weight.shape[-1]
    sums_routes = inputs.x.ndim == 3 and num_routes > 1
    columns, width = rank + d_state + 2, rank + 2 * d_state
    scan = _Scan(inputs, _BACKWARD_WARPS, sums_routes, 64 * d_state + 16 + (64 * d_state if d_state > 1 else 0) + _staged_bytes(inputs))
    plan, x, rows, batch = scan.plan, scan.x, scan.rows, scan.batch
    shared_x = x.ndim == 3
    dy = dy if _aligned(dy) else dy.contiguous()
    dx = torch.empty_like(x)
    sums = None
    if sums_routes and not plan.shared_sum:
        sums = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    d_rows = x.new_empty((scan.blocks, batch, scan.positions, num_routes, width))
    if not inputs.complete:
        dx.zero_(), d_rows.zero_()
    parts = plan.groups * plan.num_segments * plan.units * plan.warps
    d_params = x.new_empty((parts, num_routes, dim, columns), dtype=torch.float32)
    skip_once = shared_x and scan.same and dy.ndim == 3
    defines = (
        *scan.defines,
        ('DY', _TYPES[dy.dtype]),
        ('SHARED_X', int(sums_routes)),
        ('SKIP_ONCE', int(skip_once and sums_routes)),
    )
    tensors = (
        *(dy, x, rows, scan.A, scan.D, scan.weight, scan.bias, scan.gather, scan.merge, states),
        *(dx, sums, d_rows, d_params, scan.segment_states, scan.segment_deltas),
    )
    (dy_b, dy_l, dy_k), (x_b, x_l, x_k) = _strides(dy), _strides(x)
    (rows_b, rows_l, rows_k), (dx_b, dx_l, dx_k) = _strides(rows), _strides(dx)

    def launch(summary: bool, first: int, step: int, count: int, starts: bool, ends: bool) -> None:
        kernel = load(_SOURCES / 'scan_backward.cu', (*defines, ('SUMMARY', int(summary))), 'scan_backward', x.device)
        params = _BACKWARD.pack(
            *(_address(v) for v in tensors),
            *(dy_b, x_b, rows_b, dx_b, dy_l, x_l, rows_l, dx_l, dy_k, x_k, rows_k, dx_k, rows.shape[3]),
            *(scan.positions, scan.steps, scan.sequence, dim, num_routes, batch, scan.blocks, plan.warps),
            *(plan.units, plan.items, plan.segment_steps, plan.num_segments, first, step, count),
            *(scan.mirrored, starts, ends),
        )
        grid = plan.groups * plan.num_segments * scan.blocks
        kernel.launch((grid,), 32 * plan.warps * plan.units, plan.shared_bytes, params)

    launch(False, 0, 1, num_routes, True, True)
    total = d_rows.sum(0, dtype=torch.float32)
    d_params = d_params.sum(0)
    d_weight, d_A, d_bias, d_D = d_params.split([rank, d_state, 1, 1], dim=-1)
    d_D = d_D[..., 0]
    if skip_once and sums_routes:  # the same for all routes, found with the last one
        d_D = d_D[-1:].expand(num_routes, -1)
    d_dt, d_B, d_C = total.split([rank, d_state, d_state], dim=-1)
    return (
        *(dx, d_dt, d_B, d_C, d_A),
        None if inputs.D is None else d_D,
        d_weight,
        None if inputs.dt_bias is None else d_bias[..., 0],
    )
