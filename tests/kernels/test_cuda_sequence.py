"""The CUDA kernels of the 1-D scan: on the CPU through the emulator, compiled for GPUs that need not be there, and on a
GPU."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import emulated
from vmzoo_kernels import cuda_sequence, nvrtc, ops, selective_scan
from vmzoo_kernels.reference import selective_scan_reference

GPU = torch.cuda.is_available()
NAMES = ('u', 'delta', 'B', 'C', 'A', 'D', 'delta_bias')
NO_SPILLS = ('--ptxas-options=--warn-on-spills', '--ptxas-options=--warning-as-error')
FLOOR = {torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}  # of an error


def forget_plans():
    cuda_sequence._plan.cache_clear()


@pytest.fixture(params=[pytest.param(False, id='in order'), pytest.param(True, id='backwards')])
def emulator(request, monkeypatch):
    """Kernels run on the CPU, blocks and threads that nothing orders in either order."""

    def load(*args):
        kernel = emulated.load(*args)

        class Ordered:
            def launch(self, *launch_args):
                kernel.launch(*launch_args, reverse=request.param)

        return Ordered()

    monkeypatch.setattr(cuda_sequence, 'load', load)
    monkeypatch.setattr(ops, 'resolve_backend', lambda backend, *args: 'cuda' if backend == 'auto' else backend)
    forget_plans()
    yield
    forget_plans()


def make(batch, dim, length, d_state, groups=1, dtype=torch.float16, device='cpu'):
    """Inputs of selective_scan with realistic ranges."""

    def normal(*shape):
        return torch.randn(*shape, device=device)

    return {
        'u': normal(batch, dim, length).to(dtype),
        'delta': normal(batch, dim, length).to(dtype),
        'B': normal(batch, groups, d_state, length).to(dtype),
        'C': normal(batch, groups, d_state, length).to(dtype),
        'A': -torch.exp(0.5 * normal(dim, d_state)),
        'D': normal(dim),
        'delta_bias': normal(dim) - 2,
    }


def value_and_grads(function, inputs, dy, **options):
    """y, the last state and the gradients of all tensors."""
    leaves = {name: v.detach().requires_grad_() for name, v in inputs.items()}
    y, last = function(**leaves, **options)
    grads = torch.autograd.grad(y, leaves.values(), dy.to(y.dtype))
    return {'y': y.detach(), 'last': last.detach(), **{f'd{name}': grad for name, grad in zip(leaves, grads)}}


def check(inputs, softplus=True, dy=None, backend='auto'):
    """Against float64: outputs at most 2x, gradients at most 3x the error of the torch backend in the same dtype."""
    dy = torch.randn_like(inputs['u']) if dy is None else dy
    options = {'delta_softplus': softplus}
    exact = {name: v.double() for name, v in inputs.items()}
    want = value_and_grads(selective_scan_reference, exact, dy, **options)
    eager, got = (
        value_and_grads(selective_scan, inputs, dy, return_last_state=True, backend=name, **options)
        for name in ('torch', backend)
    )
    for key, value in want.items():
        errors = [((v[key].double() - value).norm() / value.norm().clamp(min=1e-30)).item() for v in (got, eager)]
        allowed = (2 if key in ('y', 'last') else 3) * max(errors[1], FLOOR[eager[key].dtype])
        assert got[key].dtype == eager[key].dtype and got[key].shape == value.shape, key
        assert errors[0] <= allowed or value.norm() <= 1e-12, (key, *errors)
    return got


CASES = [  # batch, channels, length, d_state, groups
    (2, 8, 128, 1, 1),
    (1, 40, 50, 1, 1),  # two blocks, a tail
    (1, 36, 64, 2, 1),  # blocks of several warps and one channel too few
    (1, 6, 257, 16, 1),
    (2, 5, 7, 5, 1),
    (1, 12, 63, 3, 3),
    (1, 3, 1, 1, 1),
    (1, 16, 72, 4, 4),
]


@emulated.needs_compiler
@pytest.mark.parametrize('case', CASES, ids=str)
def test_emulated_kernels_are_the_reference(emulator, case):
    check(make(*case))


@emulated.needs_compiler
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize('length', [65, 136])
def test_emulated_dtypes(emulator, dtype, length):
    check(make(1, 7, length, 2, dtype=dtype))


@emulated.needs_compiler
def test_emulated_dtypes_that_differ(emulator):
    inputs = make(1, 8, 88, 2)
    check(inputs | {'delta': inputs['delta'].float(), 'B': inputs['B'].bfloat16(), 'C': inputs['C'].float()})


@emulated.needs_compiler
def test_emulated_without_what_is_optional(emulator):
    inputs = make(1, 5, 70, 2)
    inputs = {name: v for name, v in inputs.items() if name not in ('D', 'delta_bias')}
    check(inputs | {'delta': 0.1 * inputs['delta'].abs()}, softplus=False)


@emulated.needs_compiler
@pytest.mark.parametrize('length, d_state', [(1025, 2), (1040, 1)])
def test_emulated_segments_of_long_sequences(emulator, length, d_state):
    inputs = make(1, 4, length, d_state)
    check(inputs)
    plan = cuda_sequence._plan(torch.device('cpu'), (torch.float16,) * 4, 1, 1, 4, d_state, length, True, True)
    assert plan.num_segments > 1


@emulated.needs_compiler
def test_emulated_awkward_memory(emulator):
    """Halves of a wider tensor, channels-last inputs, rows that start anywhere, a gradient that is one number."""
    inputs = make(2, 8, 72, 2)
    parts = torch.cat((inputs['u'], inputs['delta']), dim=1).chunk(2, dim=1)
    check(inputs | {'u': parts[0], 'delta': parts[1]})
    check(inputs | {'u': inputs['u'].mT.contiguous().mT, 'C': inputs['C'].mT.contiguous().mT})
    odd = torch.zeros(2, 8, 73, dtype=torch.float16)[..., 1:].copy_(inputs['u'])
    check(inputs | {'u': odd}, dy=torch.ones((), dtype=torch.float16).expand(2, 8, 72))


@emulated.needs_compiler
def test_emulated_backward_is_deterministic(emulator):
    inputs = make(3, 40, 136, 2)
    dy = torch.randn(3, 40, 136)
    first, second = (
        value_and_grads(selective_scan, inputs, dy, delta_softplus=True, return_last_state=True) for _ in range(2)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


@emulated.needs_compiler
@pytest.mark.parametrize('bad', [torch.nan, torch.inf])
def test_emulated_non_finite_values_reach_what_follows_them_and_nothing_else(emulator, bad):
    inputs = make(1, 8, 128, 2)
    inputs['u'][0, 5, 77] = bad
    y = selective_scan(**inputs, delta_softplus=True)
    want = torch.zeros(8, 128, dtype=torch.bool)
    want[5, 77:] = True
    assert torch.equal(~y[0].isfinite(), want)


@emulated.needs_compiler
def test_emulated_without_channels_or_batch(emulator):
    for shape in ((0, 4), (2, 0)):
        inputs = make(*shape, 16, 2)
        results = value_and_grads(
            selective_scan, inputs, torch.zeros(*shape, 16), delta_softplus=True, return_last_state=True
        )
        assert all(torch.equal(v, torch.zeros_like(v)) for v in results.values())


@emulated.needs_compiler
def test_emulated_operator_registration(emulator):
    inputs = make(1, 4, 24, 2, dtype=torch.float32)
    arguments = [inputs[name].requires_grad_() for name in NAMES]
    torch.library.opcheck(torch.ops.vmzoo.sequence_scan.default, (*arguments, True, True))


@emulated.needs_compiler
@pytest.mark.parametrize('autocast', [False, True])
def test_emulated_behind_the_operator(emulator, autocast):
    """The call that users make, directly and through torch's dispatcher, gives the same gradients."""
    dtype = torch.float32 if autocast else torch.bfloat16
    inputs = make(2, 8, 40, 2, dtype=dtype)
    inputs = {name: v.requires_grad_() for name, v in inputs.items()}

    def gradients():
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            y = selective_scan(**inputs, delta_softplus=True)
        assert y.dtype == torch.bfloat16
        return torch.autograd.grad(y.float().square().sum(), inputs.values())

    direct = gradients()
    with FlopCounterMode(display=False) as flops:
        dispatched = gradients()
    assert flops.get_total_flops() == 3 * ops.scan_flops(2, 40, 1, 8, 2, 0, True, False)
    for first, second, v in zip(direct, dispatched, inputs.values()):
        assert torch.equal(first, second) and first.dtype == v.dtype


