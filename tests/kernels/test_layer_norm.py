"""The norms: kernels against float64 and torch's own norms, and the cases that are left to torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vmzoo_kernels import layer_norm as module
from vmzoo_kernels.backends import interpreted
from vmzoo_kernels.layer_norm import add_layer_norm, layer_norm, rms_norm

SCRIPT = Path(__file__).with_name('compile_layer_norm.py')
HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


@pytest.fixture
def kernels(monkeypatch, device):
    """All that may be fused is, also on a CPU in Triton's interpreter; counts the calls."""
    calls = []

    def counted(*args):
        calls.append(args)
        return fused(*args)

    fused = module._fused_norm
    monkeypatch.setattr(module, '_fused_norm', counted)
    monkeypatch.setattr(module, '_device_has_triton', lambda device: True)
    return calls


def make(device, shape, dtype=FULL, weight_dtype=FULL, bias=True, offset=0.0):
    """x, and a weight and a bias unless `weight_dtype` is None."""
    tensors = [(torch.randn(shape, dtype=torch.float64) + offset).to(dtype)]
    if weight_dtype is not None:
        tensors += [torch.randn(shape[-1]).to(weight_dtype) for _ in range(1 + bias)]
    return [v.to(device).requires_grad_() for v in tensors]


def results(norm, tensors, dy, **kwargs):
    y = norm(*tensors, **kwargs)
    return [y, *torch.autograd.grad(y, tensors, dy.to(y.dtype))]


def torch_norm(norm):
    """Torch's, in the wider dtype of x and weights, rounded to `out_dtype`."""

    def run(x, weight=None, bias=None, eps=1e-5, out_dtype=None):
        dtype = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
        wide = [None if v is None else v.to(dtype) for v in (x, weight, bias)]
        if norm is rms_norm:
            y = F.rms_norm(wide[0], x.shape[-1:], wide[1], eps)
        else:
            y = F.layer_norm(wide[0], x.shape[-1:], *wide[1:], eps)
        return y.to(out_dtype or x.dtype)

    return run


def check(device, shape, norm=layer_norm, dtype=FULL, out_dtype=FULL, weight_dtype=FULL, offset=0.0):
    """Dtypes are torch's; errors no more than twice (gradients: three times) torch's own."""
    tensors = make(device, shape, dtype, weight_dtype, norm is layer_norm, offset)
    dy = torch.randn(shape, dtype=torch.float64, device=device).to(out_dtype)
    got = results(norm, tensors, dy, out_dtype=out_dtype)
    plain = results(torch_norm(norm), tensors, dy, out_dtype=out_dtype)
    want = results(torch_norm(norm), [v.detach().double().requires_grad_() for v in tensors], dy)
    for i, (a, b, exact) in enumerate(zip(got, plain, want)):
        assert a.dtype == b.dtype
        # Where torch's error happens to be next to nothing; gradients of one channel are, times the smallest deviation
        unit = torch.finfo(FULL).eps * (exact.norm() or dy.double().norm() * 1e-5**-0.5)
        assert (a - exact).norm() <= (2, 3, 3, 3)[i] * (b - exact).norm() + unit, f'{i}'


@pytest.mark.parametrize('norm', [layer_norm, rms_norm])
@pytest.mark.parametrize(
    'dtype, out_dtype, weight_dtype',
    [(FULL, FULL, FULL), (FULL, HALF, FULL), (HALF, HALF, FULL), (BF16, BF16, BF16), (HALF, FULL, None)],
    ids=lambda dtype: str(dtype).removeprefix('torch.'),
)
def test_dtypes(kernels, device, norm, dtype, out_dtype, weight_dtype):
    if out_dtype == BF16 and interpreted():
        pytest.skip('the interpreter truncates to bfloat16')
    check(device, (3, 37, 24), norm, dtype, out_dtype, weight_dtype)
    assert kernels


@pytest.mark.parametrize(
    'shape',
    [(1, 1), (5, 1), (1, 7), (2, 3, 5, 31), (1100, 12), (131, 96), (67, 97), (21, 192), (5, 768), (3, 3072)],
    ids=str,
)
def test_shapes(kernels, device, shape):
    """Odd sizes, and more rows (1100) than the backward pass has programs for at once."""
    check(device, shape)
    assert kernels


@pytest.mark.parametrize('norm', [layer_norm, rms_norm])
def test_variance_survives_a_large_mean(kernels, device, norm):
    check(device, (64, 48), norm, offset=1e3)


def test_any_memory_order(kernels, device):
    """Input and gradient are permuted views, as a convolution and its gradient are."""
    (x,) = make(device, (2, 12, 3, 5), weight_dtype=None)
    x, dy = (v.permute(0, 2, 3, 1) for v in (x, torch.randn_like(x)))
    got, want = (results(norm, [x], dy) for norm in (layer_norm, torch_norm(layer_norm)))
    torch.testing.assert_close(got, want)
    assert kernels


