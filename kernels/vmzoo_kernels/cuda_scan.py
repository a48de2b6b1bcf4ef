"""The ``cuda`` backend: CUDA C++ kernels, compiled at first use by NVRTC, for NVIDIA GPUs.

They hold a tile of a route in the layout of the matrix unit, so that step sizes come from it, threads scan in registers
and warps hand the state on (see ``cuda/scan.cuh``). A unit (one batch item, 16 channels) works all routes in turn and
sums their outputs in shared memory where the map fits, so that x is read and y written about once. Longer maps are
split into segments, which start from states that a first pass finds, and summed in memory, a route and its reverse at a
time.
"""

import functools
import struct
from collections.abc import Callable
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

load = nvrtc.load


def why_not(
    dtype: torch.dtype, out_dtype: torch.dtype, dim: int, d_state: int, rank: int, complete: bool
) -> str | None:
    """Why these kernels do not take a scan; None if they do."""
    if not complete:
        return 'it takes routes that visit every position once'
    if dtype not in (torch.float16, torch.bfloat16):
        return f'it takes float16 and bfloat16, not {dtype}'
    if out_dtype not in _TYPES:
        return f'it returns float16, bfloat16 and float32, not {out_dtype}'
    if dim % CHANNELS:
        return f'it takes a multiple of {CHANNELS} channels, not {dim}'
    if _words(rank + 2 * d_state) > _MAX_WORDS:
        return f'it takes dt_rank + 2 d_state up to {8 * _MAX_WORDS}, not {rank + 2 * d_state}'
    return None


