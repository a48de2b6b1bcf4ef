"""The CUDA kernels: on the CPU through the emulator, compiled for GPUs that need not be there, and on a GPU."""

import pytest
import torch

from kernels import emulated
from vmzoo_kernels import chunked, cuda_scan, get_routes, nvrtc
from vmzoo_kernels.common import ScanInputs

GPU = torch.cuda.is_available()
NAMES = ('y', 'last', 'dx', 'd_dt', 'd_B', 'd_C', 'd_A', 'd_D', 'd_weight', 'd_bias')


@pytest.fixture(params=[pytest.param(False, id='in order'), pytest.param(True, id='backwards')])
def emulator(request, monkeypatch):
    """Kernels run on the CPU, blocks and threads that nothing orders in either order."""

    def load(*args):
        kernel = emulated.load(*args)

        class Ordered:
            def launch(self, *launch_args):
                kernel.launch(*launch_args, reverse=request.param)

        return Ordered()

    monkeypatch.setattr(cuda_scan, 'load', load)
    forget_plans()
    yield
    forget_plans()


def forget_plans():
    for cached in (cuda_scan._forward, cuda_scan._backward, cuda_scan._plan):
        cached.cache_clear()


def make(size, dim, d_state, rank, name, dtype=torch.float16, batch=1, per_route=False, device='cpu'):
    """Inputs with realistic ranges; rows are dt | B | C in one tensor."""
    routes = get_routes(name, *size, device=device)
    k, length = routes.num_routes, routes.num_positions

    def normal(*shape):
        return torch.randn(*shape).to(device)  # the same on every device

    tensors = (
        (normal(batch, length, k, dim) if per_route else normal(batch, length, dim)).to(dtype),
        normal(batch, length, k, rank + 2 * d_state).to(dtype),
        *(None, None),
        -torch.exp(0.5 * normal(k, dim, d_state)),
        normal(k, dim),
        (normal(k, dim, rank) * rank**-0.5).to(dtype).float(),  # exact in the dtype of the matrix unit
        normal(k, dim) - 2,
    )
    return ScanInputs(*tensors, *routes[:2], routes.complete, True)


