"""The 1-D selective scan: published values and gradients, and the forms that mamba-ssm's function accepts."""

import numpy as np
import pytest
import torch
from golden import golden

from kernels import emulated
from vmzoo_kernels import cuda_sequence, ops, selective_scan
from vmzoo_kernels.reference import selective_scan_reference

TRANSFORMS = {
    'x': lambda x: x,
    '0.5*x': lambda x: 0.5 * x,
    '10*x': lambda x: 10 * x,
    'x-4': lambda x: x - 4,
    '0.1*abs(x)': lambda x: 0.1 * np.abs(x),
    '-exp(x)': lambda x: -np.exp(x),
    '-exp(0.5 * x)': lambda x: -np.exp(0.5 * x),
    '-4*exp(x)': lambda x: -4 * np.exp(x),
}
KINDS = ('selective_scan', 'local_bidir_scan')
FIXTURES = sorted(f'ops/{path.stem}' for kind in KINDS for path in (golden.DIR / 'ops').glob(f'{kind}_*.npz'))
# Every branch of the kernels once, where it is quick: no D, no bias, no softplus, groups, segments, extreme values.
ENDINGS = ('_plain', '_nosoftplus', '_nobias', '_extreme', '_L20_M8_g2', '_L16_M16')
INTERPRETED = [name for name in FIXTURES if name.endswith(ENDINGS)]


def is_one_way(name):
    return name.startswith('ops/selective_scan')


def check_fixture(name, backend, device, dtype, tolerance):
    meta, want = golden.load(name)
    inputs = {
        key: TRANSFORMS[v.get('transform', 'x')](golden.make_input(v['shape'], v['seed']).astype(np.float64))
        for key, v in meta['inputs'].items()
    }
    inputs = {key: torch.from_numpy(v).to(device, dtype).requires_grad_() for key, v in inputs.items()}
    dout = inputs.pop('dout' if 'dout' in inputs else 'dy')
    options = {key: meta['config'][key] for key in ('delta_softplus', 'segment') if key in meta['config']}
    y, last = selective_scan(**inputs, **options, return_last_state=True, backend=backend)
    (y * dout).sum().backward()
    got = {'y': y, 'last_state': last, **{f'd{key}': v.grad for key, v in inputs.items()}}
    assert got.keys() - want.keys() <= {'last_state'}
    for key in want:
        value = got[key]
        if np.linalg.norm(want[key]) > 0:
            assert golden.error(value.numpy(force=True), want[key]) < tolerance, key
        else:
            assert value.abs().max() < tolerance, key


@pytest.mark.parametrize('name', FIXTURES)
def test_published_values_and_gradients(name):
    check_fixture(name, 'torch', 'cpu', torch.float64, 1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason='the interpreter is for machines without a GPU')
