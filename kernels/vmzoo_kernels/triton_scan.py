"""The ``triton`` backend: one forward and one backward kernel for every scan.

A program takes one sequence of one route (or a segment of it) and a block of channels, and walks along it in tiles of
``BLOCK_T`` steps: it gathers the rows of x by position, forms the step sizes from their low-rank factors in registers,
scans the tile, and writes outputs to their positions. Nothing that is K times the size of x is read or written, except
the K partial outputs, which are then summed in a fixed order: there are no atomics, so results are reproducible.

Few and long sequences are split into segments, so that the GPU is filled: a first pass finds what each segment adds to
the state, a short one carries the states across, and the main pass starts every segment from its true state. The
backward pass walks the tiles in reverse from states kept at every tile's start. Where segments of a few steps are also
scanned backwards, a tile holds whole segments, so that this happens within it.

Names: ``i_`` ids, ``o_`` offsets, ``p_`` pointers, ``b_`` values of a tile; tiles are [T, D].
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backends import interpreted
from .common import STATE_INTERVAL, ScanInputs, compute_dtype, state_interval

_LOG2E = tl.constexpr(1.4426950408889634)

# Run-time sizes and strides, of which no value causes a new compilation. The row strides among them serve a second
# purpose: since their divisibility is unknown, a thread keeps VEC neighbouring channels, and all steps of a tile, to
# itself, so that the scan needs no exchange between threads.
_SIZES = ['num_routes', 'num_sequences', 'num_segments', 'segment_tiles', 'num_tiles', 'steps', 'num_blocks']
_STRIDES = ['gather_k', 'merge_k', *(f'{v}_{axis}' for v in ('x', 'dt', 'B', 'C') for axis in 'blk')]
_FORWARD_STRIDES = [*_STRIDES, *(f'y_{axis}' for axis in 'blk')]
_BACKWARD_STRIDES = [*_STRIDES, *(f'{v}_{axis}' for v in ('dy', 'dx', 'd_dt', 'd_BC') for axis in 'blk')]
_BACKWARD_STRIDES += ['d_dt_block', 'd_BC_block']


@triton.jit
def _compose(decay1, state1, decay2, state2):
    return decay1 * decay2, decay2 * state1 + state2


@triton.jit
def _compose_exclusive(input1, before1, decay1, input2, before2, decay2):
    """As `_compose`, but for exp(delta_t A) h_{t-1}, the state without the step's own input: nothing cancels."""
    return input2, before2 + decay2 * (before1 + input1), decay2 * decay1


@triton.jit
def _compose_adjoint(decay1, grad1, weight1, decay2, grad2, weight2):
    """dL/dh_t = C_t dL/dy_t + decay_{t+1} dL/dh_{t+1}, from the last step (1) to the first (2).

    A run of steps turns the q that comes in after it into ``grad + weight q`` at its first step.
    """
    carried = weight2 * decay1
    return decay2, grad2 + carried * grad1, carried * weight1


@triton.jit
def _compose_exclusive_within(input1, before1, decay1, segment1, input2, before2, decay2, segment2):
    """As `_compose_exclusive`, where nothing passes from one segment to another."""
    passed = tl.where(segment1 == segment2, decay2 * (before1 + input1), 0.0)
    return input2, before2 + passed, decay2 * decay1, segment2


@triton.jit
def _compose_adjoint_within(decay1, grad1, weight1, segment1, decay2, grad2, weight2, segment2):
    """As `_compose_adjoint`, where nothing passes from one segment to another."""
    carried = weight2 * decay1
    passed = tl.where(segment1 == segment2, carried * grad1, 0.0)
    return decay2, grad2 + passed, carried * weight1, segment2


@triton.jit
def _softplus(x):
    """softplus to full relative precision, and exp(-|x|), in one exponential."""
    e = tl.exp(-tl.abs(x))
    if x.dtype == tl.float64:
        w = 1.0 + e
        log1p = tl.log(w) + (e - (w - 1.0)) / w  # the second term restores what the rounding of 1 + e lost
    else:
        # log1p(e) / e on [0, 1]: Chebyshev interpolant of degree 9, relative error 1.3e-7
        p = -0.0031760570127516985 * e + 0.019542528316378593
        p = p * e - 0.05637361481785774
        p = p * e + 0.10543623566627502
        p = p * e - 0.1526966691017151
        p = p * e + 0.1966327428817749
        p = p * e - 0.24951615929603577
        p = p * e + 0.33329710364341736
        p = p * e - 0.49999892711639404
        p = p * e + 1.0
        log1p = p * e
    return tl.where(x > 0, x, 0.0) + log1p, e


@triton.jit
def _row(tile, o_t, row):
    """One row of a [T, D] tile."""
    return tl.sum(tl.where((o_t == row)[:, None], tile, 0.0), axis=0)