def test_gradients_are_reproducible(kernels, device):
    tensors = make(device, (2500, 40), weight_dtype=FULL)
    dy = torch.randn(2500, 40, device=device)
    for a, b in zip(results(layer_norm, tensors, dy), results(layer_norm, tensors, dy)):
        assert torch.equal(a, b)


def test_only_what_needs_a_gradient_gets_one(kernels, device):
    tensors = make(device, (9, 12))
    dy = torch.randn(9, 12, device=device)
    want = results(torch_norm(layer_norm), tensors, dy)[1:]
    for i, expected in enumerate(want):
        frozen = [v if j == i else v.detach() for j, v in enumerate(tensors)]
        (grad,) = torch.autograd.grad(layer_norm(*frozen), frozen[i], dy)
        torch.testing.assert_close(grad, expected)
    assert not layer_norm(*(v.detach() for v in tensors)).requires_grad
    with torch.no_grad():
        assert not layer_norm(*tensors).requires_grad


@pytest.mark.parametrize('norm', [layer_norm, rms_norm])
def test_gradients_of_gradients(kernels, device, norm):
    tensors = make(device, (6, 10), bias=norm is layer_norm)
    dy = torch.randn(6, 10, device=device, requires_grad=True)

    def second(norm):
        grads = torch.autograd.grad(norm(*tensors), tensors, dy, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), [*tensors[:2], dy])

    torch.testing.assert_close(second(norm), second(torch_norm(norm)))
    assert kernels


def test_transforms_are_left_to_torch(kernels, device):
    x, weight, bias = (v.detach() for v in make(device, (4, 6, 8)))
    want = F.layer_norm(x, (8,), weight, bias)

    torch.testing.assert_close(torch.func.vmap(lambda x: layer_norm(x, weight, bias))(x), want)
    grad = torch.func.grad(lambda x: layer_norm(x, weight, bias).square().sum())(x)
    torch.testing.assert_close(grad, torch.func.grad(lambda x: F.layer_norm(x, (8,), weight, bias).square().sum())(x))
    tangent = torch.randn_like(x)
    got, want_jvp = (
        torch.func.jvp(norm, (x,), (tangent,))[1]
        for norm in (lambda x: layer_norm(x, weight, bias), lambda x: F.layer_norm(x, (8,), weight, bias))
    )
    torch.testing.assert_close(got, want_jvp)
    with torch.autograd.forward_ad.dual_level():
        dual = layer_norm(torch.autograd.forward_ad.make_dual(x, tangent), weight, bias)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, want_jvp)
    traced = torch.jit.trace(lambda x: layer_norm(x, weight, bias), (x[:2],), check_trace=False)
    torch.testing.assert_close(traced(x), want)
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: layer_norm(x, weight, bias))(x)
    assert 'layer_norm' in graph.code
    compiled = torch.compile(lambda x: layer_norm(x, weight, bias), fullgraph=True, backend='eager')
    torch.testing.assert_close(compiled(x), want)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        assert layer_norm(fake, out_dtype=HALF).dtype == HALF
    assert layer_norm(fake).shape == x.shape
    assert not kernels


def test_what_the_kernels_do_not_take_is_left_to_torch(kernels, device):
    x = torch.randn(3, 8, dtype=torch.float64, device=device)
    assert torch.equal(layer_norm(x), F.layer_norm(x, (8,)))
    assert layer_norm(x[:0]).shape == (0, 8)
    wide = torch.randn(2, module._MAX_CHANNELS + 1, device=device)
    assert torch.equal(layer_norm(wide), F.layer_norm(wide, wide.shape[-1:]))
    with pytest.raises(RuntimeError, match='shape'):
        layer_norm(x.float(), torch.ones(7, device=device))
    with pytest.raises(RuntimeError, match='normalized_shape'):
        layer_norm(torch.ones((), device=device))
    assert not kernels


def test_on_a_cpu_it_is_torch():
    x, weight, bias = (v.detach() for v in make('cpu', (3, 16)))
    assert torch.equal(layer_norm(x, weight, bias), F.layer_norm(x, (16,), weight, bias))
    assert torch.equal(rms_norm(x, weight), F.rms_norm(x, (16,), weight, 1e-5))
    half = x.bfloat16()  # under autocast: torch takes wider weights
    assert torch.equal(layer_norm(half, weight, bias), F.layer_norm(half, (16,), weight, bias))


@needs_gpu
def test_another_number_of_rows_compiles_nothing(device):
    from vmzoo_kernels import triton_layer_norm

    def variants():
        kernels = (getattr(triton_layer_norm, f'_{name}_kernel') for name in ('forward', 'backward', 'sum'))
        return [len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values()]

    counts = []
    for rows in (16, 1, 17, 4096):
        check(device, (rows, 96))
        counts.append(variants())
    assert all(count == counts[0] for count in counts)


