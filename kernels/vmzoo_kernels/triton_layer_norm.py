"""The Triton kernels of :mod:`vmzoo_kernels.layer_norm`: every byte moves once, whatever the dtypes.

A program takes whole rows, so the statistics need one read. The backward pass keeps as many programs as fill the GPU;
each walks over the rows and writes one partial sum of the parameters' gradients, and a second kernel adds those up:
there are no atomics, so results are reproducible.

Names as in :mod:`vmzoo_kernels.triton_scan`; tiles are [M, C].
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backends import interpreted


@triton.jit
def _tile(i_tile, rows, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr):
    """A tile's first row, its rows and their mask, and its elements' offsets from the first row and their mask.

    A thread holds at most VEC neighbouring channels.
    """
    i_m = tl.cast(i_tile, tl.int64) * BLOCK_M
    o_m = tl.arange(0, BLOCK_M)
    o_c = tl.arange(0, BLOCK_C)
    b_in_m = o_m < rows - i_m
    o_mc = tl.max_contiguous(o_m[:, None] * C + o_c[None, :], [1, VEC])
    return i_m, o_m, b_in_m, o_mc, b_in_m[:, None] & (o_c < C)[None, :]


@triton.jit(do_not_specialize=['rows'])
def _forward_kernel(
    x,
    branch,
    weight,
    bias,
    total,
    y,
    stats,
    rows,
    eps,
    C: tl.constexpr,
    CENTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y; mean and reciprocal deviation [2, M] too unless ``stats`` is None. Without CENTER the mean counts as zero.

    Unless ``branch`` is None, y is the norm of x + branch, which goes into ``total``.
    """
    i_m, o_m, b_in_m, o_mc, b_in = _tile(tl.program_id(0).to(tl.int64), rows, C, BLOCK_M, BLOCK_C, 8)
    o_c = tl.arange(0, BLOCK_C)
    b_x = tl.load(x + i_m * C + o_mc, mask=b_in, other=0.0).to(tl.float32)
    if branch is not None:
        b_x += tl.load(branch + i_m * C + o_mc, mask=b_in, other=0.0).to(tl.float32)
        b_total = b_x.to(total.dtype.element_ty)
        tl.store(total + i_m * C + o_mc, b_total, mask=b_in)
        b_x = b_total.to(tl.float32)
    if weight is not None:
        b_weight = tl.load(weight + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    if bias is not None:
        b_bias = tl.load(bias + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    if CENTER:
        b_mean = tl.sum(b_x, axis=1) / C
        b_x = tl.where((o_c < C)[None, :], b_x - b_mean[:, None], 0.0)
        if stats is not None:
            tl.store(stats + i_m + o_m, b_mean, mask=b_in_m)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / C + eps)
    if stats is not None:
        tl.store(stats + rows + i_m + o_m, b_rstd, mask=b_in_m)
    b_y = b_x * b_rstd[:, None]
    if weight is not None:
        b_y *= b_weight[None, :]
    if bias is not None:
        b_y += b_bias[None, :]
    tl.store(y + i_m * C + o_mc, b_y.to(y.dtype.element_ty), mask=b_in)


@triton.jit(do_not_specialize=['rows'])
def _backward_kernel(
    dy,
    dtotal,
    x,
    weight,
    stats,
    dx,
    dbranch,
    sums,
    rows,
    C: tl.constexpr,
    CENTER: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VEC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx, and of the program's rows the first NUM_SUMS of dweight and dbias, into [NUM_SUMS, programs, C].

    With n the normed x and g = weight dy: dx = (g - n mean(g n) - mean(g)) / deviation, plus ``dtotal`` unless that is
    None; it goes into ``dbranch`` too unless that is None.
    """
    i_program = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    b_dweight = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    b_dbias = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    if weight is not None:
        b_weight = tl.load(weight + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    for i_tile in tl.range(i_program.to(tl.int32), tl.cdiv(rows, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        i_m, o_m, b_in_m, o_mc, b_in = _tile(i_tile, rows, C, BLOCK_M, BLOCK_C, VEC)
        # outside the mask dy is zero, and so is all that follows
        b_grad = tl.load(dy + i_m * C + o_mc, mask=b_in, other=0.0).to(tl.float32)
        b_norm = tl.load(x + i_m * C + o_mc, mask=b_in, other=0.0).to(tl.float32)
        b_rstd = tl.load(stats + rows + i_m + o_m, mask=b_in_m, other=0.0)
        if CENTER:
            b_norm -= tl.load(stats + i_m + o_m, mask=b_in_m, other=0.0)[:, None]
        b_norm *= b_rstd[:, None]
        if NUM_SUMS > 0:
            b_dweight += b_grad * b_norm
        if NUM_SUMS > 1:
            b_dbias += b_grad
        if weight is not None:
            b_grad *= b_weight[None, :]
        b_dx = b_grad - b_norm * (tl.sum(b_grad * b_norm, axis=1) / C)[:, None]
        if CENTER:
            b_dx -= (tl.sum(b_grad, axis=1) / C)[:, None]
        b_dx *= b_rstd[:, None]
        if dtotal is not None:
            b_dx += tl.load(dtotal + i_m * C + o_mc, mask=b_in, other=0.0).to(tl.float32)
        if dbranch is not None:
            tl.store(dbranch + i_m * C + o_mc, b_dx.to(dbranch.dtype.element_ty), mask=b_in)
        tl.store(dx + i_m * C + o_mc, b_dx.to(dx.dtype.element_ty), mask=b_in)
    p_sums = sums + i_program * C + o_c
    if NUM_SUMS > 0:
        tl.store(p_sums, tl.sum(b_dweight, axis=0), mask=o_c < C)
    if NUM_SUMS > 1:
        tl.store(p_sums + tl.num_programs(0) * C, tl.sum(b_dbias, axis=0), mask=o_c < C)


@triton.jit(do_not_specialize=['programs'])
def _sum_kernel(
    sums,
    dweight,
    dbias,
    programs,
    C: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dweight, and dbias if there are two sums, of BLOCK_C channels, from the partial sums of `_backward_kernel`."""
    i_sum = tl.program_id(1).to(tl.int64)
    o_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_p = tl.arange(0, BLOCK_P)
    b_sum = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    for i_p in range(0, programs, BLOCK_P):
        b_in = (i_p + o_p < programs)[:, None] & (o_c < C)[None, :]
        b_sum += tl.load(sums + (i_sum * programs + i_p + o_p[:, None]) * C + o_c[None, :], mask=b_in, other=0.0)
    b_total = tl.sum(b_sum, axis=0)
    if i_sum == 0:
        tl.store(dweight + o_c, b_total.to(dweight.dtype.element_ty), mask=o_c < C)
    elif NUM_SUMS > 1:
        tl.store(dbias + o_c, b_total.to(dbias.dtype.element_ty), mask=o_c < C)


class _Plan(NamedTuple):
    """Tiles of the two passes; any gives the same result up to the order of sums."""

    block_c: int
    num_warps: int
    forward_rows: int
    backward_rows: int
    stages: int


_PROCESSOR_WARPS = 16  # that a multiprocessor holds at the backward pass's 128 registers a thread: one wave of programs


@functools.cache
def _plan(channels: int) -> _Plan:
    block_c = triton.next_power_of_2(channels)
    num_warps = max(4, block_c // 512)
    # elements a thread: 32 forward, 16 backward, where sums over rows take as many registers again
    forward_rows, backward_rows = (max(1, elements * 32 * num_warps // block_c) for elements in (32, 16))
    # the next tiles are on their way while one is worked on, as far as shared memory reaches
    return _Plan(block_c, num_warps, forward_rows, backward_rows, stages=3 if block_c <= 2048 else 1)


class _Launcher:
    """A kernel that is called by what decides its compiled form.

    Triton finds that out from all arguments of every call, which takes longer than the launch itself.
    """

    def __init__(self, kernel: triton.JITFunction):
        self._kernel = kernel
        self._compiled: dict[tuple, triton.compiler.CompiledKernel] = {}

    def __call__(
        self, key: tuple, grid: tuple[int, int, int], tensors: tuple[Tensor | None, ...], numbers: tuple, num_warps: int
    ) -> None:
        """Launch on the device and the current stream of the first tensor.

        Args:
            key: dtypes of the tensors, and all ``numbers`` that are constants of the kernel.
            grid: Programs along three axes.
            tensors: First arguments of the kernel, on one device.
            numbers: The others.
            num_warps: Of a program.
        """
        device = tensors[0].device
        if device.type == 'cuda' and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(key, grid, tensors, numbers, num_warps)
        addresses = [v.data_ptr() for v in tensors if v is not None]
        if interpreted() or any(address % 16 for address in addresses):
            self._kernel[grid](*tensors, *numbers, num_warps=num_warps)
            return
        compiled = self._compiled.get((key, device))
        if compiled is None:
            self._compiled[key, device] = self._kernel[grid](*tensors, *numbers, num_warps=num_warps)
        else:
            compiled[grid](*tensors, *numbers, stream=torch._C._cuda_getCurrentRawStream(device.index))


_run_forward, _run_backward, _run_sum = map(_Launcher, (_forward_kernel, _backward_kernel, _sum_kernel))

_SUM_ROWS, _SUM_CHANNELS = 64, 32


@functools.cache
def _num_processors(device: torch.device) -> int:
    return 1 if interpreted() else torch.cuda.get_device_properties(device).multi_processor_count


def _dtypes(tensors: tuple[Tensor | None, ...]) -> tuple[torch.dtype | None, ...]:
    return tuple(None if v is None else v.dtype for v in tensors)


def forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    center: bool,
    save_stats: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x + branch in the dtype of x (or x itself), that normed, and what :func:`backward` wants kept.

    x [..., C] and branch are contiguous and not empty.
    """
    channels = x.shape[-1]
    rows = x.numel() // channels
    plan = _plan(channels)
    y = torch.empty_like(x, dtype=out_dtype)
    total = None if branch is None else torch.empty_like(x)
    stats = torch.empty(2, rows, dtype=torch.float32, device=x.device) if save_stats else None
    tensors = (x, branch, weight, bias, total, y, stats)
    key = (_dtypes(tensors), channels, center, rows < 2**31)
    numbers = (rows, eps, channels, center, plan.forward_rows, plan.block_c)
    _run_forward(key, (-(-rows // plan.forward_rows), 1, 1), tensors, numbers, plan.num_warps)
    return x if total is None else total, y, stats


def backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    center: bool,
    dbranch_dtype: torch.dtype | None,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dbranch, dweight [C] and dbias [C] in the dtypes given; of those without one, none.

    x is what was normed, and dtotal what else depends on it gives. dy, dtotal and x are contiguous.
    """
    channels = x.shape[-1]
    rows = x.numel() // channels
    plan = _plan(channels)
    programs = min(-(-rows // plan.backward_rows), _num_processors(x.device) * _PROCESSOR_WARPS // plan.num_warps)
    dx = torch.empty_like(x)
    dbranch = torch.empty_like(x, dtype=dbranch_dtype) if dbranch_dtype else None
    num_sums = 2 if dbias_dtype else 1 if dweight_dtype else 0
    sums = torch.empty(num_sums, programs, channels, dtype=torch.float32, device=x.device)
    tensors = (dy, dtotal, x, weight, stats, dx, dbranch, sums)
    # loads and stores of several dtypes in one layout: tiles in two would not fit the registers
    vector = 16 // max(v.itemsize for v in (x, dy, dtotal) if v is not None)
    key = (_dtypes(tensors), channels, center, num_sums, rows < 2**31)
    numbers = (rows, channels, center, num_sums, plan.backward_rows, plan.block_c, vector, plan.stages)
    _run_backward(key, (programs, 1, 1), tensors, numbers, plan.num_warps)
    if not num_sums:
        return dx, dbranch, None, None
    # the kernel of two sums writes both, whether or not both are wanted
    dweight = torch.empty(channels, dtype=dweight_dtype or torch.float32, device=x.device)
    dbias = torch.empty(channels, dtype=dbias_dtype, device=x.device) if dbias_dtype else None
    tensors = (sums, dweight, dbias)
    key = (_dtypes(tensors), channels, num_sums)
    numbers = (programs, channels, num_sums, _SUM_ROWS, _SUM_CHANNELS)
    _run_sum(key, (-(-channels // _SUM_CHANNELS), num_sums, 1), tensors, numbers, 4)
    return dx, dbranch, dweight if dweight_dtype else None, dbias
