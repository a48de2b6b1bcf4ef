"""The ``cuda`` backend: CUDA C++ kernels, compiled at first use by NVRTC, for NVIDIA GPUs.

A warp walks a route of a batch item, a lane a channel (see ``cuda/scan.cuh``). Scans too few to fill the GPU are cut
into segments of their routes, which start from states that a first pass finds. Outputs of routes that are summed are
written apart and added by a second kernel.
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

TILE = 16  # steps; scan.cuh
CHANNELS = 32  # of a warp
_SOURCES = Path(__file__).parent / 'cuda'
_TYPES = {torch.float16: 'half_t', torch.bfloat16: 'bfloat_t', torch.float32: 'float'}
_MAX_COLUMNS = 128  # of dt, B and C
_MAX_WARPS = 4  # of a block
_MIN_SEGMENT = 8 * TILE
_SLOTS = 3

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
    if dim % 8:
        return f'it takes a multiple of 8 channels, not {dim}'
    if rank + 2 * d_state > _MAX_COLUMNS:
        return f'it takes dt_rank + 2 d_state up to {_MAX_COLUMNS}, not {rank + 2 * d_state}'
    return None


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


class _Kernel(NamedTuple):
    """What the parameters of a scan say of a kernel."""

    warp_bytes: int  # shared memory of a warp
    warps: int  # of a multiprocessor, which bounds the registers of a thread


def _warp_bytes(rank: int, d_state: int, slot_tiles: int, others: int, turned: bool) -> int:
    """Shared memory of a warp, as the kernels lay it out.

    Args:
        rank: R.
        d_state: N.
        slot_tiles: Bytes a channel and step of what is fetched as tiles.
        others: Further bytes.
        turned: Whether dt_weight is kept too, turned.
    """
    chunks = -(-(rank + 2 * d_state) // 8) | 1
    slot = TILE * (CHANNELS * slot_tiles + 16 * chunks)
    inputs = 8 * d_state * TILE
    weight = 8 * -(-rank // 8) * (CHANNELS // 8 + 1) * 16 if turned else 0
    return _SLOTS * slot + inputs + weight + others


def _forward_kernel(rank: int, d_state: int, out_bytes: int) -> _Kernel:
    states = 0 if d_state == 1 else 2 * 4 * 32 * d_state
    exchange = CHANNELS * TILE * 4
    size = _warp_bytes(rank, d_state, 2, exchange + TILE * CHANNELS * out_bytes + states, False)
    return _Kernel(size, 16)


def _backward_kernel(rank: int, d_state: int, dy_bytes: int) -> _Kernel:
    states = 0 if d_state == 1 else 3 * 4 * 32 * d_state
    products = max(CHANNELS * TILE * 4, 16 * (CHANNELS * (TILE // 8 + 1) + TILE * (CHANNELS // 4 + 1)))
    size = _warp_bytes(rank, d_state, 2 + dy_bytes, products + states, True)
    return _Kernel(size, 8)


class _Plan(NamedTuple):
    """How a scan is cut into warps."""

    items: int  # batch items of a warp, one after the other
    num_segments: int
    segment_steps: int
    parts: int  # warps of the same channels and route
    grid: int  # blocks
    warps: int  # of a block
    blocks: int  # of a multiprocessor


@functools.lru_cache(maxsize=1024)
def _plan(device: torch.device, kernel: _Kernel, batch: int, others: int, steps: int) -> _Plan:
    """A plan that fills the GPU.

    Args:
        device: Where it runs.
        kernel: That is to run.
        batch: Batch items.
        others: Blocks of channels, times routes.
        steps: Of a route.
    """
    limits = _device(device)
    block_warps = min(_MAX_WARPS, limits.block_bytes // kernel.warp_bytes)
    by_memory = limits.shared_bytes // (block_warps * kernel.warp_bytes + 1024)
    blocks = max(1, min(kernel.warps // block_warps, by_memory))
    capacity = block_warps * blocks * limits.multiprocessors
    warps = batch * others
    # A pass that finds states costs more than half of the scan: worth it where most of the GPU would be idle.
    num_segments = 1
    if 3 * warps < capacity:
        num_segments = max(1, min(capacity // warps, steps // _MIN_SEGMENT))
    segment_steps = -(-steps // (num_segments * TILE)) * TILE
    num_segments = -(-steps // segment_steps)
    items = max(1, -(-warps // capacity))
    parts = -(-batch // items) * num_segments
    return _Plan(items, num_segments, segment_steps, parts, -(-parts * others // block_warps), block_warps, blocks)


def _parameter(v: Tensor | None) -> Tensor | None:
    """float32, in one piece."""
    if v is None or (v.dtype == torch.float32 and v.is_contiguous()):
        return v
    return v.to(torch.float32).contiguous()


def _address(v: Tensor | None) -> int:
    return 0 if v is None else v.data_ptr()


def _is_aligned(v: Tensor) -> bool:
    """Whether rows of channels start at multiples of 16 bytes."""
    if v.data_ptr() % 16:
        return False
    size = v.element_size()
    if v.is_contiguous():
        return not v.shape[-1] * size % 16
    *strides, last = v.stride()
    return last == 1 and not any(stride * size % 16 for stride in strides)


def _aligned(v: Tensor) -> Tensor:
    return v if _is_aligned(v) else v.clone(memory_format=torch.contiguous_format)


def _rows(inputs: ScanInputs) -> Tensor:
    """Rows dt | B | C [B, L, K, >= R + 2N] of a multiple of 16 bytes, in the dtype of x."""
    rows = inputs.dt
    if inputs.B is None and rows.dtype == inputs.x.dtype and _is_aligned(rows):
        return rows
    width = inputs.dt_weight.shape[-1] + 2 * inputs.A.shape[-1]
    rows = inputs.x.new_zeros((*rows.shape[:3], -(-width // 8) * 8))
    parts = inputs.unpacked()
    rows[..., :width] = torch.cat((parts.dt, parts.B, parts.C), dim=-1)
    return rows


def _strides(shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> tuple[int, int, int]:
    """Over batch items (elements), positions (bytes) and routes (elements) of [B, L, D] or [B, L, K, D]."""
    return strides[0], strides[1] * size, strides[2] if len(shape) == 4 else 0


def _contiguous(*shape: int) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


class _Form(NamedTuple):
    """What decides how a scan runs, but for the addresses of its tensors."""

    device: torch.device
    dtype: torch.dtype  # of x
    x_shape: tuple[int, ...]
    x_strides: tuple[int, ...]
    rows_strides: tuple[int, ...]
    columns: int  # of the rows
    A_shape: tuple[int, ...]
    rank: int
    table_shape: tuple[int, ...]
    same_table: bool
    flow_dtype: torch.dtype  # of y, or dy
    flow_shape: tuple[int, ...]
    flow_strides: tuple[int, ...]


class _Scan:
    """The launches of a scan, forward or backward, and the parts of the parameters of its kernels that stay."""

    _pointers = struct.Struct('10Q')
    _sizes = struct.Struct('2q14i')
    _carry_params = struct.Struct('3Q5i4x')
    _sums_params = struct.Struct('9Qq7i4x')

    def __init__(self, form: _Form, name: str, flow: tuple[str, torch.dtype], kernel: _Kernel):
        self.form = form
        num_routes, self.dim, d_state = form.A_shape
        self.batch, self.positions = form.x_shape[:2]
        self.num_routes, self.d_state, self.rank = num_routes, d_state, form.rank
        sequences, sequence = form.table_shape[1:]
        steps = sequences * sequence
        self.blocks = -(-self.dim // CHANNELS)
        self.plan = plan = _plan(form.device, kernel, self.batch, self.blocks * num_routes, steps)
        self.constants = (('IO', _TYPES[form.dtype]), ('RANK', form.rank), ('D_STATE', d_state))
        defines = (
            *self.constants,
            ('WARPS', plan.warps),
            ('BLOCKS', plan.blocks),
            ('SAME_TABLE', int(form.same_table)),
            ('SEQUENCES', int(sequences > 1)),
            (flow[0], _TYPES[flow[1]]),
        )
        source = _SOURCES / f'{name}.cu'
        self._shared_bytes = plan.warps * kernel.warp_bytes
        self._scan = load(source, (*defines, ('SUMMARY', 0)), name, form.device)
        x_b, x_l, x_k = _strides(form.x_shape, form.x_strides, 2)
        rows_b, rows_l, rows_k = form.rows_strides[0], 2 * form.rows_strides[1], form.rows_strides[2]
        sizes = (self.positions, steps, sequence, self.dim, num_routes, self.batch, self.blocks)
        cuts = (plan.items, plan.segment_steps, plan.num_segments)
        self._tail = self._sizes.pack(x_b, rows_b, x_l, x_k, rows_l, rows_k, *sizes, *cuts)
        if plan.num_segments > 1:
            self._summary = load(source, (*defines, ('SUMMARY', 1)), name, form.device)
            self._carry = load(_SOURCES / 'scan_carry.cu', (('D_STATE', d_state),), 'scan_carry', form.device)

    def run(self, x: Tensor, rows: Tensor, parameters: list[Tensor], tables: tuple, rest: bytes, reverse: bool) -> None:
        """Launch the kernel, after one that finds the states at the starts of segments if there are several."""
        plan, segment_states, segment_deltas = self.plan, None, None
        if plan.num_segments > 1:
            shape = (self.batch, self.num_routes, plan.num_segments)
            segment_states = x.new_empty((*shape, self.d_state, self.dim), dtype=torch.float32)
            segment_deltas = x.new_empty((*shape, self.dim), dtype=torch.float32)
        addresses = map(_address, (x, rows, *parameters, *tables, segment_states, segment_deltas))
        params = self._pointers.pack(*addresses) + self._tail + rest
        launch = ((plan.grid,), 32 * plan.warps, self._shared_bytes, params)
        if plan.num_segments > 1:
            self._summary.launch(*launch)
            addresses = (parameters[0].data_ptr(), segment_states.data_ptr(), segment_deltas.data_ptr())
            sizes = (self.batch, self.num_routes, plan.num_segments, self.dim, reverse)
            states = self.batch * self.num_routes * self.d_state * self.dim
            self._carry.launch((-(-states // 128),), 128, 0, self._carry_params.pack(*addresses, *sizes))
        self._scan.launch(*launch)

    def load_sums(self, parts: torch.dtype, sums: torch.dtype) -> nvrtc.Kernel:
        defines = (*self.constants, ('FROM', _TYPES[parts]), ('TO', _TYPES[sums]))
        return load(_SOURCES / 'scan_sums.cu', defines, 'scan_sums', self.form.device)


class _Forward(_Scan):
    _rest = struct.Struct('3Q'), struct.Struct('q2i')

    def __init__(self, form: _Form):
        size = torch.finfo(form.flow_dtype).bits // 8
        super().__init__(
            form, 'scan_forward', ('OUT', form.flow_dtype), _forward_kernel(form.rank, form.A_shape[2], size)
        )
        self.sums = len(form.flow_shape) == 3 and self.num_routes > 1
        self._parts_shape = shape = (self.batch, self.positions, self.num_routes, self.dim)
        strides = _strides(form.flow_shape, form.flow_strides, size)
        if self.sums:
            strides = _strides(shape, _contiguous(*shape), size)
            self._sum = self.load_sums(form.flow_dtype, form.flow_dtype)
            rows = self.batch * self.positions
            self._sum_grid = (-(-rows * self.dim // 2048),)
            self._sum_tail = (*(0,) * 7, rows, self.num_routes, self.dim, 0, 0, 0, self._sum_grid[0], 0)
        self._strides = self._rest[1].pack(*strides)

    def __call__(self, x, rows, parameters, tables, out: Tensor, last: Tensor, states: Tensor) -> None:
        parts = out.new_empty(self._parts_shape) if self.sums else out
        rest = self._rest[0].pack(parts.data_ptr(), states.data_ptr() if states.numel() else 0, last.data_ptr())
        self.run(x, rows, parameters, tables, rest + self._strides, False)
        if self.sums:
            params = self._sums_params.pack(parts.data_ptr(), out.data_ptr(), *self._sum_tail)
            self._sum.launch(self._sum_grid, 256, 1024, params)


class _Backward(_Scan):
    _rest = struct.Struct('5Q'), struct.Struct('2q4i')

    def __init__(self, form: _Form):
        size = torch.finfo(form.flow_dtype).bits // 8
        d_state, rank = form.A_shape[2], form.rank
        super().__init__(form, 'scan_backward', ('DY', form.flow_dtype), _backward_kernel(rank, d_state, size))
        self.sums = len(form.x_shape) == 3 and self.num_routes > 1
        shape = (self.batch, self.positions, self.num_routes, self.dim)
        dx_strides = _contiguous(*(shape if self.sums else form.x_shape))
        dy_b, dy_l, dy_k = _strides(form.flow_shape, form.flow_strides, size)
        dx_b, dx_l, dx_k = _strides(shape if self.sums else form.x_shape, dx_strides, 2)
        self._strides = self._rest[1].pack(dy_b, dx_b, dy_l, dy_k, dx_l, dx_k)
        self._sum = self.load_sums(form.dtype, form.dtype)
        # What is summed afterwards lies in one piece of memory: parts of dx, of d_rows and of the parameters' gradients
        rows, columns = self.batch * self.positions, -(-rank // 2) * 2 + 2 * d_state
        size = self.num_routes * self.dim * (rank + d_state + 2)
        dx_bytes = 2 * math.prod(shape) if self.sums else 0
        rows_bytes = -(-2 * self.blocks * rows * self.num_routes * columns // 16) * 16
        self._offsets = (dx_bytes, dx_bytes + rows_bytes)
        self._memory = dx_bytes + rows_bytes + 4 * self.plan.parts * size
        routes_blocks = -(-rows * self.dim // 2048) if self.sums else 0
        threads = rows * self.num_routes * (columns // 2 + (form.columns - rank - 2 * d_state + 1) // 2)
        rows_blocks = -(-threads // 256)
        sizes = (self.num_routes, self.dim, self.blocks, form.columns, self.plan.parts, routes_blocks, rows_blocks)
        self._sum_tail = (rows, *sizes)
        self._sum_grid = (routes_blocks + rows_blocks + -(-size // 32),)

    def __call__(self, x, rows, parameters, tables, dy: Tensor, states: Tensor) -> tuple[Tensor, ...]:
        A, _, weight, _ = parameters
        dx, d_rows = x.new_empty(x.shape), x.new_empty(rows.shape)
        d_A, d_weight = torch.empty_like(A), torch.empty_like(weight)
        d_D, d_bias = (A.new_empty(A.shape[:2]) for _ in range(2))
        memory = torch.empty(self._memory, dtype=torch.uint8, device=x.device)
        dx_parts = memory.data_ptr()
        row_parts, param_parts = (dx_parts + offset for offset in self._offsets)
        to = dx_parts if self.sums else dx.data_ptr()
        rest = self._rest[0].pack(dy.data_ptr(), states.data_ptr(), to, row_parts, param_parts)
        self.run(x, rows, parameters, tables, rest + self._strides, True)
        addresses = (dx_parts, dx.data_ptr(), row_parts, d_rows.data_ptr(), param_parts)
        addresses += (d_weight.data_ptr(), d_A.data_ptr(), d_bias.data_ptr(), d_D.data_ptr())
        self._sum.launch(self._sum_grid, 256, 1024, self._sums_params.pack(*addresses, *self._sum_tail))
        return dx, d_rows, d_A, d_D, d_weight, d_bias


_forward = functools.lru_cache(maxsize=4096)(_Forward)
_backward = functools.lru_cache(maxsize=4096)(_Backward)


def _take(inputs: ScanInputs, flow: Tensor) -> tuple[_Form, tuple]:
    """The form of a scan, and its tensors as the kernels want them."""
    x, rows = _aligned(inputs.x), _rows(inputs)
    parameters = [_parameter(v) for v in inputs[4:8]]
    gather, merge = inputs.gather, inputs.merge
    same = gather is merge or gather.data_ptr() == merge.data_ptr()
    if not (gather.is_contiguous() and merge.is_contiguous()):
        gather, merge = gather.contiguous(), merge.contiguous()
    form = _Form(
        *(x.device, x.dtype, x.shape, x.stride(), rows.stride(), rows.shape[3]),
        *(parameters[0].shape, parameters[2].shape[2], gather.shape, same),
        *(flow.dtype, flow.shape, flow.stride()),
    )
    return form, (x, rows, parameters, (gather, merge))


def forward(inputs: ScanInputs, out: Tensor, last: Tensor, states: Tensor) -> None:
    """Scan of :mod:`vmzoo_kernels.ops` into ``out``, ``last`` and, unless it is empty, ``states``."""
    if out.numel() == 0:
        last.zero_()
        return
    form, tensors = _take(inputs, out)
    _forward(form)(*tensors, out, last, states)


def backward(dy: Tensor, inputs: ScanInputs, states: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, B, C, A, D, dt_weight and dt_bias; None for those not given."""
    if inputs.x.numel() == 0:
        return tuple(None if v is None else torch.zeros_like(v) for v in inputs[:8])
    dy = _aligned(dy)
    form, tensors = _take(inputs, dy)
    dx, d_rows, d_A, d_D, d_weight, d_bias = _backward(form)(*tensors, dy, states)
    d_dt, d_B, d_C = d_rows, None, None
    if inputs.B is not None:
        rank, d_state = form.rank, form.A_shape[2]
        d_dt, d_B, d_C = d_rows[..., : rank + 2 * d_state].split([rank, d_state, d_state], dim=-1)
    elif d_rows.shape[3] != inputs.dt.shape[3]:
        d_dt = d_rows[..., : inputs.dt.shape[3]]
    d_D, d_bias = (None if v is None else grad for v, grad in ((inputs.D, d_D), (inputs.dt_bias, d_bias)))
    return dx, d_dt, d_B, d_C, d_A, d_D, d_weight, d_bias