@emulated.needs_compiler
def test_emulated_only_what_needs_a_gradient_gets_one(emulator):
    inputs = make(1, 4, 24, 2)
    inputs['C'].requires_grad_()
    y, last = selective_scan(**inputs, return_last_state=True)
    y.sum().backward()
    assert not last.requires_grad and inputs['C'].grad is not None and inputs['u'].grad is None
    (grad,) = torch.autograd.grad(selective_scan(**inputs).sum(), inputs['C'], create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


@pytest.mark.parametrize('arch', ['sm_80', 'sm_90', 'sm_100'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize('d_state, length', [(1, 3136), (16, 3136), (16, 197)])
def test_kernels_compile(monkeypatch, tmp_path, arch, dtype, d_state, length):
    """And keep what they work with in registers."""
    monkeypatch.setenv('VMZOO_CACHE_DIR', str(tmp_path))
    compiled = []

    class Compiled:
        def launch(self, *args):
            pass

    def load(source, defines, kernel, device):
        assert nvrtc.compile_only(source, defines, kernel, arch, NO_SPILLS)
        compiled.append(kernel)
        return Compiled()

    monkeypatch.setattr(cuda_sequence, 'load', load)
    monkeypatch.setattr(cuda_sequence, '_device', lambda device: cuda_sequence._Device(232448, 233472, 132))
    monkeypatch.setattr(ops, 'resolve_backend', lambda *args: 'cuda')
    forget_plans()
    inputs = make(1, 32, length, d_state, dtype=dtype)
    dy = torch.randn(1, 32, length)
    value_and_grads(selective_scan, inputs, dy, delta_softplus=True, return_last_state=True)
    forget_plans()
    sums = {'sum_projections', 'sum_sequence_params'}
    carry = {'sequence_carry'} if length > 1000 else set()
    assert set(compiled) == {'sequence_forward', 'sequence_backward'} | sums | carry


def test_shared_memory_fits_every_gpu(monkeypatch):
    """Of those that a multiprocessor has least shared memory of, with the largest state."""
    monkeypatch.setattr(cuda_sequence, 'load', lambda *args: None)
    monkeypatch.setattr(cuda_sequence, '_device', lambda device: cuda_sequence._Device(101376, 102400, 84))
    forget_plans()
    for dtype, d_state, backward in itertools.product((torch.float16, torch.float32), (1, 16, 32), (False, True)):
        plan = cuda_sequence._plan(torch.device('cpu'), (dtype,) * 4, 2, 1, 96, d_state, 64, True, backward)
        assert plan.shared_bytes <= 101376
    forget_plans()


def test_what_the_kernels_do_not_take_is_named():
    half = [torch.float16] * 4
    assert cuda_sequence.why_not(half, 96, 1, 16) is None
    assert cuda_sequence.why_not(half, 3, 1, 1) is None
    assert 'not torch.float64' in cuda_sequence.why_not([*half[1:], torch.float64], 96, 1, 1)
    assert 'not 96 groups of 96 channels' in cuda_sequence.why_not(half, 96, 96, 1)
    assert 'up to 32, not 64' in cuda_sequence.why_not(half, 96, 1, 64)


@pytest.mark.skipif(not GPU, reason='needs a GPU')
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    'case',
    [
        *CASES,
        (64, 384, 196, 16, 1),
        (3, 384, 197, 16, 1),
        (2, 96, 3136, 1, 4),
        (5, 192, 784, 1, 1),
        (1, 64, 4099, 16, 1),
        (1, 32, 20000, 4, 1),
        (130, 768, 49, 1, 1),
        (2, 48, 1025, 32, 2),
    ],
    ids=str,
)
def test_kernels_on_a_gpu(case, dtype):
    check(make(*case, dtype, device='cuda'), backend='cuda')


@pytest.mark.skipif(not GPU, reason='needs a GPU')
def test_sequences_that_start_beyond_31_bits():
    """The last of many batch items comes out as it does alone."""
    inputs = make(1, 64, 2**14, 1, device='cuda')
    many = {name: v.expand(2**11 + 1, *v.shape[1:]) if v.ndim > 2 else v for name, v in inputs.items()}
    many = {name: v.contiguous() if name in ('u', 'delta') else v for name, v in many.items()}
    y = selective_scan(**many, delta_softplus=True, backend='cuda')
    torch.testing.assert_close(y[-1:], selective_scan(**inputs, delta_softplus=True, backend='triton'))