@needs_gpu
def test_offsets_beyond_31_bits(device):
    if torch.cuda.get_device_properties(device).total_memory < 32 * 2**30:
        pytest.skip('needs 32 GB')
    x = torch.randn(2**31 // 96 + 100, 96, dtype=HALF, device=device, requires_grad=True)
    y = layer_norm(x)
    last = x.detach()[-50:].requires_grad_()
    torch.testing.assert_close(y[-50:], F.layer_norm(last, (96,)))
    (grad,) = torch.autograd.grad(y, x, y.detach())
    (want,) = torch.autograd.grad(F.layer_norm(last, (96,)), last, y.detach()[-50:])
    torch.testing.assert_close(grad[-50:], want, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize('target', [('cuda', '90'), ('cuda', '75'), ('hip', 'gfx942')], ids='-'.join)
def test_compiles_for(target, tmp_path):
    env = {key: value for key, value in os.environ.items() if key != 'TRITON_INTERPRET'}
    env['TRITON_CACHE_DIR'] = str(tmp_path)  # compile, rather than find what an earlier run compiled
    done = subprocess.run([sys.executable, SCRIPT, *target], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('_backward_kernel') == 4
    if target == ('cuda', '90'):  # what the speed rests on: masks and mixed dtypes keep loads wide and ahead
        for branch in ('None', 'fp16'):
            assert f'fp32 + {branch} 96 _forward_kernel wide loads: True' in done.stdout
            assert f'fp32 + {branch} 96 _backward_kernel wide loads: False, copies ahead: True' in done.stdout


class TestWithSum:
    """`add_layer_norm` against a sum and torch's norm."""

    @staticmethod
    def make(device, dtype=FULL, branch_dtype=FULL, shape=(3, 37, 24)):
        x, weight, bias = make(device, shape, dtype, FULL)
        branch = torch.randn(shape).to(device, branch_dtype).requires_grad_()
        return [x, branch, weight, bias]

    @staticmethod
    def apart(x, branch, weight, bias, out_dtype=None):
        total = x + branch
        return total, torch_norm(layer_norm)(total, weight, bias, out_dtype=out_dtype)

    @pytest.mark.parametrize('dtype, branch_dtype, out_dtype', [(FULL, FULL, FULL), (FULL, HALF, HALF)], ids=str)
    @pytest.mark.parametrize('used', ['both', 'sum', 'norm'])
    def test_values_and_gradients(self, kernels, device, dtype, branch_dtype, out_dtype, used):
        tensors = self.make(device, dtype, branch_dtype)
        weights = [torch.randn(3, 37, 24, device=device) for _ in range(2)]

        def gradients(function):
            outputs = function(*tensors, out_dtype=out_dtype)
            terms = [(y.float() * w).sum() for y, w in zip(outputs, weights)]
            loss = terms[0] + terms[1] if used == 'both' else terms[used == 'norm']
            return *outputs, *torch.autograd.grad(loss, tensors, allow_unused=True)

        got, want = gradients(add_layer_norm), gradients(self.apart)
        assert kernels
        assert torch.equal(got[0], want[0])
        for a, b in zip(got, want):
            if b is None:
                assert a is None
            else:
                # half a unit of the branch's dtype: apart, its gradient is the sum of two that are rounded
                torch.testing.assert_close(a, b, atol=2e-3 if b.dtype == HALF else 2e-5, rtol=2e-3)

    def test_without_gradients_and_of_frozen_parts(self, kernels, device):
        tensors = self.make(device)
        with torch.no_grad():
            for a, b in zip(add_layer_norm(*tensors), self.apart(*tensors)):
                torch.testing.assert_close(a, b)
        for i in range(4):
            frozen = [v if j == i else v.detach() for j, v in enumerate(tensors)]
            grads = [torch.autograd.grad(f(*frozen)[1].square().sum(), frozen[i]) for f in (add_layer_norm, self.apart)]
            torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)
        assert kernels

    def test_gradients_of_gradients(self, kernels, device):
        tensors = self.make(device, shape=(5, 6))

        def second(function):
            total, y = function(*tensors)
            first = torch.autograd.grad(y.pow(3).sum() + total.square().sum(), tensors, create_graph=True)
            return torch.autograd.grad(sum(v.square().sum() for v in first), tensors)

        torch.testing.assert_close(second(add_layer_norm), second(self.apart), atol=1e-3, rtol=1e-3)
        assert kernels

    def test_what_does_not_fit_is_left_to_torch(self, kernels, device):
        x, branch, weight, bias = self.make(device)
        for other in (branch[:1], branch.double()):
            for a, b in zip(add_layer_norm(x, other, weight, bias), self.apart(x, other, weight, bias, FULL)):
                torch.testing.assert_close(a, b)
        assert not kernels