def _words(columns: int) -> int:
    """32-bit words that each of 4 lanes loads of a row."""
    words = -(-columns // 8)
    return words if words < 3 else -(-words // 4) * 4


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


def _segments(device: torch.device, pairs: int, positions: int, steps: int) -> tuple[int, int]:
    """Number of segments and tiles of each, the same for the forward and the backward scan.

    Maps that fit shared memory are not cut; of the others, every multiprocessor gets a few segments.
    """
    limit, multiprocessors = _device(device)
    tiles = -(-steps // TILE)
    if 64 * positions + 26 * 1024 <= limit:
        return 1, tiles
    segment_tiles = max(48, -(-tiles * pairs // (4 * multiprocessors)))
    segment_tiles = min(tiles, -(-segment_tiles // 24) * 24)  # whole turns of 8 or 12 warps
    return -(-tiles // segment_tiles), segment_tiles


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
    num_segments, segment_tiles = _segments(device, batch * blocks, positions, steps)
    map_bytes = 64 * positions if sums else 0
    shared_sum = num_segments == 1 and map_bytes + warp_bytes * max_warps <= limit
    map_bytes = map_bytes if shared_sum else 0
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
        most = max(1, min(room // max(map_bytes, 1), 8))
        # Of several numbers that take as long, the largest, which loads parameters least often.
        items = min(range(1, most + 1), key=lambda n: (-(-batch * blocks // (n * capacity)) * n, -n))
    units = max(1, 4 // warps)
    shared_bytes = units * (items * map_bytes + warps * warp_bytes)
    groups = -(-batch // (units * items))
    return _Plan(warps, units, items, num_segments, segment_tiles * TILE, shared_sum, groups, shared_bytes)


def _parameter(v: Tensor | None) -> Tensor | None:
    """float32, one piece, at a multiple of 16 bytes."""
    if v is None:
        return None
    v = v.to(torch.float32).contiguous()
    return v.clone() if v.data_ptr() % 16 else v


def _address(v: Tensor | None) -> int:
    return 0 if v is None else v.data_ptr()


def _aligned(v: Tensor, bytes: int) -> bool:
    """Whether every row of channels starts at a multiple of so many bytes."""
    size = v.element_size()
    return v.stride(-1) == 1 and not any(s * size % bytes for s in v.stride()[:-1]) and not v.data_ptr() % bytes


def _rows(inputs: ScanInputs) -> Tensor:
    """Rows dt | B | C [B, L, K, >= R + 2N] of a multiple of 16 bytes, in the dtype of x."""
    width = inputs.dt_weight.shape[-1] + 2 * inputs.A.shape[-1]
    if inputs.B is None and inputs.dt.dtype == inputs.x.dtype and _aligned(inputs.dt, 16):
        return inputs.dt
    rows = inputs.x.new_zeros((*inputs.dt.shape[:3], -(-width // 8) * 8))
    parts = inputs.unpacked()
    rows[..., :width] = torch.cat((parts.dt, parts.B, parts.C), dim=-1)
    return rows


def _strides(v: Tensor) -> tuple[int, int, int]:
    """Over batch items (elements), positions (bytes) and routes (elements) of [B, L, D] or [B, L, K, D]."""
    return v.stride(0), v.stride(1) * v.element_size(), v.stride(2) if v.ndim == 4 else 0


class _Scan:
    """What the forward and the backward launches share: inputs as the kernels want them, sizes, constants, the plan."""

    def __init__(self, inputs: ScanInputs, max_warps: int, sums: bool, warp_bytes: int):
        x = inputs.x
        self.num_routes, self.dim, self.d_state = inputs.A.shape
        self.rank = inputs.dt_weight.shape[-1]
        self.x = x = x if _aligned(x, 8) else x.contiguous()
        self.rows = rows = _rows(inputs)
        self.A, self.D, self.weight, self.bias = (_parameter(v) for v in inputs[4:8])
        self.batch, self.positions = x.shape[:2]
        self.same = inputs.gather.data_ptr() == inputs.merge.data_ptr()
        self.gather, self.merge = inputs.gather.contiguous(), inputs.merge.contiguous()
        steps, sequence = self.gather[0].numel(), self.gather.shape[2]
        self.blocks = self.dim // CHANNELS
        words = _words(self.rank + 2 * self.d_state)
        self.plan = plan = _plan(
            x.device, max_warps, self.batch, self.blocks, self.positions, steps, sums, warp_bytes + 16 * TILE * words
        )
        self.grid = (plan.groups * plan.num_segments * self.blocks,)
        self.mirrored = inputs.mirrored and plan.num_segments > 1
        self.defines = (
            ('IO', _TYPES[x.dtype]),
            ('RANK', self.rank),
            ('D_STATE', self.d_state),
            ('WORDS', words),
            ('MAX_WARPS', max_warps),
            ('SHARED_SUM', int(plan.shared_sum)),
            ('SAME_TABLE', int(self.same)),
            ('SEQUENCES', int(sequence != steps)),
        )
        self.sizes = (rows.shape[3], self.positions, steps, sequence, self.dim, self.num_routes, self.batch)
        self.sizes += (self.blocks, plan.warps, plan.units, plan.items, plan.segment_steps, plan.num_segments)
        self.segment_states = self.segment_deltas = None
        if plan.num_segments > 1:
            shape = (self.batch, self.num_routes, plan.num_segments)
            self.segment_states = x.new_empty((*shape, self.d_state, self.dim), dtype=torch.float32)
            self.segment_deltas = x.new_empty((*shape, plan.warps, self.dim), dtype=torch.float32)

    def run(self, kernel: str, defines: tuple, params: Callable[..., bytes], sums: bool, reverse: bool) -> None:
        """Launch a kernel for all routes: at once, or (long maps) first for what segments do to the state."""
        path, plan, device = _SOURCES / f'{kernel}.cu', self.plan, self.x.device

        def launch(summary: bool, *routes: int) -> None:
            function = load(path, (*self.defines, *defines, ('SUMMARY', int(summary))), kernel, device)
            function.launch(self.grid, 32 * plan.warps * plan.units, plan.shared_bytes, params(*routes))

        # first route, distance to the next and their number; mirrored; whether the sum over routes begins and ends here
        if plan.num_segments == 1:
            launch(False, 0, 1, self.num_routes, False, True, True)
            return
        half = self.num_routes // 2
        if self.mirrored:
            launches = [(k, half, 2, True, k == 0, k == half - 1) for k in range(half)]
        elif sums:  # another segment may be adding to the same positions: one route at a time
            launches = [(k, 1, 1, False, k == 0, k == self.num_routes - 1) for k in range(self.num_routes)]
        else:
            launches = [(0, 1, self.num_routes, False, True, True)]
        for routes in launches:
            launch(True, *routes)
        carry = load(_SOURCES / 'scan_carry.cu', (('D_STATE', self.d_state),), 'scan_carry', device)
        addresses = (_address(v) for v in (self.A, self.segment_states, self.segment_deltas))
        sizes = (self.batch, self.num_routes, plan.num_segments, plan.warps, self.dim, reverse)
        states = self.batch * self.num_routes * self.d_state * self.dim
        carry.launch((-(-states // 128),), 128, 0, _CARRY.pack(*addresses, *sizes))
        for routes in launches:
            launch(False, *routes)


_FORWARD = struct.Struct('14Q3q25i0q')
_BACKWARD = struct.Struct('16Q4q27i0q')
_CARRY = struct.Struct('3Q6i')
_SUM_ROWS = struct.Struct('2Qq2i')
_SUM_PARAMS = struct.Struct('5Q4i')


def _forward_warps(d_state: int) -> int:
    """Warps of a multiprocessor: as many as there are registers for."""
    return 12 if d_state == 1 else 8


_BACKWARD_WARPS = 8


def forward(inputs: ScanInputs, out: Tensor, last: Tensor, states: Tensor) -> None:
    """Scan of :mod:`vmzoo_kernels.ops` into ``out``, ``last`` and, unless it is empty, ``states``."""
    if out.numel() == 0:
        last.zero_()
        return
    num_routes, _, d_state = inputs.A.shape
    reduce = out.ndim == 3 and num_routes > 1
    scan = _Scan(inputs, _forward_warps(d_state), reduce, 72 * d_state + 16)
    x, rows = scan.x, scan.rows
    sums = None
    if reduce and not scan.plan.shared_sum:
        sums = out if out.dtype == torch.float32 else torch.empty(out.shape, dtype=torch.float32, device=out.device)
    defines = (
        ('OUT', _TYPES[out.dtype]),
        ('REDUCE', int(reduce)),
        ('SKIP_ONCE', int(reduce and scan.same and x.ndim == 3)),
    )
    tensors = (
        *(x, rows, scan.A, scan.D, scan.weight, scan.bias, scan.gather, scan.merge, out, sums),
        *(states if states.numel() else None, last, scan.segment_states, scan.segment_deltas),
    )
    (x_b, x_l, x_k), (rows_b, rows_l, rows_k), (y_b, y_l, y_k) = _strides(x), _strides(rows), _strides(out)
    head = (*(_address(v) for v in tensors), x_b, rows_b, y_b, x_l, rows_l, y_l, x_k, rows_k, y_k, *scan.sizes)
    scan.run('scan_forward', defines, lambda *routes: _FORWARD.pack(*head, *routes), reduce, False)


def backward(dy: Tensor, inputs: ScanInputs, states: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, B, C, A, D, dt_weight and dt_bias; None for those not given."""
    num_routes, dim, d_state = inputs.A.shape
    sums_routes = inputs.x.ndim == 3 and num_routes > 1
    rank = inputs.dt_weight.shape[-1]
    constant_bytes = 128 * (2 * _words(rank + 2 * d_state) + 8 + 2 * -(-rank // 8))
    kept_bytes = 8 * TILE * d_state if d_state > 1 else 0
    scan = _Scan(inputs, _BACKWARD_WARPS, sums_routes, constant_bytes + kept_bytes + 80 * d_state + 16)
    plan, x, rows = scan.plan, scan.x, scan.rows
    dy = dy if _aligned(dy, 4 * dy.element_size()) else dy.contiguous()
    dx = x.new_empty(x.shape)
    d_rows = x.new_empty(rows.shape)
    d_A, d_weight = x.new_empty(scan.A.shape, dtype=torch.float32), x.new_empty(scan.weight.shape, dtype=torch.float32)
    d_D, d_bias = (x.new_empty((num_routes, dim), dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        for v in (d_A, d_weight, d_D, d_bias):
            v.zero_()
    else:
        sums = None
        if sums_routes and not plan.shared_sum:
            sums = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        parts = x.new_empty((scan.blocks, *x.shape[:2], num_routes, rank + 2 * d_state))
        num_params = plan.groups * plan.num_segments * plan.units * plan.warps
        d_params = x.new_empty((num_params, num_routes, dim, rank + d_state + 2), dtype=torch.float32)
        skip_once = sums_routes and scan.same
        defines = (
            ('DY', _TYPES[dy.dtype]),
            ('SHARED_X', int(sums_routes)),
            ('SKIP_ONCE', int(skip_once)),
        )
        tensors = (
            *(dy, x, rows, scan.A, scan.D, scan.weight, scan.bias, scan.gather, scan.merge, states),
            *(dx, sums, parts, d_params, scan.segment_states, scan.segment_deltas),
        )
        (dy_b, dy_l, dy_k), (x_b, x_l, x_k) = _strides(dy), _strides(x)
        (rows_b, rows_l, rows_k), (dx_b, dx_l, dx_k) = _strides(rows), _strides(dx)
        strides = (dy_b, x_b, rows_b, dx_b, dy_l, x_l, rows_l, dx_l, dy_k, x_k, rows_k, dx_k)
        head = (*(_address(v) for v in tensors), *strides, *scan.sizes)
        scan.run('scan_backward', defines, lambda *routes: _BACKWARD.pack(*head, *routes), sums_routes, True)

        constants = tuple(pair for pair in scan.defines if pair[0] in ('IO', 'RANK', 'D_STATE'))
        num_rows = rows[..., 0].numel()
        kernel = load(_SOURCES / 'scan_sums.cu', constants, 'sum_rows', x.device)
        params = _SUM_ROWS.pack(_address(parts), _address(d_rows), num_rows, scan.blocks, d_rows.shape[3])
        kernel.launch((-(-num_rows * -(-d_rows.shape[3] // 2) // 256),), 256, 0, params)
        kernel = load(_SOURCES / 'scan_sums.cu', constants, 'sum_params', x.device)
        addresses = (_address(v) for v in (d_params, d_weight, d_A, d_bias, d_D))
        params = _SUM_PARAMS.pack(*addresses, num_params, num_routes, dim, skip_once)
        kernel.launch((-(-d_params[0].numel() // 32),), 256, 1024, params)
    grads = (d_rows[..., : inputs.dt.shape[-1]], None, None)
    if inputs.B is not None:
        grads = d_rows[..., : rank + 2 * d_state].split([rank, d_state, d_state], dim=-1)
    return (dx, *grads, d_A, None if inputs.D is None else d_D, d_weight, None if inputs.dt_bias is None else d_bias)