@triton.jit
def _column(tile, o_n, n):
    """Column n of a [D, N] tile."""
    return tl.sum(tl.where((o_n == n)[None, :], tile, 0.0), axis=1)


@triton.jit
def _add_column(tile, o_n, n, column):
    return tl.where((o_n == n)[None, :], tile + column[:, None], tile)


@triton.jit
def _set_column(tile, o_n, n, column):
    return tl.where((o_n == n)[None, :], column[:, None], tile)


@triton.jit
def _program(num_routes, num_sequences, num_segments, num_blocks):
    """Ids of batch item, route, sequence, segment and channel block; channel blocks of a sequence run side by side."""
    pid = tl.program_id(0).to(tl.int64)
    i_block = pid % num_blocks
    pid = pid // num_blocks
    i_segment = pid % num_segments
    pid = pid // num_segments
    i_sequence = pid % num_sequences
    pid = pid // num_sequences
    return pid // num_routes, pid % num_routes, i_sequence, i_segment, i_block


@triton.jit
def _tile_steps(i_tile, o_t, steps, BLOCK_T: tl.constexpr, SEGMENT: tl.constexpr):
    """Steps of a tile, of whole segments; those of the tile's rest lie past the end."""
    TILE: tl.constexpr = BLOCK_T if SEGMENT == 0 else BLOCK_T // SEGMENT * SEGMENT
    o_step = i_tile * TILE + o_t
    if TILE != BLOCK_T:
        o_step = tl.where(o_t < TILE, o_step, steps)
    return o_step


@triton.jit
def _later_steps(b_input, b_decay, b_segment):
    """What the later steps of a segment add to each state: r_t = decay_t (r_{t+1} + input_{t+1})."""
    b_none = tl.zeros(b_input.shape, b_input.dtype)
    _, b_later, _, _ = tl.associative_scan(
        (b_input, b_none, b_decay, b_segment), 0, _compose_exclusive_within, reverse=True
    )
    return b_later


@triton.jit
def _local_adjoint(b_decay, b_grad, b_segment):
    """dL/d(r_t + input_t) of that, from grad_t = C_t dL/dy_t: g_t = grad_t + decay_{t-1} g_{t-1}."""
    b_ones = tl.full(b_grad.shape, 1.0, b_grad.dtype)
    _, b_g, _, _ = tl.associative_scan((b_decay, b_grad, b_ones, b_segment), 0, _compose_adjoint_within)
    return b_g


@triton.jit
def _positions(p_table, o_step, steps, WIDE: tl.constexpr):
    """Positions of a tile's steps, and which of them exist (neither padding nor past the end)."""
    b_pos = tl.load(p_table + o_step, mask=o_step < steps, other=-1)
    b_real = b_pos >= 0
    if WIDE:  # offsets inside one map pass 2^31
        b_pos = b_pos.to(tl.int64)
    return b_pos, b_real


@triton.jit
def _load_rows(p_base, b_pos, stride_l, o_column, stride_column, mask):
    return tl.load(p_base + b_pos[:, None] * stride_l + o_column[None, :] * stride_column, mask=mask, other=0.0)