def run(scan, inputs, dy, out_dtype, tile=cuda_scan.TILE):
    """Outputs and all gradients of a backend."""
    (k, dim, d_state), (sequences, steps) = inputs.A.shape, inputs.gather.shape[1:]
    acc = torch.float64 if inputs.x.dtype == torch.float64 else torch.float32
    y = torch.empty(dy.shape, dtype=out_dtype, device=dy.device)
    last = torch.full((len(dy), k, sequences, dim, d_state), torch.nan, dtype=acc, device=dy.device)
    if scan is chunked:
        chunked.forward(inputs, y, last)
        grads = chunked.backward(dy, inputs)
        grads = (grads[0], torch.cat(grads[1:4], dim=-1), *grads[4:])
    else:
        states = torch.full((len(dy), k, -(-sequences * steps // tile), d_state, dim), torch.nan, device=dy.device)
        scan.forward(inputs, y, last, states)
        grads = scan.backward(dy, inputs, states)
        grads = (grads[0], grads[1], *grads[4:])
    rows = grads[1].split([inputs.dt_weight.shape[-1], d_state, d_state], dim=-1)
    return dict(zip(NAMES, (y, last if sequences == 1 else y, grads[0], *rows, *grads[2:])))


def check(inputs, merge=True, out_dtype=torch.float32):
    """Against float64: what flows is as exact as its dtype, what is float32 as exact as the softplus, to 8e-6."""
    x, k, dtype = inputs.x, inputs.A.shape[0], inputs.x.dtype
    dy = torch.randn(*x.shape[:2], *(() if merge else (k,)), x.shape[-1]).to(x.device, out_dtype)
    want = run(chunked, inputs.in_dtype(torch.float64), dy.double(), torch.float64)
    got = run(cuda_scan, inputs, dy, out_dtype)
    flowing = 6e-4 if dtype == torch.float16 else 5e-3
    for name in NAMES:
        exact = name in ('last', 'd_A', 'd_D', 'd_bias') or (name == 'y' and out_dtype == torch.float32)
        error = (got[name].double() - want[name]).norm() / want[name].norm().clamp(min=1e-9)
        assert error < (2e-5 if exact else flowing), (name, error.item())


CASES = [  # map, channels, d_state, dt_rank, routes
    ((1, 1), 32, 1, 1, 'cross'),
    ((6, 8), 32, 1, 6, 'cross'),  # whole tiles
    ((9, 14), 40, 1, 12, 'cross'),  # channels beyond those of a warp
    ((11, 17), 8, 1, 24, 'bidi'),
    ((14, 14), 32, 1, 48, 'rotate'),
    ((13, 20), 16, 1, 3, 'unidi'),
    ((9, 9), 16, 4, 3, 'cross'),
    ((10, 11), 32, 16, 17, 'forward_backward'),
    ((20, 11), 16, 3, 5, 'forward_backward'),
    ((13, 9), 16, 1, 5, 'cascade_rows'),
    ((15, 9), 16, 2, 4, 'cascade_cols'),
    ((8, 13), 72, 1, 7, 'forward'),
]


@emulated.needs_compiler
@pytest.mark.parametrize('size, dim, d_state, rank, routes', CASES, ids=str)
def test_emulated_kernels_are_the_reference(emulator, size, dim, d_state, rank, routes):
    check(make(size, dim, d_state, rank, routes))


@emulated.needs_compiler
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('merge, per_route, out_half', [(True, False, True), (False, True, False), (True, True, False)])
def test_emulated_forms_of_input_and_output(emulator, dtype, merge, per_route, out_half):
    inputs = make((10, 12), 16, 1, 6, 'forward_backward', dtype, per_route=per_route)
    check(inputs, merge, dtype if out_half else torch.float32)


@emulated.needs_compiler
@pytest.mark.parametrize('d_state, routes', [(1, 'cross'), (1, 'unidi'), (2, 'bidi'), (1, 'cascade_rows')])
def test_emulated_segments_of_long_maps(emulator, monkeypatch, d_state, routes):
    monkeypatch.setattr(cuda_scan, '_device', lambda device: cuda_scan._Device(232448, 233472, 2))
    inputs = make((31, 29), 16, d_state, 6, routes)
    check(inputs)
    assert cuda_scan._plan.cache_info().currsize == 2  # forward and backward
    kernel = cuda_scan._forward_kernel(6, d_state, 4)
    assert cuda_scan._plan(inputs.x.device, kernel, 1, inputs.A.shape[0], 899).num_segments > 1


@emulated.needs_compiler
def test_emulated_batch_items_that_share_a_warp(emulator, monkeypatch):
    monkeypatch.setattr(cuda_scan, '_device', lambda device: cuda_scan._Device(232448, 233472, 1))
    inputs = make((5, 7), 32, 1, 6, 'cross', batch=51)
    assert cuda_scan._plan(inputs.x.device, cuda_scan._backward_kernel(6, 1, 4), 51, 4, 35).items > 1
    check(inputs)


@emulated.needs_compiler
def test_emulated_awkward_memory(emulator):
    """Rows that start anywhere or in another dtype, a slice of a wider map, parameters at odd addresses."""
    inputs = make((6, 9), 48, 1, 6, 'cross', batch=2)
    wide = torch.zeros(2, 54, 51, dtype=torch.float16)
    wide[..., 1:49] = inputs.x
    check(inputs._replace(x=wide[..., 1:49]))
    padded = torch.zeros(2, 54, 4, 11, dtype=torch.float16)
    padded[..., 3:] = inputs.dt
    check(inputs._replace(dt=padded[..., 3:]))
    check(inputs._replace(dt=inputs.dt.float()))
    odd = [torch.zeros(v.numel() + 1)[1:].view(v.shape).copy_(v) for v in inputs[4:8]]
    check(inputs._replace(A=odd[0], D=odd[1], dt_weight=odd[2], dt_bias=odd[3]))


@emulated.needs_compiler
def test_emulated_backward_is_deterministic(emulator):
    inputs = make((9, 11), 16, 1, 6, 'cross', batch=3)
    dy = torch.randn(3, 99, 16)
    first, second = (run(cuda_scan, inputs, dy, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


@emulated.needs_compiler
def test_emulated_non_finite_values_are_kept(emulator):
    """NaN stays in the state: every position is behind the bad one on some route."""
    inputs = make((10, 12), 16, 1, 6, 'cross')
    inputs.x[0, 50] = torch.nan
    y = run(cuda_scan, inputs, torch.randn(1, 120, 16), torch.float32)['y']
    assert y.isnan().all()


@pytest.mark.parametrize('arch', ['sm_80', 'sm_90', 'sm_100'])
@pytest.mark.parametrize('rank, d_state', [(6, 1), (48, 1), (12, 16)])
def test_kernels_compile(monkeypatch, arch, rank, d_state):
    compiled = []

    class Compiled:
        def launch(self, *args):
            pass

    def load(source, defines, kernel, device):
        compiled.append(kernel)
        assert nvrtc.compile_only(source, defines, kernel, arch)
        return Compiled()

    monkeypatch.setattr(cuda_scan, 'load', load)
    monkeypatch.setattr(cuda_scan, '_device', lambda device: cuda_scan._Device(232448, 233472, 8))
    forget_plans()
    inputs = make((31, 29), 16, d_state, rank, 'cross')
    run(cuda_scan, inputs, torch.randn(1, 899, 16), torch.float32)
    forget_plans()
    assert set(compiled) == {'scan_forward', 'scan_backward', 'scan_carry', 'scan_sums'}


@pytest.mark.parametrize('rank, d_state', [(1, 1), (126, 1), (96, 16), (1, 63)])
def test_shared_memory_fits_every_gpu(monkeypatch, rank, d_state):
    """Of those whose blocks may have least shared memory; 63 states in blocks of fewer warps."""
    monkeypatch.setattr(cuda_scan, '_device', lambda device: cuda_scan._Device(101376, 102400, 84))
    forget_plans()
    for kernel in (cuda_scan._forward_kernel(rank, d_state, 4), cuda_scan._backward_kernel(rank, d_state, 4)):
        plan = cuda_scan._plan(torch.device('cpu'), kernel, 2, 12, 64)
        assert 1 <= plan.warps <= 4
        assert plan.warps * kernel.warp_bytes <= 101376
    forget_plans()


@emulated.needs_compiler
def test_blocks_of_fewer_warps(emulator, monkeypatch):
    monkeypatch.setattr(cuda_scan, '_device', lambda device: cuda_scan._Device(50000, 102400, 2))
    inputs = make((5, 7), 40, 16, 6, 'cross', torch.bfloat16, batch=2)
    check(inputs)
    kernels = cuda_scan._forward_kernel(6, 16, 4), cuda_scan._backward_kernel(6, 16, 4)
    warps = [cuda_scan._plan(inputs.x.device, kernel, 2, 8, 35).warps for kernel in kernels]
    assert max(warps) < 4


def test_what_the_kernels_do_not_take_is_named():
    assert cuda_scan.why_not(torch.float16, torch.float32, 96, 1, 6, True) is None
    assert 'not torch.float32' in cuda_scan.why_not(torch.float32, torch.float32, 96, 1, 6, True)
    assert 'not torch.float64' in cuda_scan.why_not(torch.float16, torch.float64, 96, 1, 6, True)
    assert 'multiple of 8 channels, not 36' in cuda_scan.why_not(torch.float16, torch.float32, 36, 1, 6, True)
    assert 'up to 128, not 134' in cuda_scan.why_not(torch.float16, torch.float32, 96, 64, 6, True)
    assert 'every position once' in cuda_scan.why_not(torch.float16, torch.float32, 96, 1, 6, False)


@pytest.mark.skipif(not GPU, reason='needs a GPU')
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    'size, dim, d_state, rank, routes, batch',
    [(*case, 2) for case in CASES]
    + [
        ((56, 56), 96, 1, 6, 'cross', 3),
        ((28, 28), 192, 1, 12, 'cross', 5),
        ((14, 14), 384, 1, 24, 'cross', 40),
        ((7, 7), 768, 1, 48, 'cross', 130),
        ((56, 56), 32, 16, 12, 'cross', 2),
        ((97, 101), 32, 1, 6, 'cross', 2),
        ((97, 101), 32, 4, 6, 'unidi', 1),
        ((256, 255), 32, 1, 6, 'bidi', 1),
    ],
    ids=str,
)
def test_kernels_on_a_gpu(size, dim, d_state, rank, routes, batch, dtype):
    check(make(size, dim, d_state, rank, routes, dtype, batch, device='cuda'))


@emulated.needs_compiler
@pytest.mark.parametrize('autocast', [False, True])
def test_emulated_behind_the_operator(emulator, monkeypatch, autocast):
    """The call that users make, directly and through torch's dispatcher, gives the same gradients."""
    from torch.utils.flop_counter import FlopCounterMode

    from vmzoo_kernels import ops, route_scan

    monkeypatch.setattr(ops, 'resolve_backend', lambda *args: 'cuda')
    inputs = make((5, 9), 16, 1, 6, 'cross', torch.bfloat16, batch=2)
    dtype = torch.float32 if autocast else torch.bfloat16
    tensors = [
        v.to(dtype if i < 2 else torch.float32).requires_grad_() for i, v in enumerate((*inputs[:2], *inputs[4:8]))
    ]
    routes = get_routes('cross', 5, 9)

    def gradients():
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            y = route_scan(*tensors, routes)
        assert y.dtype == torch.bfloat16
        return torch.autograd.grad(y.float().square().sum(), tensors)

    direct = gradients()
    with FlopCounterMode(display=False) as flops:
        dispatched = gradients()
    assert flops.get_total_flops() > 0
    assert all(torch.equal(*pair) and pair[0].dtype == v.dtype for *pair, v in zip(direct, dispatched, tensors))
