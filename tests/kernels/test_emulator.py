"""The primitives that CUDA kernels are made of, as the emulator runs them on the CPU and a GPU runs them itself."""

import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels import emulated
from vmzoo_kernels import nvrtc

EMULATOR = Path(__file__).parent / 'emulator'
CHECKS, FAULTS = EMULATOR / 'checks.cu', EMULATOR / 'faults.cu'


@pytest.fixture(params=[pytest.param('emulator', marks=emulated.needs_compiler), 'gpu'])
def run(request):
    """Runs a kernel of checks.cu: (name, threads, input, shape and dtype of the output) -> output."""
    if request.param == 'gpu' and nvrtc.why_not():
        pytest.skip(nvrtc.why_not())
    device = torch.device('cpu' if request.param == 'emulator' else 'cuda:0')
    load = emulated.load if request.param == 'emulator' else nvrtc.load

    def run(name, threads, source, shape, dtype, *, grid=(1,), shared_bytes=0, n=0):
        source = torch.from_numpy(np.ascontiguousarray(source).view(np.uint8)).to(device)
        output = torch.full((math.prod(shape) * np.dtype(dtype).itemsize,), 0xFF, dtype=torch.uint8, device=device)
        params = struct.pack('PPi4x', source.data_ptr(), output.data_ptr(), n)
        load(CHECKS, (), name, device).launch(grid, threads, shared_bytes, params)
        return output.cpu().numpy().view(dtype).reshape(shape)

    return run


# Strides of NVIDIA's CuTe (mma_traits_sm80.hpp): of lane % 4, of lane // 4, and of the bits of the element's index, in
# matrices a [16, K], b [8, K] and c [16, 8] that are stored by columns.
LAYOUTS = {
    'mma_tf32_k8': (8, (16, 1, 8, 64), (8, 1, 32)),
    'mma_half_k8': (8, (32, 1, 16, 8), (16, 1, 8)),
    'mma_bfloat_k8': (8, (32, 1, 16, 8), (16, 1, 8)),
    'mma_half_k16': (16, (32, 1, 16, 8, 128), (16, 1, 8, 64)),
    'mma_bfloat_k16': (16, (32, 1, 16, 8, 128), (16, 1, 8, 64)),
}
ACCUMULATOR = (32, 1, 16, 8)


def fragment(strides, rows):
    """Rows and columns of the elements that each lane holds, [32, elements]."""
    lane, element = np.arange(32)[:, None], np.arange(2 ** (len(strides) - 2))
    position = lane % 4 * strides[0] + lane // 4 * strides[1]
    position = position + sum((element >> bit & 1) * stride for bit, stride in enumerate(strides[2:]))
    return position % rows, position // rows


def in_16_bits(x, kind):
    """Numbers of a kind ('half' or 'bfloat') as bits, rounded to nearest even."""
    return torch.tensor(x).to({'half': torch.float16, 'bfloat': torch.bfloat16}[kind]).view(torch.int16).numpy()


def from_16_bits(bits, kind):
    bits = torch.tensor(np.asarray(bits).view(np.int16))
    return bits.view({'half': torch.float16, 'bfloat': torch.bfloat16}[kind]).float().numpy()


@pytest.mark.parametrize('name', LAYOUTS)
def test_tensor_cores(run, name):
    kind = name.split('_')[1]
    K, *layouts = LAYOUTS[name]
    a, b = (np.random.randn(rows, K).astype(np.float32) for rows in (16, 8))
    c = np.random.randn(16, 8).astype(np.float32)
    fragments = [x[fragment(layout, len(x))] for x, layout in zip((a, b), layouts)]
    if kind == 'tf32':
        # Tensor cores read the upper 19 bits
        a, b = ((x.view(np.uint32) & 0xFFFFE000).view(np.float32) for x in (a, b))
    else:
        fragments = [in_16_bits(x, kind) for x in fragments]
        a, b = (from_16_bits(in_16_bits(x, kind), kind) for x in (a, b))
    rows, columns = fragment(ACCUMULATOR, 16)
    registers = [x.view(np.uint32) for x in (*fragments, c[rows, columns])]
    d = run(name, 32, np.concatenate(registers, axis=1), (32, 4), np.float32)
    np.testing.assert_allclose(d, (a.astype(np.float64) @ b.T + c)[rows, columns], rtol=0, atol=2e-5)


def test_load_matrices(run):
    matrices = np.random.randint(0, 2**16, (4, 8, 8)).astype(np.uint16)
    registers = run('load_matrices', 32, matrices, (32, 10), np.uint32, shared_bytes=512)

    def expected(matrices):  # lane 4 i + j: columns 2 j and 2 j + 1 of row i
        return np.ascontiguousarray(matrices).reshape(-1, 32, 2).view(np.uint32)[..., 0].T

    straight, transposed = expected(matrices), expected(matrices.transpose(0, 2, 1))
    np.testing.assert_array_equal(registers[:, :4], straight)
    np.testing.assert_array_equal(registers[:, 4:8], transposed)
    np.testing.assert_array_equal(registers[:, 8:], transposed[:, :2])