@triton.jit
def _step_sizes(
    p_dt,
    b_pos,
    b_real,
    stride_l,
    stride_d,
    o_d,
    b_in_d,
    o_r,
    b_weight,
    b_bias,
    in_sequence,
    RANK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """delta and its derivative before the softplus [T, D], and the low-rank dt [T, R] (or delta where it is whole)."""
    if RANK > 0:
        b_dt = _load_rows(p_dt, b_pos, stride_l, o_r, stride_d, b_real[:, None] & (o_r < RANK)[None, :]).to(ACC)
        b_raw = tl.dot(b_dt, tl.trans(b_weight), input_precision=PRECISION, out_dtype=ACC)
    else:
        b_dt = _load_rows(p_dt, b_pos, stride_l, o_d, stride_d, b_real[:, None] & b_in_d[None, :]).to(ACC)
        b_raw = b_dt
    b_raw += b_bias[None, :]
    b_delta, b_slope = b_raw, tl.full(b_raw.shape, 1.0, ACC)
    if SOFTPLUS:
        b_delta, b_e = _softplus(b_raw)
        b_slope = tl.where(b_raw > 0, 1.0, b_e) / (1.0 + b_e)
    # A step past the end leaves the state alone; padding inside the sequence does not.
    return tl.where(in_sequence[:, None], b_delta, 0.0), b_slope, b_dt


@triton.jit(do_not_specialize=[*_SIZES, *_FORWARD_STRIDES])
def _forward_kernel(
    x,
    dt,
    B,
    C,
    A,
    D,
    weight,
    bias,
    gather,
    merge,
    y,
    states,
    last,
    segment_states,
    segment_deltas,
    num_routes,
    num_sequences,
    num_segments,
    segment_tiles,
    num_tiles,
    steps,
    dim,
    num_blocks,
    gather_k,
    merge_k,
    x_b,
    x_l,
    x_k,
    x_d,
    dt_b,
    dt_l,
    dt_k,
    dt_d,
    B_b,
    B_l,
    B_k,
    B_n,
    C_b,
    C_l,
    C_k,
    C_n,
    y_b,
    y_l,
    y_k,
    y_d,
    N: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SAVE_STATES: tl.constexpr,
    SPLIT: tl.constexpr,
    SUMMARY: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """y of a segment of a sequence; as SUMMARY only the segment's end state from a zero start, and its summed delta."""
    i_b, i_k, i_s, i_g, i_block = _program(num_routes, num_sequences, num_segments, num_blocks)
    o_t = tl.arange(0, BLOCK_T)
    o_d = i_block.to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    o_r = tl.arange(0, BLOCK_R)
    b_in_d = o_d < dim
    o_dn = o_d[:, None] * N + o_n[None, :]
    b_in_dn = b_in_d[:, None] & (o_n < N)[None, :]

    b_A = tl.load(A + i_k * dim * N + o_dn, mask=b_in_dn, other=0.0) * _LOG2E
    b_weight, b_bias = o_r[None, :] + o_d[:, None], tl.zeros([BLOCK_D], dtype=ACC)
    if RANK > 0:
        o_dr = o_d[:, None] * RANK + o_r[None, :]
        b_weight = tl.load(weight + i_k * dim * RANK + o_dr, mask=b_in_d[:, None] & (o_r < RANK)[None, :], other=0.0)
    if HAS_BIAS:
        b_bias = tl.load(bias + i_k * dim + o_d, mask=b_in_d, other=0.0)
    if HAS_D:
        b_D = tl.load(D + i_k * dim + o_d, mask=b_in_d, other=0.0)

    x += (i_b * x_b + i_k * x_k) * VEC
    dt += i_b * dt_b + i_k * dt_k
    B += i_b * B_b + i_k * B_k
    C += i_b * C_b + i_k * C_k
    y += (i_b * y_b + i_k * y_k) * VEC
    gather += i_k * gather_k + i_s * steps
    merge += i_k * merge_k + i_s * steps
    i_sequence = (i_b * num_routes + i_k) * num_sequences + i_s
    states += i_sequence * num_tiles * dim * N
    o_segment = (i_sequence * num_segments + i_g) * dim

    if SEGMENT > 0:
        b_segment = tl.broadcast_to((o_t // SEGMENT)[:, None], [BLOCK_T, BLOCK_D])

    b_h = tl.zeros([BLOCK_D, BLOCK_N], dtype=ACC)
    b_sum = tl.zeros([BLOCK_D], dtype=ACC)
    if SPLIT and not SUMMARY:
        b_h = tl.load(segment_states + o_segment * N + o_dn, mask=b_in_dn, other=0.0)

    first = i_g.to(tl.int32) * segment_tiles
    for i_tile in range(first, tl.minimum(first + segment_tiles, num_tiles)):
        if SAVE_STATES:
            tl.store(states + tl.cast(i_tile, tl.int64) * dim * N + o_dn, b_h, mask=b_in_dn)
        o_step = _tile_steps(i_tile, o_t, steps, BLOCK_T, SEGMENT)
        b_pos, b_real = _positions(gather, o_step, steps, WIDE)
        b_delta, _, _ = _step_sizes(
            dt,
            b_pos,
            b_real,
            dt_l,
            dt_d,
            o_d,
            b_in_d,
            o_r,
            b_weight,
            b_bias,
            o_step < steps,
            RANK,
            SOFTPLUS,
            PRECISION,
            ACC,
        )
        b_rows = b_real[:, None] & b_in_d[None, :]
        b_x = _load_rows(x, b_pos, x_l * VEC, o_d, x_d, b_rows).to(ACC)
        b_y = tl.zeros([BLOCK_T, BLOCK_D], dtype=ACC)
        for n in range(N):
            b_B = tl.load(B + b_pos * B_l + n * B_n, mask=b_real, other=0.0).to(ACC)
            b_decay = tl.exp2(b_delta * _column(b_A, o_n, n)[None, :])
            b_input = b_delta * b_x * b_B[:, None]
            if SEGMENT > 0 and not SUMMARY:
                b_later = _later_steps(b_input, b_decay, b_segment)
            b_decay, b_states = tl.associative_scan((b_decay, b_input), 0, _compose)
            b_states += b_decay * _column(b_h, o_n, n)[None, :]
            b_h = _set_column(b_h, o_n, n, _row(b_states, o_t, BLOCK_T - 1))
            if not SUMMARY:
                b_C = tl.load(C + b_pos * C_l + n * C_n, mask=b_real, other=0.0).to(ACC)
                if SEGMENT > 0:
                    b_states += b_later
                b_y += b_states * b_C[:, None]
        if SUMMARY:
            b_sum += tl.sum(b_delta, axis=0)
        else:
            if HAS_D:
                b_y += b_D[None, :] * b_x
            b_to, b_written = _positions(merge, o_step, steps, WIDE)
            p_y = y + b_to[:, None] * (y_l * VEC) + o_d[None, :] * y_d
            tl.store(p_y, b_y.to(y.dtype.element_ty), mask=b_written[:, None] & b_in_d[None, :])

    if SUMMARY:
        tl.store(segment_states + o_segment * N + o_dn, b_h, mask=b_in_dn)
        tl.store(segment_deltas + o_segment + o_d, b_sum, mask=b_in_d)
    elif i_g == num_segments - 1:
        tl.store(last + i_sequence * dim * N + o_dn, b_h, mask=b_in_dn)


@triton.jit(do_not_specialize=['num_routes', 'num_sequences', 'num_segments', 'num_blocks'])
def _carry_kernel(
    A,
    segment_states,
    segment_deltas,
    num_routes,
    num_sequences,
    num_segments,
    dim,
    num_blocks,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REVERSE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Replace what each segment adds to the state by the state it starts from (in REVERSE: ends on), in place."""
    i_b, i_k, i_s, _, i_block = _program(num_routes, num_sequences, 1, num_blocks)
    o_d = i_block.to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    b_in_d = o_d < dim
    o_dn = o_d[:, None] * N + o_n[None, :]
    b_in_dn = b_in_d[:, None] & (o_n < N)[None, :]
    b_A = tl.load(A + i_k * dim * N + o_dn, mask=b_in_dn, other=0.0) * _LOG2E
    i_sequence = (i_b * num_routes + i_k) * num_sequences + i_s
    b_h = tl.zeros([BLOCK_D, BLOCK_N], dtype=ACC)
    for i in range(num_segments):
        i_g = num_segments - 1 - i if REVERSE else i
        o_segment = (i_sequence * num_segments + i_g) * dim
        p_state = segment_states + o_segment * N + o_dn
        b_added = tl.load(p_state, mask=b_in_dn, other=0.0)
        b_delta = tl.load(segment_deltas + o_segment + o_d, mask=b_in_d, other=0.0)
        tl.store(p_state, b_h, mask=b_in_dn)
        b_h = tl.exp2(b_delta[:, None] * b_A) * b_h + b_added


@triton.jit(do_not_specialize=[*_SIZES, *_BACKWARD_STRIDES])
def _backward_kernel(
    dy,
    x,
    dt,
    B,
    C,
    A,
    D,
    weight,
    bias,
    gather,
    merge,
    states,
    segment_states,
    segment_deltas,
    dx,
    d_dt,
    d_B,
    d_C,
    d_A,
    d_D,
    d_weight,
    d_bias,
    num_routes,
    num_sequences,
    num_segments,
    segment_tiles,
    num_tiles,
    steps,
    dim,
    num_blocks,
    gather_k,
    merge_k,
    dy_b,
    dy_l,
    dy_k,
    dy_d,
    x_b,
    x_l,
    x_k,
    x_d,
    dt_b,
    dt_l,
    dt_k,
    dt_d,
    B_b,
    B_l,
    B_k,
    B_n,
    C_b,
    C_l,
    C_k,
    C_n,
    dx_b,
    dx_l,
    dx_k,
    dx_d,
    d_dt_block,
    d_dt_b,
    d_dt_l,
    d_dt_k,
    d_dt_d,
    d_BC_block,
    d_BC_b,
    d_BC_l,
    d_BC_k,
    N: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SPLIT: tl.constexpr,
    SUMMARY: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """All gradients of a segment, walking back; as SUMMARY only what it hands to the one before it, from a zero end.

    With g_t = dL/dh_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}; what a tile hands back is q = exp(delta_0 A) g_0. The
    backward scan of a segment has an adjoint that runs forwards: C_t dy_t + exp(delta_{t-1} A) times that of t - 1.
    Gradients that are sums over channels are written for every channel block, those that are sums over positions for
    every segment; the host adds them up.
    """
    i_b, i_k, i_s, i_g, i_block = _program(num_routes, num_sequences, num_segments, num_blocks)
    o_t = tl.arange(0, BLOCK_T)
    o_d = i_block.to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    o_r = tl.arange(0, BLOCK_R)
    b_in_d, b_in_r = o_d < dim, o_r < RANK
    o_dn = o_d[:, None] * N + o_n[None, :]
    b_in_dn = b_in_d[:, None] & (o_n < N)[None, :]
    o_dr = o_d[:, None] * RANK + o_r[None, :]
    b_in_dr = b_in_d[:, None] & b_in_r[None, :]

    b_A = tl.load(A + i_k * dim * N + o_dn, mask=b_in_dn, other=0.0)
    b_weight, b_bias = o_r[None, :] + o_d[:, None], tl.zeros([BLOCK_D], dtype=ACC)
    if RANK > 0:
        b_weight = tl.load(weight + i_k * dim * RANK + o_dr, mask=b_in_dr, other=0.0)
    if HAS_BIAS:
        b_bias = tl.load(bias + i_k * dim + o_d, mask=b_in_d, other=0.0)
    if HAS_D:
        b_D = tl.load(D + i_k * dim + o_d, mask=b_in_d, other=0.0)
    b_dA = tl.zeros([BLOCK_D, BLOCK_N], dtype=ACC)
    b_dD = tl.zeros([BLOCK_D], dtype=ACC)
    b_dbias = tl.zeros([BLOCK_D], dtype=ACC)
    b_dweight = tl.zeros([BLOCK_D, BLOCK_R], dtype=ACC)

    dy += (i_b * dy_b + i_k * dy_k) * VEC
    x += (i_b * x_b + i_k * x_k) * VEC
    dt += i_b * dt_b + i_k * dt_k
    B += i_b * B_b + i_k * B_k
    C += i_b * C_b + i_k * C_k
    dx += (i_b * dx_b + i_k * dx_k) * VEC
    d_dt += i_block * d_dt_block + i_b * d_dt_b + i_k * d_dt_k
    d_B += i_block * d_BC_block + i_b * d_BC_b + i_k * d_BC_k
    d_C += i_block * d_BC_block + i_b * d_BC_b + i_k * d_BC_k
    gather += i_k * gather_k + i_s * steps
    merge += i_k * merge_k + i_s * steps
    i_sequence = (i_b * num_routes + i_k) * num_sequences + i_s
    states += i_sequence * num_tiles * dim * N
    o_segment = (i_sequence * num_segments + i_g) * dim

    if SEGMENT > 0:
        b_segment = tl.broadcast_to((o_t // SEGMENT)[:, None], [BLOCK_T, BLOCK_D])

    b_q = tl.zeros([BLOCK_D, BLOCK_N], dtype=ACC)
    b_sum = tl.zeros([BLOCK_D], dtype=ACC)
    if SPLIT and not SUMMARY:
        b_q = tl.load(segment_states + o_segment * N + o_dn, mask=b_in_dn, other=0.0)

    first = i_g.to(tl.int32) * segment_tiles
    end = tl.minimum(first + segment_tiles, num_tiles)
    for i in range(first, end):
        i_tile = first + end - 1 - i
        o_step = _tile_steps(i_tile, o_t, steps, BLOCK_T, SEGMENT)
        b_in_t = o_step < steps
        b_pos, b_real = _positions(gather, o_step, steps, WIDE)
        b_to, b_written = _positions(merge, o_step, steps, WIDE)
        b_rows = b_real[:, None] & b_in_d[None, :]
        b_delta, b_slope, b_dt = _step_sizes(
            dt, b_pos, b_real, dt_l, dt_d, o_d, b_in_d, o_r, b_weight, b_bias, b_in_t, RANK, SOFTPLUS, PRECISION, ACC
        )
        b_dy = _load_rows(dy, b_to, dy_l * VEC, o_d, dy_d, b_written[:, None] & b_in_d[None, :]).to(ACC)
        b_d_input = tl.zeros([BLOCK_T, BLOCK_D], dtype=ACC)  # dL/d(delta x)
        b_d_delta = tl.zeros([BLOCK_T, BLOCK_D], dtype=ACC)
        if SUMMARY:
            b_sum += tl.sum(b_delta, axis=0)
        else:
            b_x = _load_rows(x, b_pos, x_l * VEC, o_d, x_d, b_rows).to(ACC)
            b_h = tl.load(states + tl.cast(i_tile, tl.int64) * dim * N + o_dn, mask=b_in_dn, other=0.0)
        for n in range(N):
            b_An = _column(b_A, o_n, n)
            b_C = tl.load(C + b_pos * C_l + n * C_n, mask=b_real, other=0.0).to(ACC)
            b_decay = tl.exp2(b_delta * (b_An * _LOG2E)[None, :])
            b_ones = tl.full([BLOCK_T, BLOCK_D], 1.0, ACC)
            _, b_g, b_weight_q = tl.associative_scan(
                (b_decay, b_dy * b_C[:, None], b_ones), 0, _compose_adjoint, reverse=True
            )
            b_g += b_weight_q * _column(b_q, o_n, n)[None, :]
            b_q = _set_column(b_q, o_n, n, _row(b_decay * b_g, o_t, 0))
            if not SUMMARY:
                b_B = tl.load(B + b_pos * B_l + n * B_n, mask=b_real, other=0.0).to(ACC)
                b_input = b_delta * b_x * b_B[:, None]
                _, b_decayed, b_product = tl.associative_scan(
                    (b_input, tl.zeros([BLOCK_T, BLOCK_D], ACC), b_decay), 0, _compose_exclusive
                )
                b_decayed += b_product * _column(b_h, o_n, n)[None, :]
                b_states = b_decayed + b_input
                b_d_log_decay = b_g * b_decayed  # dL/d(delta A)
                if SEGMENT > 0:
                    b_later = _later_steps(b_input, b_decay, b_segment)
                    b_own = b_dy * b_C[:, None]
                    b_local_g = _local_adjoint(b_decay, b_own, b_segment)
                    b_states += b_later
                    b_d_log_decay += b_local_g * b_later
                    b_g += b_local_g - b_own
                b_d_input += b_g * b_B[:, None]
                b_d_delta += b_d_log_decay * b_An[None, :]
                b_dA = _add_column(b_dA, o_n, n, tl.sum(b_d_log_decay * b_delta, axis=0))
                b_dB = tl.sum(b_g * (b_delta * b_x), axis=1)
                b_dC = tl.sum(b_states * b_dy, axis=1)
                tl.store(d_B + b_pos * d_BC_l + n, b_dB, mask=b_real)
                tl.store(d_C + b_pos * d_BC_l + n, b_dC, mask=b_real)

        if not SUMMARY:
            b_dx = b_d_input * b_delta
            if HAS_D:
                b_dx += b_D[None, :] * b_dy
                b_dD += tl.sum(b_dy * b_x, axis=0)
            b_d_delta = (b_d_delta + b_d_input * b_x) * b_slope
            b_d_delta = tl.where(b_in_t[:, None] & b_in_d[None, :], b_d_delta, 0.0)
            if HAS_BIAS:
                b_dbias += tl.sum(b_d_delta, axis=0)

            p_dx = dx + b_pos[:, None] * (dx_l * VEC) + o_d[None, :] * dx_d
            tl.store(p_dx, b_dx.to(dx.dtype.element_ty), mask=b_rows)
            if RANK > 0:
                b_d_dt = tl.dot(b_d_delta, b_weight, input_precision=PRECISION, out_dtype=ACC)
                b_dweight += tl.dot(tl.trans(b_d_delta), b_dt, input_precision=PRECISION, out_dtype=ACC)
                p_d_dt = d_dt + b_pos[:, None] * d_dt_l + o_r[None, :]
                tl.store(p_d_dt, b_d_dt, mask=b_real[:, None] & b_in_r[None, :])
            else:
                p_d_dt = d_dt + b_pos[:, None] * d_dt_l + o_d[None, :] * d_dt_d
                tl.store(p_d_dt, b_d_delta.to(d_dt.dtype.element_ty), mask=b_rows)

    if SUMMARY:
        tl.store(segment_states + o_segment * N + o_dn, b_q, mask=b_in_dn)
        tl.store(segment_deltas + o_segment + o_d, b_sum, mask=b_in_d)
    else:
        # Sums over positions: [B, S, G, K, D, ...], added up over B, S and G by the host.
        o_out = (((i_b * num_sequences + i_s) * num_segments + i_g) * num_routes + i_k) * dim
        tl.store(d_A + o_out * N + o_dn, b_dA, mask=b_in_dn)
        if HAS_D:
            tl.store(d_D + o_out + o_d, b_dD, mask=b_in_d)
        if HAS_BIAS:
            tl.store(d_bias + o_out + o_d, b_dbias, mask=b_in_d)
        if RANK > 0:
            tl.store(d_weight + o_out * RANK + o_dr, b_dweight, mask=b_in_dr)


class _Plan(NamedTuple):
    """How a scan is cut into programs."""

    block_d: int
    vec: int
    num_blocks: int
    num_tiles: int
    num_segments: int
    segment_tiles: int
    num_warps: int


_BLOCK_T = STATE_INTERVAL
_FULL_GPU = 1024  # programs that keep a large GPU busy
_MIN_SEGMENT = 4  # tiles; shorter segments cost more in the extra pass than they bring


def _plan(x: Tensor, A: Tensor, gather: Tensor, segment: int, backward: bool) -> _Plan:
    """Tile shapes measured on Hopper GPUs; any gives the same result up to the order of sums."""
    num_routes, sequences, steps = gather.shape
    _, dim, d_state = A.shape
    block_d, vec, num_warps = 32, 1, 1
    if interpreted():
        block_d = 4
    elif backward:
        block_d, num_warps = (32, 2) if d_state == 1 else (16, 1)  # more would not fit the registers
    elif d_state == 1 and dim % 64 == 0 and all(stride % 2 == 0 for stride in x.stride()[:-1]):
        block_d, vec = 64, 2
    num_blocks = triton.cdiv(dim, block_d)
    num_tiles = triton.cdiv(steps, state_interval(segment))
    programs = max(1, x.shape[0] * num_routes * sequences * num_blocks)
    num_segments = max(1, min(_FULL_GPU // programs, num_tiles // _MIN_SEGMENT))
    segment_tiles = triton.cdiv(num_tiles, num_segments)
    num_segments = triton.cdiv(num_tiles, segment_tiles)
    return _Plan(block_d, vec, num_blocks, num_tiles, num_segments, segment_tiles, num_warps)


def _contiguous(v: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if v is None else v.to(dtype).contiguous()


def _wide(*tensors: Tensor) -> bool:
    """Whether offsets inside one batch item pass 31 bits."""
    return any(sum((n - 1) * abs(s) for n, s in zip(v.shape[1:], v.stride()[1:])) >= 2**31 for v in tensors)


class _Scan:
    """What the forward and the backward launch share: converted parameters, sizes, strides and constants."""

    def __init__(self, inputs: ScanInputs, dy: Tensor | None = None):
        x, dt, B, C, A, D, weight, bias, gather, merge, _, softplus, segment = inputs
        acc = compute_dtype(x.dtype)
        self.acc = acc
        self.x = x
        self.A, self.D, self.weight, self.bias = (_contiguous(v, acc) for v in (A, D, weight, bias))
        self.gather, self.merge = (v if v[0].is_contiguous() else v.contiguous() for v in (gather, merge))
        self.rank = 0 if weight is None else weight.shape[-1]
        self.plan = plan = _plan(x, A, gather, segment, backward=dy is not None)
        self.batch, (self.num_routes, self.num_sequences, self.steps) = x.shape[0], gather.shape
        self.dim, self.d_state = A.shape[1:]
        self.params = (self.A, self._or_dummy(self.D), self._or_dummy(self.weight), self._or_dummy(self.bias))
        self.tables = (self.gather, self.merge)
        self.sizes = (self.num_routes, self.num_sequences)
        self.constants = {
            'N': self.d_state,
            'RANK': self.rank,
            'BLOCK_T': _BLOCK_T,
            'BLOCK_D': plan.block_d,
            'BLOCK_N': triton.next_power_of_2(self.d_state),
            'BLOCK_R': max(16, triton.next_power_of_2(max(self.rank, 1))),
            'HAS_D': D is not None,
            'HAS_BIAS': bias is not None,
            'VEC': plan.vec,
            'WIDE': _wide(x, dt, B, C, x if dy is None else dy)
            or gather.numel() * max(self.dim, self.rank + 2 * self.d_state) >= 2**31,
            'SOFTPLUS': softplus,
            'SEGMENT': segment,
            # 'ieee' keeps float32 exact; a half-precision dt loses nothing in the matrix unit's tf32
            'PRECISION': 'ieee' if dt.dtype in (torch.float32, torch.float64) else 'tf32',
            'ACC': tl.float64 if acc == torch.float64 else tl.float32,
            'num_warps': plan.num_warps,
        }

    def _or_dummy(self, v: Tensor | None) -> Tensor:
        return self.A if v is None else v

    def strides(self, v: Tensor) -> tuple[int, int, int, int]:
        """Strides of [B, L, D] or [B, L, K, D] over batch, position and route, in units of VEC, and over channels."""
        *rows, channel = (v.stride(0), v.stride(1), 0, v.stride(2)) if v.ndim == 3 else v.stride()
        return *(stride // self.plan.vec for stride in rows), channel

    @property
    def sequences(self) -> int:
        return self.batch * self.num_routes * self.num_sequences

    def segment_buffers(self) -> tuple[Tensor, Tensor]:
        """State [.., D, N] and summed delta [.., D] of every segment."""
        shape = (self.sequences, self.plan.num_segments, self.dim)
        return self.x.new_empty((*shape, self.d_state), dtype=self.acc), self.x.new_empty(shape, dtype=self.acc)

    def launch_sizes(self) -> tuple[int, ...]:
        p = self.plan
        return (*self.sizes, p.num_segments, p.segment_tiles, p.num_tiles, self.steps, self.dim, p.num_blocks)

    def grid(self) -> tuple[int]:
        return (self.sequences * self.plan.num_segments * self.plan.num_blocks,)

    def carry(self, segment_states: Tensor, segment_deltas: Tensor, reverse: bool) -> None:
        p, c = self.plan, self.constants
        _carry_kernel[(self.sequences * p.num_blocks,)](
            self.A,
            segment_states,
            segment_deltas,
            *self.sizes,
            p.num_segments,
            self.dim,
            p.num_blocks,
            N=c['N'],
            BLOCK_D=c['BLOCK_D'],
            BLOCK_N=c['BLOCK_N'],
            REVERSE=reverse,
            ACC=c['ACC'],
        )


def _buffer(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, complete: bool) -> Tensor:
    """Uninitialised, or zeros where the routes do not write everything."""
    return x.new_empty(shape, dtype=dtype) if complete else x.new_zeros(shape, dtype=dtype)


def forward(inputs: ScanInputs, out: Tensor, last: Tensor, states: Tensor) -> None:
    """Scan of :mod:`vmzoo_kernels.ops` into ``out``, ``last`` and, unless it is empty, ``states``."""
    inputs = inputs.unpacked()
    scan, complete = _Scan(inputs), inputs.complete
    x, dt, B, C = inputs[:4]
    parts = out
    if out.ndim == 3 and scan.num_routes > 1:
        # float32, so that the result is rounded once
        parts = _buffer(x, (scan.num_routes, *out.shape), scan.acc, complete)
        y_strides = scan.strides(parts.permute(1, 2, 0, 3))
    else:
        if not complete:
            parts.zero_()
        y_strides = scan.strides(parts)
    if out.numel() == 0:
        last.zero_()
        return

    split = scan.plan.num_segments > 1
    segments = scan.segment_buffers() if split else (last, last)

    def launch(summary: bool) -> None:
        _forward_kernel[scan.grid()](
            x,
            dt,
            B,
            C,
            *scan.params,
            *scan.tables,
            parts,
            states,
            last,
            *segments,
            *scan.launch_sizes(),
            scan.gather.stride(0),
            scan.merge.stride(0),
            *scan.strides(x),
            *dt.stride(),
            *B.stride(),
            *C.stride(),
            *y_strides,
            SAVE_STATES=states.numel() > 0 and not summary,
            SPLIT=split,
            SUMMARY=summary,
            **scan.constants,
        )

    with torch.cuda.device_of(x):  # nothing for CPU tensors
        if split:
            launch(summary=True)
            scan.carry(*segments, reverse=False)
        launch(summary=False)
        if parts is not out:
            torch.sum(parts, dim=0, dtype=out.dtype, out=out)


def backward(dy: Tensor, inputs: ScanInputs, states: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, B, C, A, D, dt_weight and dt_bias; None for those not given."""
    inputs = inputs.unpacked()
    scan, complete = _Scan(inputs, dy), inputs.complete
    x, dt, B, C = inputs[:4]
    plan, acc, rank = scan.plan, scan.acc, scan.rank
    batch, num_routes, dim, d_state, positions = scan.batch, scan.num_routes, scan.dim, scan.d_state, x.shape[1]

    if x.ndim == 3 and num_routes > 1:
        dx = _buffer(x, (num_routes, batch, positions, dim), x.dtype, complete)
        dx_strides = scan.strides(dx.permute(1, 2, 0, 3))
    else:
        dx = torch.empty_like(x) if complete else torch.zeros_like(x)
        dx_strides = scan.strides(dx)
    # dt (low rank), B and C gradients side by side, one part for every channel block
    parts = _buffer(x, (plan.num_blocks, batch, positions, num_routes, rank + 2 * d_state), acc, complete)
    d_B, d_C = parts[..., rank : rank + d_state], parts[..., rank + d_state :]
    if rank:
        d_dt, d_dt_strides = parts, parts.stride()
    else:
        d_dt = torch.empty_like(dt) if complete else torch.zeros_like(dt)
        d_dt_strides = (0, *d_dt.stride())
    per_channel = (batch * scan.num_sequences * plan.num_segments, num_routes, dim)
    d_A = x.new_empty((*per_channel, d_state), dtype=acc)
    d_D = None if inputs.D is None else x.new_empty(per_channel, dtype=acc)
    d_bias = None if inputs.dt_bias is None else x.new_empty(per_channel, dtype=acc)
    d_weight = x.new_empty((*per_channel, rank), dtype=acc) if rank else None

    split = plan.num_segments > 1
    segments = scan.segment_buffers() if split else (d_A, d_A)

    def launch(summary: bool) -> None:
        _backward_kernel[scan.grid()](
            dy,
            x,
            dt,
            B,
            C,
            *scan.params,
            *scan.tables,
            states,
            *segments,
            dx,
            d_dt,
            d_B,
            d_C,
            d_A,
            *(d_A if v is None else v for v in (d_D, d_weight, d_bias)),
            *scan.launch_sizes(),
            scan.gather.stride(0),
            scan.merge.stride(0),
            *scan.strides(dy),
            *scan.strides(x),
            *dt.stride(),
            *B.stride(),
            *C.stride(),
            *dx_strides,
            *d_dt_strides,
            *parts.stride()[:4],
            SPLIT=split,
            SUMMARY=summary,
            **scan.constants,
        )

    if x.numel():
        with torch.cuda.device_of(x):
            if split:
                launch(summary=True)
                scan.carry(*segments, reverse=True)
            launch(summary=False)
    if dx.ndim == 4 and x.ndim == 3:
        dx = dx.sum(0, dtype=acc)
    total = parts.sum(0) if plan.num_blocks > 1 else parts[0]
    if rank:
        d_dt = total[..., :rank]
    sums = (None if v is None else v.sum(0) for v in (d_A, d_D, d_weight, d_bias))
    return dx, d_dt, total[..., rank : rank + d_state], total[..., rank + d_state :], *sums
