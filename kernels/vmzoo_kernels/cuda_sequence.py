"""The ``cuda`` backend along sequences: CUDA C++ kernels for the 1-D scan in mamba-ssm's layout [B, D, L].

Lanes of a warp lie along time and scan several steps in registers; a block works neighbouring channels, which share B
and C (see ``cuda/sequence.cuh``). Few long sequences are split into segments, which start from states that a first pass
finds.
"""

import functools
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import nvrtc

TILE = 64  # steps; sequence.cuh
_STEPS, _CHANNELS = 8, 4  # of a lane; of a warp
_MAX_STATE = 32
_MAX_WARPS = 8  # of a block
_TURN_STATES = 4  # sequence_backward.cu
_SOURCES = Path(__file__).parent / 'cuda'
_TYPES = {torch.float16: 'half_t', torch.bfloat16: 'bfloat_t', torch.float32: 'float'}

_CUT = 1.00034  # mean of a number over what is left of it in TF32

load = nvrtc.load


def why_not(dtypes: Sequence[torch.dtype], dim: int, groups: int, d_state: int) -> str | None:
    """Why these kernels do not take a scan; None if they do.

    Args:
        dtypes: Of u, delta, B and C.
        dim: D.
        groups: G.
        d_state: N.
    """
    for dtype in dtypes:
        if dtype not in _TYPES:
            return f'it takes float16, bfloat16 and float32, not {dtype}'
    if groups > 1 and dim < _CHANNELS * groups:
        return f'it takes groups of at least {_CHANNELS} channels, not {groups} groups of {dim} channels'
    if d_state > _MAX_STATE:
        return f'it takes d_state up to {_MAX_STATE}, not {d_state}'
    return None