@pytest.mark.parametrize('name', INTERPRETED)
def test_published_values_in_the_interpreter(name):
    check_fixture(name, 'triton', 'cpu', torch.float64, 1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('backend', ['triton', 'cuda'])
@pytest.mark.parametrize('name', FIXTURES)
def test_published_values_on_the_gpu(name, backend):
    if backend == 'cuda' and not is_one_way(name):
        pytest.skip('its kernels scan in one direction')
    check_fixture(name, backend, 'cuda', torch.float32, 1e-4)


@emulated.needs_compiler
@pytest.mark.parametrize('name', filter(is_one_way, INTERPRETED))
def test_published_values_in_the_emulator(name, monkeypatch):
    monkeypatch.setattr(cuda_sequence, 'load', emulated.load)
    monkeypatch.setattr(ops, 'resolve_backend', lambda *args: 'cuda')
    cuda_sequence._plan.cache_clear()
    check_fixture(name, 'cuda', 'cpu', torch.float32, 1e-4)
    cuda_sequence._plan.cache_clear()


def make(batch=2, dim=6, length=13, d_state=3, groups=2, dtype=torch.float64):
    return {
        'u': torch.randn(batch, dim, length, dtype=dtype),
        'delta': torch.randn(batch, dim, length, dtype=dtype),
        'A': -torch.rand(dim, d_state, dtype=dtype),
        'B': torch.randn(batch, groups, d_state, length, dtype=dtype),
        'C': torch.randn(batch, groups, d_state, length, dtype=dtype),
        'delta_softplus': True,
    }


def test_b_and_c_in_every_form():
    inputs = make(groups=1)
    want = selective_scan(**inputs)
    three = {**inputs, 'B': inputs['B'][:, 0], 'C': inputs['C'][:, 0]}
    torch.testing.assert_close(selective_scan(**three), want)
    grouped = {**inputs, 'B': inputs['B'].expand(-1, 3, -1, -1)}  # C has one group, B three equal ones
    torch.testing.assert_close(selective_scan(**grouped), want)
    constant = torch.randn(6, 3, dtype=torch.float64)
    got = selective_scan(**{**inputs, 'B': constant})
    each = constant[None, :, :, None].expand(2, 6, 3, 13)
    want, _ = selective_scan_reference(**{**inputs, 'B': each, 'C': inputs['C'].expand(-1, 6, -1, -1)})
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_keeps_a_float32_state(dtype):
    inputs = {k: v.to(dtype) if isinstance(v, torch.Tensor) and k != 'A' else v for k, v in make().items()}
    y, last = selective_scan(**inputs, return_last_state=True)
    assert y.dtype == dtype and last.dtype == torch.float32
    gated = selective_scan(**{**inputs, 'u': inputs['u'].requires_grad_(), 'z': torch.randn(2, 6, 13)})
    assert gated.dtype == dtype
    gated.sum().backward()
    assert inputs['u'].grad.dtype == dtype
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    want = selective_scan(**exact)
    assert (y - want).norm() <= {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype] * want.norm()


@pytest.mark.parametrize('length, steps', [(1, 4), (128, 4), (129, 8), (256, 8), (257, 16)])
def test_automatic_segments_are_the_published_ones(length, steps):
    inputs = make(length=length)
    got, want, plain = (selective_scan(**inputs, segment=segment) for segment in ('auto', steps, None))
    assert torch.equal(got, want)
    assert torch.equal(got, plain) == (length == 1)
    assert torch.equal(plain, selective_scan(**inputs, segment=1))


@pytest.mark.parametrize('segment', [13, 64])
def test_a_segment_of_the_whole_sequence_is_a_scan_in_both_directions(segment):
    inputs = make()
    got, last = selective_scan(**inputs, segment=segment, return_last_state=True)
    forward, want_last = selective_scan(**inputs, return_last_state=True)
    backward = selective_scan(**{k: v.flip(-1) if k in ('u', 'delta', 'B', 'C') else v for k, v in inputs.items()})
    both = torch.nn.functional.softplus(inputs['delta']) * inputs['u']
    both = both * (inputs['B'] * inputs['C']).sum(2).repeat_interleave(3, dim=1)  # the step itself is counted once
    torch.testing.assert_close(got, forward + backward.flip(-1) - both)
    torch.testing.assert_close(last, want_last)


def test_empty_batch():
    y, last = selective_scan(**make(batch=0), return_last_state=True)
    assert y.shape == (0, 6, 13) and last.shape == (0, 6, 3)


def test_only_what_needs_a_gradient_gets_one():
    """Without D and bias, and whichever of the rest is trained; no gradient flows through the last state."""
    inputs = make()
    tensors = {k: v.requires_grad_() for k, v in inputs.items() if k != 'delta_softplus'}
    want = dict(zip(tensors, torch.autograd.grad(selective_scan(**inputs).sum(), tensors.values())))
    for name in tensors:
        frozen = {k: v if k in (name, 'delta_softplus') else v.detach() for k, v in inputs.items()}
        y, last = selective_scan(**frozen, return_last_state=True)
        assert not last.requires_grad
        torch.testing.assert_close(torch.autograd.grad(y.sum(), frozen[name])[0], want[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    'change, error, message',
    [
        ({'delta': torch.randn(2, 6, 12)}, ValueError, 'delta should be'),
        ({'B': torch.randn(2, 4, 3, 13)}, ValueError, 'G dividing D'),
        ({'A': torch.randn(6)}, ValueError, r'A \[D, N\]'),
        ({'D': torch.randn(5)}, ValueError, 'D should be'),
        ({**make(length=0)}, ValueError, 'no step to scan'),
        ({'z': torch.randn(2, 6, 1)}, ValueError, 'z should be'),
        ({'segment': 0}, ValueError, "at least 1, 'auto' or None, got 0"),
        ({'segment': 'all'}, ValueError, "at least 1, 'auto' or None, got 'all'"),
        ({'B': torch.randn(2, 2, 3, 13, dtype=torch.complex64)}, TypeError, 'complex'),
        ({'A': torch.ones(6, 3, dtype=torch.int64)}, TypeError, 'floating point'),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        selective_scan(**{**make(), **change})
