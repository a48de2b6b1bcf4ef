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
    if rank + 2 > 8 * _MAX_WORDS:
        return f'it takes dt_rank up to {8 * _MAX_WORDS - 2}, not {rank}'
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
    units_per_block: int
    num_segments: int
    segment_steps: int
    shared_sum: bool
    unit_bytes: int  # shared memory


@functools.lru_cache(maxsize=1024)
def _plan(device: torch.device, max_warps: int, batch_blocks: int, positions: int, steps: int, sums: bool) -> _Plan:
    limit, multiprocessors = _device(device)
    tiles = -(-steps // TILE)
    map_bytes = 64 * positions if sums else 0
    shared_sum = map_bytes + 64 * max_warps <= limit
    num_segments, segment_tiles = 1, tiles
    if not shared_sum:
        map_bytes = 0
        wanted = -(-4 * multiprocessors // batch_blocks)
        segment_tiles = max(4 * max_warps, -(-tiles // wanted))
        segment_tiles = min(tiles, -(-segment_tiles // max_warps) * max_warps)
        num_segments = -(-tiles // segment_tiles)
    # As many warps as the multiprocessor holds, of units whose tiles leave few of them idle.
    resident = max(1, min(max_warps, limit // (map_bytes + 1024)))
    best = None
    for warps in range(1, max_warps + 1):
        if warps > segment_tiles:
            break
        busy = max_warps // warps * warps if warps * resident >= max_warps else warps * resident
        enough = min(1.0, batch_blocks * num_segments * warps / (2 * multiprocessors * max_warps))
        score = busy / max_warps * enough * segment_tiles / (-(-segment_tiles // warps) * warps)
        if best is None or score > best[0] + 1e-6:
            best = (score, warps)
    warps = best[1]
    return _Plan(warps, max(1, 4 // warps), num_segments, segment_tiles * TILE, shared_sum, map_bytes + 64 * warps)


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
    torch.cat((dt, B, C), dim=-1, out=rows[..., :width]) if False else rows[..., :width].copy_(torch.cat((dt, B, C), -1))
    return rows


def _max_warps(d_state: int) -> int:
    return 12 if d_state == 1 else 8


_FORWARD = struct.Struct('14Q3q23i0q')


def forward(inputs: ScanInputs, out: Tensor, last: Tensor, states: Tensor) -> None:
    """Scan of :mod:`vmzoo_kernels.ops` into ``out``, ``last`` and, unless it is empty, ``states``."""
    x, dt, B, C, A, D, weight, bias, gather, merge, complete, _ = inputs
    num_routes, dim, d_state = A.shape
    rank = weight.shape[-1]
    if x.stride(-1) != 1 or any(s % 4 for s in x.stride()[:-1]) or x.data_ptr() % 8:
        x = x.contiguous()
    rows = _rows(dt, B, C)
    A, D, weight, bias = (_contiguous(v) for v in (A, D, weight, bias))
    batch, positions = x.shape[:2]
    steps, sequence = gather[0].numel(), gather.shape[2]
    gather, merge = gather.contiguous(), merge.contiguous()
    reduce = out.ndim == 3 and num_routes > 1
    same, shared_x = gather.data_ptr() == merge.data_ptr(), x.ndim == 3
    max_warps = _max_warps(d_state)
    blocks = dim // CHANNELS
    plan = _plan(x.device, max_warps, batch * blocks, positions, steps, reduce)
    if reduce and not plan.shared_sum:
        sums = out if out.dtype == torch.float32 else torch.empty(out.shape, dtype=torch.float32, device=out.device)
    else:
        sums = None
    defines = (
        ('IO', _TYPES[x.dtype]),
        ('OUT', _TYPES[out.dtype]),
        ('RANK', rank),
        ('D_STATE', d_state),
        ('WORDS', _words(rank + (2 if d_state == 1 else 0))),
        ('MAX_WARPS', max_warps),
        ('REDUCE', int(reduce)),
        ('SHARED_SUM', int(plan.shared_sum)),
        ('SAME_TABLE', int(same)),
        ('SKIP_ONCE', int(reduce and same and shared_x)),
        ('SEQUENCES', int(sequence != steps)),
        ('PADDED', int(not complete)),
    )
    x_strides = (x.stride(0), x.stride(1), 0) if shared_x else x.stride()[:3]
    y_strides = (out.stride(0), out.stride(1), 0) if out.ndim == 3 else out.stride()[:3]
    units = batch * blocks * plan.num_segments
    mirrored = plan.num_segments > 1 and _mirrored(num_routes)
    split = plan.num_segments > 1
    segment_states = segment_deltas = None
    if split:
        shape = (batch, num_routes, plan.num_segments, d_state, dim)
        segment_states = x.new_empty(shape, dtype=torch.float32)
        segment_deltas = x.new_empty((*shape[:3], dim), dtype=torch.float32)

    def launch(summary: bool, first: int, step: int, count: int, starts: bool, ends: bool) -> None:
        kernel = load(_SOURCES / 'scan_forward.cu', (*defines, ('SUMMARY', int(summary))), 'scan_forward', x.device)
        pointers = (x, rows, A, D, weight, bias, gather, merge, out, sums, states if states.numel() else None, last)
        params = _FORWARD.pack(
            *(_address(v) for v in (*pointers, segment_states, segment_deltas)),
            x_strides[0],
            rows.stride(0),
            y_strides[0],
            x_strides[1] * 2,
            rows.stride(1) * 2,
            y_strides[1] * out.element_size(),
            x_strides[2],
            rows.stride(2),
            y_strides[2],
            rows.shape[3],
            positions,
            steps,
            sequence,
            dim,
            num_routes,
            blocks,
            units,
            plan.warps,
            plan.segment_steps,
            plan.num_segments,
            first,
            step,
            count,
            int(mirrored),
            int(starts),
            int(ends),
        )
        unit_bytes = 128 * plan.warps if summary else plan.unit_bytes
        grid = -(-units // plan.units_per_block)
        kernel.launch((grid,), 32 * plan.warps * plan.units_per_block, unit_bytes * plan.units_per_block, params)

    if out.numel() == 0:
        last.zero_()
        return
    launch(False, 0, 1, num_routes, True, True)


def _mirrored(num_routes: int) -> bool:
    return num_routes % 2 == 0