def _exact(dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether the sums that are the gradients of B and C are exact to float32 rather than TF32."""
    return torch.float32 in dtypes


class _Device(NamedTuple):
    block_bytes: int  # shared memory that a block may have
    shared_bytes: int  # of a multiprocessor
    multiprocessors: int


@functools.cache
def _device(device: torch.device) -> _Device:
    if device.type != 'cuda':  # the emulator
        return _Device(232448, 233472, 4)
    properties = torch.cuda.get_device_properties(device)
    return _Device(
        properties.shared_memory_per_block_optin,
        properties.shared_memory_per_multiprocessor,
        properties.multi_processor_count,
    )


def _shared_bytes(warps: int, d_state: int, sizes: tuple[int, ...], backward: bool) -> int:
    """Shared memory of a block, for elements of u, delta, B and C of so many bytes."""
    u, delta, *projections = (512 * size // 2 for size in sizes)  # of a warp's tile
    bytes = 1024 * d_state + -(-d_state // 2) * max(projections)
    if backward:
        sums = 2 * min(d_state, _TURN_STATES) * 2 * 4 * TILE
        return bytes + warps * (3 * u + 2 * delta + sums + (2 * 8 * _CHANNELS + 4 * 32) * d_state)
    return bytes + warps * (u + delta + 8 * _CHANNELS * d_state)


class _Plan(NamedTuple):
    """How a scan is cut into blocks, and its kernels."""

    blocks: int  # of a group's channels
    num_segments: int
    segment_tiles: int
    grid: tuple[int]
    threads: int
    shared_bytes: int
    scan: nvrtc.Kernel
    segment_scans: tuple[nvrtc.Kernel, ...]  # what segments do to the state, the carry between them
    sums: tuple[nvrtc.Kernel, ...]  # over blocks, for the gradients of B and C and of the parameters


@functools.lru_cache(maxsize=1024)
def _plan(
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    batch: int,
    groups: int,
    channels: int,
    d_state: int,
    length: int,
    softplus: bool,
    backward: bool,
) -> _Plan:
    """A plan that fills the GPU.

    Args:
        device: Where it runs.
        dtypes: Of u, delta, B and C.
        batch: Batch items.
        groups: G.
        channels: Of a group.
        d_state: N.
        length: L.
        softplus: Of the step sizes.
        backward: The backward scan.
    """
    limits = _device(device)
    vector = length % _STEPS == 0
    # That a multiprocessor has registers for
    if backward:
        max_warps = 16 if vector and not _exact(dtypes[2:]) else 12
    else:
        max_warps = 24 if vector else 16
    sizes = tuple(dtype.itemsize for dtype in dtypes)
    needed, best = -(-channels // _CHANNELS), 0.0
    for most in range(_MAX_WARPS, 0, -1):
        blocks = -(-needed // most)
        candidate = -(-needed // blocks)
        bytes = _shared_bytes(candidate, d_state, sizes, backward)
        if bytes > limits.block_bytes:
            continue
        resident = candidate * min(limits.shared_bytes // (bytes + 1024), max_warps // candidate)
        score = resident * needed / (blocks * candidate)
        if score > 1.05 * best:
            best, warps, shared_bytes = score, candidate, bytes
    blocks = -(-needed // warps)

    tiles = -(-length // TILE)
    units = batch * groups * blocks
    num_segments = min(max_warps * limits.multiprocessors // (units * warps), tiles // 4)
    if num_segments < 3:  # a first pass would cost more than it gives
        num_segments = 1
    segment_tiles = -(-tiles // num_segments)
    num_segments = -(-tiles // segment_tiles)

    defines = [
        *zip(('IO', 'DELTA', 'B_IO', 'C_IO'), (_TYPES[dtype] for dtype in dtypes)),
        ('D_STATE', d_state),
        ('SOFTPLUS', int(softplus)),
        ('WARPS', warps),
        ('MAX_WARPS', max_warps),
        ('VECTOR', int(vector)),
    ]
    if backward:
        defines.append(('EXACT', int(_exact(dtypes[2:]))))
    name = 'sequence_backward' if backward else 'sequence_forward'

    def scan(summary: int):
        return load(_SOURCES / f'{name}.cu', (*defines, ('SUMMARY', summary)), name, device)

    segment_scans = sums = ()
    if num_segments > 1:
        carry = load(_SOURCES / 'sequence_carry.cu', (('D_STATE', d_state),), 'sequence_carry', device)
        segment_scans = (scan(1), carry)
    if backward:
        names = 'sum_projections', 'sum_sequence_params'
        sums = tuple(load(_SOURCES / 'sequence_sums.cu', tuple(defines[2:5]), name, device) for name in names)
    grid = (units * num_segments,)
    return _Plan(blocks, num_segments, segment_tiles, grid, 32 * warps, shared_bytes, scan(0), segment_scans, sums)


def _parameter(v: Tensor | None) -> Tensor | None:
    return v if v is None else v.to(torch.float32).contiguous()


def _address(v: Tensor | None) -> int:
    return 0 if v is None else v.data_ptr()


def _rows(v: Tensor) -> Tensor:
    """With rows in one piece each, which start at multiples of 16 bytes if lanes load so many at a time."""
    *strides, step = v.stride()
    vector = v.shape[-1] % _STEPS == 0
    if step == 1 and not (vector and (v.data_ptr() % 16 or any(s * v.element_size() % 16 for s in strides))):
        return v
    return v.clone(memory_format=torch.contiguous_format)


class _Scan:
    """What the forward and the backward launches share: inputs as the kernels want them, sizes, the plan."""

    def __init__(self, tensors: tuple[Tensor | None, ...], softplus: bool, backward: bool):
        flowing, parameters = tensors[:4], tensors[4:]
        self.flowing = u, _, B, _ = [_rows(v) for v in flowing]
        self.parameters = [_parameter(v) for v in parameters]
        self.batch, self.dim, self.length = u.shape
        self.groups, self.d_state = B.shape[1:3]
        self.plan = _plan(
            u.device,
            tuple(v.dtype for v in flowing),
            self.batch,
            self.groups,
            self.dim // self.groups,
            self.d_state,
            self.length,
            softplus,
            backward,
        )
        self.segments = (None, None)
        if self.plan.num_segments > 1:
            shape = (self.batch, self.plan.num_segments, self.dim)
            self.segments = (
                u.new_empty((*shape, self.d_state), dtype=torch.float32),
                u.new_empty(shape, dtype=torch.float32),
            )

    def run(self, pack: struct.Struct, addresses: list[int], strides: list[int], head: tuple[int, ...]) -> None:
        plan = self.plan
        sizes = (self.groups, self.dim, self.length, plan.blocks, plan.num_segments, plan.segment_tiles)
        segments = [_address(v) for v in self.segments]
        params = pack.pack(*addresses, *segments, *strides, *head, *sizes)
        if plan.segment_scans:
            summary, carry = plan.segment_scans
            summary.launch(plan.grid, plan.threads, plan.shared_bytes, params)
            sizes = (self.batch, plan.num_segments, self.dim, pack is _BACKWARD)
            states = self.batch * self.dim * self.d_state
            carry_params = _CARRY.pack(_address(self.parameters[0]), *segments, *sizes)
            carry.launch((-(-states // 128),), 128, 0, carry_params)
        plan.scan.launch(plan.grid, plan.threads, plan.shared_bytes, params)


def _strides(*tensors: Tensor) -> list[int]:
    """All but those of the steps."""
    return [stride for v in tensors for stride in v.stride()[:-1]]


_FORWARD = struct.Struct('12Q10q6i')
_BACKWARD = struct.Struct('15Q12q7i4x')
_CARRY = struct.Struct('3Q4i')
_SUM_PROJECTIONS = struct.Struct('3Qq2if4x')
_SUM_PARAMS = struct.Struct('4Q2i')


def forward(tensors: tuple[Tensor | None, ...], softplus: bool, y: Tensor, last: Tensor, states: Tensor) -> None:
    """Scan of ``vmzoo::sequence_scan`` into ``y``, ``last`` and, unless it is empty, ``states``.

    Args:
        tensors: u [B, D, L], delta [B, D, L], B and C [B, G, N, L], A [D, N], D [D] or None, bias [D] or None.
        softplus: Of the step sizes.
        y: [B, D, L], contiguous.
        last: [B, D, N], the last states.
        states: [B, tiles, D, N], at the start of each tile.
    """
    if y.numel() == 0:
        last.zero_()
        return
    scan = _Scan(tensors, softplus, False)
    outputs = (y, last, states if states.numel() else None)
    addresses = [_address(v) for v in (*scan.flowing, *scan.parameters, *outputs)]
    scan.run(_FORWARD, addresses, _strides(*scan.flowing), ())


def backward(
    dy: Tensor, tensors: tuple[Tensor | None, ...], states: Tensor, softplus: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of the ``tensors`` of :func:`forward`; None for those not given."""
    u, delta, B, C, _, D, bias = tensors
    batch, dim, length = u.shape
    groups, d_state = B.shape[1:3]
    grads = [v.new_empty(v.shape) for v in (u, delta, B, C)]
    d_A = u.new_empty((dim, d_state), dtype=torch.float32)
    d_D, d_bias = (u.new_empty((dim,), dtype=torch.float32) for _ in range(2))
    if u.numel() == 0:
        for v in (*grads, d_A, d_D, d_bias):
            v.zero_()
    else:
        dy = _rows(dy)
        scan = _Scan(tensors, softplus, True)
        plan = scan.plan
        rows, pitch = batch * groups * 2 * d_state, -(-length // TILE) * TILE
        d_projections = u.new_empty((plan.blocks, rows, pitch), dtype=torch.float32)
        d_params = u.new_empty((batch * plan.num_segments, dim, d_state + 2), dtype=torch.float32)
        outputs = (*grads[:2], d_projections, d_params)
        addresses = [_address(v) for v in (dy, *scan.flowing, *scan.parameters, states, *outputs)]
        scan.run(_BACKWARD, addresses, _strides(dy, *scan.flowing), (batch,))

        sum_projections, sum_params = plan.sums
        addresses = (_address(v) for v in (d_projections, *grads[2:]))
        scale = 1.0 if _exact((B.dtype, C.dtype)) else _CUT
        params = _SUM_PROJECTIONS.pack(*addresses, rows, plan.blocks, length, scale)
        sum_projections.launch((-(-rows * pitch // 512),), 256, 0, params)
        addresses = (_address(v) for v in (d_params, d_A, d_bias, d_D))
        params = _SUM_PARAMS.pack(*addresses, len(d_params), dim)
        sum_params.launch((-(-d_params[0].numel() // 32),), 256, 1024, params)
    return (*grads, d_A, None if D is None else d_D, None if bias is None else d_bias)