def test_rounding(run):
    halves = np.arange(2**16, dtype=np.uint16)
    ties = [from_16_bits(halves, kind) for kind in ('half', 'bfloat')]
    # Every number of 16 bits, halfway between it and the next, close to that, and any bits
    x = [
        half.view(np.uint32) + offset for half in ties for offset in (0, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001)
    ]
    x = np.concatenate([*x, np.random.randint(0, 2**32, 10000)]).astype(np.uint32).view(np.float32)
    y = run('convert', 256, x, (len(x), 5), np.uint32, grid=(-(-len(x) // 256),), n=len(x))
    number = ~np.isnan(x)
    for columns, kind in ((y[:, :2], 'half'), (y[:, 2:4], 'bfloat')):
        for column in columns.T:
            np.testing.assert_array_equal(column[number], in_16_bits(x, kind).view(np.uint16)[number])
            assert np.isnan(from_16_bits(column[~number].astype(np.uint16), kind)).all()
    np.testing.assert_array_equal(y[:, 4].view(np.float32), x)


def test_widening(run):
    bits = np.arange(2**16, dtype=np.uint16)
    y = run('widen', 256, bits, (2**16, 4), np.float32, grid=(256,))
    for columns, kind in ((y[:, :2], 'half'), (y[:, 2:], 'bfloat')):
        for column in columns.T:
            np.testing.assert_array_equal(column, from_16_bits(bits, kind))


def test_fast_math(run):
    x = np.exp(np.random.uniform(-20, 4, 1000)).astype(np.float32)
    y = run('fast_math', 256, x, (1000, 2), np.float32, grid=(4,), n=1000)
    np.testing.assert_allclose(y, np.stack([np.exp2(x), 1 / x], axis=1), rtol=1e-6, atol=1e-6)
    tiny = np.array([1e-40, -130, -200], dtype=np.float32)  # subnormal numbers are zero
    y = run('fast_math', 32, tiny, (3, 2), np.float32, n=3)
    assert y[0].tolist() == [1, math.inf]
    assert y[1:, 0].tolist() == [0, 0]


def test_shuffles(run):
    y = run('shuffles', 32, np.zeros(1), (32, 6), np.int32)
    lane = np.arange(32)
    expected = [5 + 0 * lane, lane ^ 3, np.where(lane < 2, lane, lane - 2), np.where(lane > 27, lane, lane + 4)]
    expected += [np.where(lane < 8, lane ^ 1, -1), np.where(lane % 2, 7, -1)]
    np.testing.assert_array_equal(y, np.stack(expected, axis=1))


def test_blocks_synchronise(run):
    x = np.random.randn(5, 256).astype(np.float32)
    sums = run('sum_blocks', 256, x, (5,), np.float32, grid=(5,), shared_bytes=1024)
    np.testing.assert_allclose(sums, x.sum(axis=1, dtype=np.float64), rtol=1e-4, atol=1e-4)


def test_asynchronous_copies(run):
    x = np.random.randn(3, 32, 4).astype(np.float32)
    y = run('pipeline', 32, x, (3, 32), np.float32, shared_bytes=32 * 48)
    x[1] = 0  # copied as zeros
    np.testing.assert_allclose(y, x.sum(axis=2).cumsum(axis=0), atol=1e-5)


def fault(name, threads=32, shared_bytes=0, n=0, reverse=False):
    output = np.zeros(256, dtype=np.float32)
    params = struct.pack('Pi4x', output.ctypes.data, n)
    emulated.load(FAULTS, (), name).launch((1,), threads, shared_bytes, params, reverse)
    return output[:threads]


@emulated.needs_compiler
@pytest.mark.parametrize(
    'name, options, message',
    [
        ('beyond_shared', dict(shared_bytes=96, n=4), r'thread \(24, 0, 0\).* touches byte 96 of the 96 bytes'),
        ('beyond_shared', dict(shared_bytes=16384, n=-1), 'touches byte -1 of the 16384 bytes'),
        ('beyond_array', dict(n=4), 'an index outside of an array'),
        ('beyond_memory', dict(n=64), 'touches the address 0x40, where no memory is'),
        ('misaligned', dict(n=1), 'a misaligned access'),
        ('divergent', {}, 'divergent warp: a shuffle .* but lane 0 is in __syncwarp'),
        ('left_lane', dict(n=3), 'waits for lane 0, which left the kernel'),
        (
            'deadlock',
            dict(threads=64),
            'deadlock .* 48 of 64 threads in __syncthreads; 16 lanes of warp 0 in',
        ),
        ('deep_stack', dict(n=5), 'needs more than 65536 bytes of stack'),
        ('race', dict(threads=33), 'whole warps'),
    ],
)
def test_faults_are_named(name, options, message):
    with pytest.raises(RuntimeError, match=message):
        fault(name, **options)
    assert (fault('race', shared_bytes=128) == 1).all()  # the next launch works


@emulated.needs_compiler
def test_reading_before_writing_shows():
    for reverse in (False, True):
        assert np.isnan(fault('race', shared_bytes=128, n=1, reverse=reverse)).sum() == 16
        assert not np.isnan(fault('race', shared_bytes=128, n=0, reverse=reverse)).any()
    assert np.isnan(fault('missing_wait', shared_bytes=128)).all()


@emulated.needs_compiler
def test_params_of_another_size_are_refused():
    with pytest.raises(RuntimeError, match='a struct of 16 bytes, not 3'):
        emulated.load(FAULTS, (), 'race').launch((1,), 32, 128, b'abc')


@emulated.needs_compiler
def test_errors_of_the_compiler_are_shown():
    with pytest.raises(RuntimeError, match=r'(?s)faults.cu does not compile.*nothing.*was not declared'):
        emulated.load(FAULTS, (('memory', 'nothing.x'),), 'race')
