"""The fused 2D scan: every backend against the reference, and how it behaves inside torch."""

import gc
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vmzoo_kernels import Routes, chunked, get_routes, route_scan, routes_from_table
from vmzoo_kernels.common import ScanInputs
from vmzoo_kernels.ops import scan_flops
from vmzoo_kernels.reference import route_scan_reference

GPU = torch.cuda.is_available()
BACKENDS = ['torch', 'triton']
NAMES = ('x', 'x_dbl', 'A', 'D', 'dt_weight', 'dt_bias')


def atrous(height: int, width: int) -> Routes:
    """Each of four routes visits a quarter of the positions, padded to one length."""
    pos = torch.arange(height * width).view(height, width)
    steps = -(-height // 2) * -(-width // 2)
    table = torch.full((4, 1, steps), -1)
    for k, (i, j) in enumerate(itertools.product((0, 1), (0, 1))):
        quarter = pos[i::2, j::2].reshape(-1)
        table[k, 0, : len(quarter)] = quarter
    return routes_from_table(table, height * width)


def windows(height: int, width: int) -> Routes:
    """One route of several sequences, with padding in front, inside and at the end."""
    table = torch.full((1, height, width + 3), -1)
    table[0, :, 1:3] = torch.arange(height * width).view(height, width)[:, :2]
    table[0, :, 4 : width + 2] = torch.arange(height * width).view(height, width)[:, 2:]
    return routes_from_table(table, height * width)


def shifted(height: int, width: int) -> Routes:
    """Each output goes to the position after the one that was read: a zero goes in first, the last input is unread."""
    pos = torch.arange(height * width)
    return routes_from_table((pos - 1)[None], height * width, pos[None])


CUSTOM = {'atrous': atrous, 'windows': windows, 'shifted': shifted}


def make(size, dim, d_state, rank, routes, per_route=False, batch=2, dtype=torch.float64, device='cpu'):
    """Inputs of route_scan with realistic ranges, and the routes."""
    routes = CUSTOM[routes](*size) if routes in CUSTOM else get_routes(routes, *size)
    k, length = routes.num_routes, size[0] * size[1]
    inputs = {
        'x': torch.randn(batch, length, k, dim) if per_route else torch.randn(batch, length, dim),
        'x_dbl': torch.randn(batch, length, k, rank + 2 * d_state),
        'A': -torch.exp(0.5 * torch.randn(k, dim, d_state)),
        'D': torch.randn(k, dim),
        'dt_weight': torch.randn(k, dim, rank) * rank**-0.5,
        'dt_bias': torch.randn(k, dim) - 2,
    }
    inputs = {name: v.to(device, dtype) for name, v in inputs.items()}
    return inputs, routes._replace(gather=routes.gather.to(device), merge=routes.merge.to(device))


def value_and_grads(function, inputs, routes, weight=None, **kwargs):
    inputs = {name: v.detach().requires_grad_() for name, v in inputs.items()}
    y = function(**inputs, routes=routes, **kwargs)
    weight = torch.randn_like(y) if weight is None else weight.to(y)
    grads = torch.autograd.grad((y * weight).sum(), inputs.values())
    return {'y': y.detach(), **{f'd{name}': g for name, g in zip(inputs, grads)}}, weight


def error(got, want):
    got, want = got.double(), want.double().to(got.device)
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    return ((got - want).norm() / want.norm().clamp(min=1e-30)).item()


SIZES = [(1, 1), (1, 8), (7, 1), (2, 31), (7, 7), (8, 33), (31, 7), (33, 31), (56, 8), (97, 2)]
ROUTES = ['cross', 'rotate', 'cascade_rows', 'cascade_cols', 'forward_backward', *CUSTOM]


@pytest.mark.parametrize('size', [s for s in SIZES if s[0] * s[1] < 500], ids=str)
@pytest.mark.parametrize('dim, d_state, rank', [(8, 1, 3), (5, 4, 1), (3, 16, 2)])
def test_torch_backend_is_the_reference(size, dim, d_state, rank):
    inputs, routes = make(size, dim, d_state, rank, 'cross')
    want, weight = value_and_grads(route_scan_reference, inputs, routes)
    got, _ = value_and_grads(route_scan, inputs, routes, weight, backend='torch')
    assert all(error(got[key], want[key]) < 1e-12 for key in want)


@pytest.mark.parametrize('routes', ROUTES)
@pytest.mark.parametrize('merge, per_route', [(True, False), (False, False), (True, True), (False, True)])
def test_every_kind_of_route(routes, merge, per_route):
    inputs, routes = make((5, 7), 5, 2, 3, routes, per_route)
    want, weight = value_and_grads(route_scan_reference, inputs, routes, merge=merge)
    got, _ = value_and_grads(route_scan, inputs, routes, weight, merge=merge, backend='torch')
    assert all(error(got[key], want[key]) < 1e-12 for key in want)


@pytest.mark.parametrize('routes', ['cross', 'atrous'])
@pytest.mark.parametrize('merge', [True, False])
@pytest.mark.parametrize('values, blocks', [(1, 12), (400, 6), (1500, 2)], ids=['a route', 'two routes', 'two items'])
def test_torch_backend_in_blocks(routes, merge, values, blocks, monkeypatch):
    monkeypatch.setattr(chunked, '_FORWARD_BLOCK', values)
    monkeypatch.setattr(chunked, '_BACKWARD_BLOCK', values)
    inputs, routes = make((5, 7), 5 if routes == 'cross' else 15, 2, 3, routes, batch=3)
    lanes = chunked._lanes(routes.gather, routes.merge, routes.num_positions, routes.complete)
    assert len(list(chunked._blocks(inputs['x'], lanes, values))) == blocks
    want, weight = value_and_grads(route_scan_reference, inputs, routes, merge=merge)
    got, _ = value_and_grads(route_scan, inputs, routes, weight, merge=merge, backend='torch')
    assert all(error(got[key], want[key]) < 1e-12 for key in want)


@pytest.mark.parametrize('routes', ROUTES)
@pytest.mark.parametrize('segment', [2, 5, 8, 16, 35, 100])
def test_segments_scanned_backwards(routes, segment):
    inputs, routes = make((5, 7), 5, 2, 3, routes)
    want, weight = value_and_grads(route_scan_reference, inputs, routes, segment=segment)
    got, _ = value_and_grads(route_scan, inputs, routes, weight, segment=segment, backend='torch')
    assert all(error(got[key], want[key]) < 1e-12 for key in want)


@pytest.mark.parametrize(
    # several tiles, which the segments fill or do not; padding; several sequences; parts of a sequence side by side
    'routes, size, dim, segment',
    [
        ('forward', (5, 8), 5, 8),
        ('windows', (2, 5), 3, 3),
        ('cascade_rows', (1, 36), 1, 7),
        ('forward', (16, 17), 1, 16),
    ],
)
def test_segments_in_the_kernels(routes, size, dim, segment, device):
    dtype, tolerance = (torch.float32, 1e-5) if GPU else (torch.float64, 1e-12)
    inputs, routes = make(size, dim, 2, 2, routes, batch=1, dtype=dtype, device=device)
    want, weight = value_and_grads(route_scan, inputs, routes, segment=segment, backend='torch')
    got, _ = value_and_grads(route_scan, inputs, routes, weight, segment=segment, backend='triton')
    assert all(error(got[key], want[key]) < tolerance for key in want)


@pytest.mark.parametrize('backend', BACKENDS)
def test_non_finite_values_stay_in_their_segment(backend, device):
    inputs, routes = make((4, 5), 4, 2, 2, 'forward', dtype=torch.float32, device=device)
    inputs['x'][0, 6, 1] = torch.inf
    nonfinite = ~torch.isfinite(route_scan(**inputs, routes=routes, segment=4, backend=backend))
    assert torch.equal(nonfinite[0, :, 1], torch.arange(20, device=device) >= 4)
    assert nonfinite.sum() == 16


def test_what_the_kernels_cannot_scan_backwards(device):
    inputs, routes = make((5, 8), 16, 1, 2, 'forward', dtype=torch.float16, device=device)
    with pytest.raises(RuntimeError, match="'triton' cannot run here: it takes segments of up to 32 steps, not 33"):
        route_scan(**inputs, routes=routes, segment=33, backend='triton')
    with pytest.raises(RuntimeError, match="'cuda' cannot run here: it takes scans in one direction"):
        route_scan(**inputs, routes=routes, segment=8, backend='cuda')


@pytest.mark.parametrize('routes', ROUTES)
@pytest.mark.parametrize('merge', [True, False])
def test_every_kind_of_route_in_the_kernels(routes, merge, device):
    """float64 in the interpreter, float32 compiled."""
    dtype, tolerance = (torch.float32, 1e-5) if GPU else (torch.float64, 1e-12)
    per_route = not merge
    inputs, routes = make((3, 5), 3, 2, 2, routes, per_route, batch=1, dtype=dtype, device=device)
    want, weight = value_and_grads(route_scan, inputs, routes, merge=merge, backend='torch')
    got, _ = value_and_grads(route_scan, inputs, routes, weight, merge=merge, backend='triton')
    assert all(error(got[key], want[key]) < tolerance for key in want)


@pytest.mark.skipif(GPU, reason='the interpreter is for machines without a GPU')
@pytest.mark.parametrize(
    # one step; blocks of channels; several states; segments, of which the last is shorter
    'size, dim, d_state, rank',
    [((1, 1), 3, 1, 1), ((6, 6), 9, 1, 3), ((7, 5), 4, 3, 2), ((17, 17), 2, 1, 1)],
    ids=str,
)
def test_triton_interpreted_is_the_reference(size, dim, d_state, rank):
    inputs, routes = make(size, dim, d_state, rank, 'forward_backward', batch=1)
    want, weight = value_and_grads(route_scan, inputs, routes, backend='torch')
    got, _ = value_and_grads(route_scan, inputs, routes, weight, backend='triton')
    assert all(error(got[key], want[key]) < 1e-12 for key in want)


GPU_GRID = [
    (size, dim, d_state)
    for size, (dim, d_state) in itertools.product(SIZES + [(56, 56)], [(96, 1), (64, 1), (20, 4), (36, 8), (40, 16)])
]
CPU_GRID = [((1, 1), 6, 1), ((5, 8), 6, 1), ((3, 7), 3, 4)]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize('size, dim, d_state', GPU_GRID if GPU else CPU_GRID, ids=str)
def test_error_within_twice_that_of_plain_torch(size, dim, d_state, dtype, device):
    """Against float64: outputs at most 2x, gradients at most 3x the error of the torch backend in the same dtype."""
    batch, routes = (2, 'cross') if GPU else (1, 'forward_backward')
    inputs, routes = make(size, dim, d_state, max(1, dim // 16), routes, batch=batch, device=device)
    low = {name: v if name in ('A', 'D', 'dt_bias') else v.to(dtype).double() for name, v in inputs.items()}
    exact, weight = value_and_grads(route_scan, low, routes, backend='torch')

    def cast(v, name):
        return v.to(torch.float32 if name in ('A', 'D', 'dt_bias') else dtype)

    low = {name: cast(v, name) for name, v in low.items()}

    eager, _ = value_and_grads(route_scan, low, routes, weight, backend='torch')
    fused, _ = value_and_grads(route_scan, low, routes, weight, backend='triton')
    floor = {torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}[dtype]
    for key, want in exact.items():
        allowed = (2 if key == 'y' else 3) * max(error(eager[key], want), floor)
        assert error(fused[key], want) <= allowed, key
        assert fused[key].dtype == eager[key].dtype


@pytest.mark.parametrize('backend', BACKENDS)
def test_strided_and_channels_last_inputs(backend, device):
    inputs, routes = make((3, 4), 6, 2, 2, 'forward_backward', dtype=torch.float32, device=device)
    want, weight = value_and_grads(route_scan, inputs, routes, backend=backend)
    strided = {name: v.transpose(0, -1).contiguous().transpose(0, -1) for name, v in inputs.items()}
    assert not strided['x'].is_contiguous()
    got, _ = value_and_grads(route_scan, strided, routes, weight.transpose(1, 2).contiguous().mT, backend=backend)
    assert all(error(got[key], want[key]) < 1e-5 for key in want)


@pytest.mark.parametrize('backend', BACKENDS)
def test_repeats_bit_for_bit(backend, device):
    # several channel blocks, tiles, routes and batch items: all that is summed
    inputs, routes = make((9, 4), 6, 1, 2, 'forward_backward', dtype=torch.float32, device=device)
    first, weight = value_and_grads(route_scan, inputs, routes, backend=backend)
    for _ in range(3 if GPU else 1):
        again, _ = value_and_grads(route_scan, inputs, routes, weight, backend=backend)
        assert all(torch.equal(again[key], first[key]) for key in first)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_non_finite_values_reach_what_follows_them_and_nothing_else(backend, bad, device):
    inputs, routes = make((4, 5), 4, 2, 2, 'forward_backward', dtype=torch.float32, device=device)
    inputs['x'][0, 7, 1] = bad
    y = route_scan(**inputs, routes=routes, backend=backend, merge=False)
    after = torch.arange(20, device=device) >= 7
    nonfinite = ~torch.isfinite(y)
    assert torch.equal(nonfinite[0, :, 0, 1], after)
    assert torch.equal(nonfinite[0, :, 1, 1], torch.arange(20, device=device) <= 7)
    nonfinite[0, :, :, 1] = False
    assert not nonfinite.any()


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('routes', ['atrous', 'windows'])
def test_non_finite_values_go_where_the_definition_puts_them(backend, routes, device):
    inputs, routes = make((3, 4), 2, 1, 1, routes, batch=1, dtype=torch.float32, device=device)
    for name, bad in itertools.product(('x', 'x_dbl'), (torch.nan, torch.inf, -torch.inf)):
        broken = {**inputs, name: inputs[name].clone()}
        broken[name][0, 0] = bad
        want = route_scan_reference(**broken, routes=routes)
        got = route_scan(**broken, routes=routes, backend=backend)
        assert torch.equal(torch.isfinite(got), torch.isfinite(want)), (name, bad)


def test_gradcheck():
    inputs, routes = make((3, 4), 3, 2, 2, 'cross', batch=1)

    def function(*args):
        return route_scan(*args, routes, backend='torch')

    assert torch.autograd.gradcheck(function, [v.requires_grad_() for v in inputs.values()])


@pytest.mark.skipif(GPU, reason='float64 is the torch backend on a GPU')
def test_gradcheck_of_the_interpreted_kernels():
    inputs, routes = make((2, 2), 2, 1, 1, 'forward_backward', batch=1)

    def function(*args):
        return route_scan(*args, routes, backend='triton')

    assert torch.autograd.gradcheck(function, [v.requires_grad_() for v in inputs.values()], fast_mode=True)


def scan_arguments(inputs, routes, backend, segment=0):
    rank, n = inputs['dt_weight'].shape[-1], inputs['A'].shape[-1]
    dt, b, c = inputs['x_dbl'].split([rank, n, n], dim=-1)
    parameters = (inputs['A'], inputs['D'], inputs['dt_weight'], inputs['dt_bias'])
    tables = (routes.gather, routes.merge, routes.complete)
    options = (*tables, True, segment, True, torch.float32, True, backend)
    return (inputs['x'], dt, b, c, *parameters, *options)


@pytest.mark.parametrize('backend, segment', [*((name, 0) for name in BACKENDS), ('torch', 4)])
def test_operator_registration(backend, segment, device):
    inputs, routes = make((2, 3), 4, 2, 2, 'cross', batch=1, dtype=torch.float32, device=device)
    inputs = {name: v.requires_grad_() for name, v in inputs.items()}
    torch.library.opcheck(torch.ops.vmzoo.scan.default, scan_arguments(inputs, routes, backend, segment))


@pytest.mark.parametrize('dynamic', [False, True])
def test_compiles_without_graph_breaks(dynamic, device):
    def function(x, x_dbl, A, D, dt_weight, dt_bias, height, width):
        routes = get_routes('cross', height, width, device=x.device)
        return route_scan(x, x_dbl, A, D, dt_weight, dt_bias, routes).square()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend='inductor' if GPU else 'aot_eager')
    sizes = [(4, 6), (5, 7), (8, 4)] if dynamic else [(4, 6)]
    for size in sizes:
        inputs, _ = make(size, 8, 1, 2, 'cross', dtype=torch.float32, device=device)
        grads = []
        for call in (function, compiled):
            leaves = [v.clone().requires_grad_() for v in inputs.values()]
            y = call(*leaves, *size)
            grads.append([y, *torch.autograd.grad(y.sum(), leaves)])
        for got, want in zip(*reversed(grads)):
            assert error(got, want) < 1e-5


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(dtype, device):
    inputs, routes = make((4, 5), 8, 1, 2, 'cross', dtype=torch.float32, device=device)
    with torch.autocast(device.type, dtype=dtype):
        got, weight = value_and_grads(route_scan, inputs, routes)
    assert got['y'].dtype == dtype
    assert all(got[f'd{name}'].dtype == torch.float32 for name in NAMES)
    with torch.autocast(device.type, dtype=dtype):
        assert route_scan(**inputs, routes=routes, out_dtype=torch.float32).dtype == torch.float32
    want, _ = value_and_grads(route_scan, inputs, routes, weight)
    assert all(error(got[key], want[key]) < 0.03 for key in want)


def test_float16_sums_can_be_asked_for_in_float32(device):
    inputs, routes = make((3, 3), 4, 1, 1, 'cross', dtype=torch.float32, device=device)
    inputs['x'] = torch.full_like(inputs['x'], 6e4)
    half = {name: v.half() if name in ('x', 'x_dbl', 'dt_weight') else v for name, v in inputs.items()}
    assert torch.isfinite(route_scan(**half, routes=routes, out_dtype=torch.float32)).all()


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('routes', ['cross', 'atrous'])
def test_empty_batch(backend, routes, device):
    inputs, routes = make((3, 3), 4, 2, 1, routes, batch=0, dtype=torch.float32, device=device)
    got, _ = value_and_grads(route_scan, inputs, routes, backend=backend)
    assert got['y'].shape == (0, 9, 4) and (got['dA'] == 0).all() and (got['ddt_weight'] == 0).all()


@pytest.mark.skipif(not GPU, reason='needs a GPU with 16 GiB')
def test_offsets_beyond_31_bits():
    """Rows so far apart that their offsets pass 2^31 elements."""
    inputs, routes = make((2, 3), 8, 1, 1, 'cross', batch=1, dtype=torch.float16, device='cuda')
    want, weight = value_and_grads(route_scan, inputs, routes, backend='triton')
    far = torch.zeros(5 * 2**29 + 8, dtype=torch.float16, device='cuda').as_strided((1, 6, 8), (2**29 * 6, 2**29, 1))
    far.copy_(inputs['x'])
    assert far.stride(1) * 5 > 2**31
    got, _ = value_and_grads(route_scan, {**inputs, 'x': far}, routes, weight, backend='triton')
    assert all(error(got[key], want[key]) < 1e-6 for key in want)


@pytest.mark.parametrize('far', ['x', 'dy', None])
def test_offsets_are_64_bit_where_31_may_not_do(far):
    from vmzoo_kernels import triton_scan

    inputs, routes = make((2, 3), 8, 1, 1, 'cross', batch=1, device='meta')
    distant = torch.empty_strided((1, 6, 8), (6 * 2**29, 2**29, 1), device='meta', dtype=torch.float64)
    x = distant if far == 'x' else inputs['x']
    _, *others = scan_arguments(inputs, routes, 'triton')
    scan = triton_scan._Scan(ScanInputs(x, *others[:12]), distant if far == 'dy' else inputs['x'])
    assert scan.constants['WIDE'] == (far is not None)


@pytest.mark.skipif(not GPU, reason='counts compilations')
def test_no_new_compilation_for_another_size():
    from vmzoo_kernels import triton_scan

    def compiled():
        caches = [k.device_caches for k in (triton_scan._forward_kernel, triton_scan._backward_kernel)]
        return sum(len(cache[0]) for by_device in caches for cache in by_device.values())

    counts = []
    # The first two compile: long sequences in segments, short ones whole.
    for batch, size in [(2, (16, 16)), (1, (7, 9)), (3, (33, 5)), (2, (1, 1)), (1, (31, 67))]:
        inputs, routes = make(size, 96, 1, 6, 'cross', batch=batch, dtype=torch.float16, device='cuda')
        value_and_grads(route_scan, inputs, routes, backend='triton')
        counts.append(compiled())
    assert counts[2:] == counts[1:2] * 3


def test_tables_are_not_kept_alive():
    """A table made for one call, as under torch.compile, leaves nothing behind."""
    before = len(chunked._CACHE)
    for _ in range(3):
        inputs, routes = make((3, 4), 2, 1, 1, 'atrous', batch=1)
        route_scan(**inputs, routes=routes)
        del routes
    gc.collect()
    assert len(chunked._CACHE) <= before


def test_what_is_known_of_a_table_follows_it():
    inputs, routes = make((2, 3), 2, 1, 1, 'forward')
    routes = routes_from_table(routes.gather.clone(), 6)  # its own table, not the shared one
    for _ in range(2):
        got, want = (f(**inputs, routes=routes) for f in (route_scan, route_scan_reference))
        assert error(got, want) < 1e-12
        routes.gather.copy_(routes.gather.flip(-1))
    inputs, _ = make((3, 3), 2, 1, 1, 'forward')
    wider = routes._replace(num_positions=9, complete=False)
    got, want = (f(**inputs, routes=wider) for f in (route_scan, route_scan_reference))
    assert error(got, want) < 1e-12


def test_threads():
    inputs, _ = make((5, 7), 4, 1, 2, 'cross')

    def call(i):
        size = [(5, 7), (7, 5), (1, 35), (35, 1)][i % 4]
        return route_scan(**inputs, routes=get_routes('cross', *size))

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(call, range(32)))
    assert all(torch.equal(y, call(i)) for i, y in enumerate(results))


def test_inference_then_training():
    routes = get_routes('cross', 3, 13)
    inputs, _ = make((3, 13), 4, 1, 2, 'cross')
    with torch.inference_mode():
        want = route_scan(**inputs, routes=routes)
    got, _ = value_and_grads(route_scan, inputs, routes)
    assert torch.equal(got['y'], want)


@pytest.mark.parametrize('x_dtype', [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_inputs_and_parameters_of_different_dtypes(x_dtype, dtype):
    """The dtype of x decides that of the result; every gradient has its tensor's own."""
    inputs, routes = make((3, 4), 4, 2, 2, 'cross', dtype=dtype)
    want, weight = value_and_grads(route_scan, inputs, routes)
    inputs['x'] = inputs['x'].to(x_dtype)
    got, _ = value_and_grads(route_scan, inputs, routes, weight)
    assert got['y'].dtype == got['dx'].dtype == x_dtype
    assert all(got[f'd{name}'].dtype == dtype for name in NAMES if name != 'x')
    assert all(error(got[key], want[key]) < (2e-3 if x_dtype == torch.float16 else 1e-5) for key in want)


def test_vmap_and_the_derivatives_there_are_not():
    inputs, routes = make((2, 3), 2, 1, 1, 'cross')
    x = torch.stack((inputs['x'], 2 * inputs['x']))

    def scan(x):
        return route_scan(**{**inputs, 'x': x}, routes=routes)

    torch.testing.assert_close(torch.vmap(scan)(x), torch.stack([scan(v) for v in x]))
    with pytest.raises(RuntimeError, match='forward-mode'):
        torch.func.jvp(scan, (inputs['x'],), (inputs['x'],))
    x = inputs['x'].requires_grad_()
    (grad,) = torch.autograd.grad(scan(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='no autograd formula'):
        grad.sum().backward()


def test_routes_on_another_device():
    inputs, routes = make((2, 3), 2, 1, 1, 'cross')
    routes = routes._replace(gather=routes.gather.to('meta'), merge=routes.merge.to('meta'))
    with pytest.raises(ValueError, match=r'routes are on meta, x is on cpu.*device=x\.device'):
        route_scan(**inputs, routes=routes)


def test_meta_tensors():
    inputs, routes = make((4, 5), 8, 2, 2, 'cross', device='meta')
    assert route_scan(**inputs, routes=routes).shape == (2, 20, 8)


def test_flops_are_counted():
    inputs, routes = make((4, 5), 8, 2, 3, 'cross', dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        route_scan(**inputs, routes=routes)
    lanes = 2 * 4 * 20 * 8  # B·K·L·D
    assert counter.get_total_flops() == lanes * (9 * 2 + 1 + 2 * 3) == scan_flops(2, 20, 4, 8, 2, 3, True, True)
    inputs['x'].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        route_scan(**inputs, routes=routes, segment=4).sum().backward()
    assert counter.get_total_flops() == 3 * scan_flops(2, 20, 4, 8, 2, 3, True, True, segments=True)
    assert counter.get_total_flops() == 3 * lanes * (12 * 2 + 1 + 2 * 3)


class _Largest(TorchDispatchMode):
    """The most values that any one tensor held."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(v.numel() for v in tree_leaves(out) if isinstance(v, torch.Tensor))])
        return out


def test_no_tensor_holds_every_state():
    """The torch backend keeps one state channel at a time: nothing has B·K·L·D·N values."""
    inputs, routes = make((6, 6), 8, 64, 2, 'cross', dtype=torch.float32)
    inputs = ScanInputs(*scan_arguments(inputs, routes, 'torch')[:13])
    y, last = torch.zeros(2, 36, 8), torch.zeros(2, 4, 1, 8, 64)
    with _Largest() as largest:
        chunked.forward(inputs, y, last)
        chunked.backward(y, inputs)
    assert largest.numel < 2 * 4 * 36 * 8 * 64


@pytest.mark.parametrize(
    'change, message',
    [
        ({'x': torch.randn(2, 19, 8)}, '4 routes over 20 positions do not fit'),
        ({'x': torch.randn(2, 20, 7)}, 'x should be'),
        ({'x_dbl': torch.randn(2, 20, 4, 9)}, 'x_dbl should be'),
        ({'A': torch.randn(4, 7, 2)}, 'A should be'),
        ({'D': torch.randn(32)}, 'D should be'),
        ({'dt_weight': torch.randn(4, 8)}, 'dt_weight should be'),
    ],
)
def test_wrong_shapes_are_named(change, message):
    inputs, routes = make((4, 5), 8, 2, 2, 'cross', dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        route_scan(**{**inputs, **change}, routes=routes)
