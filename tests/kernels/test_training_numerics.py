"""What a training needs of the scan: gradients that repeat, large tensors, mixed precision, no compiling on the way."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import vmzoo  # noqa: F401  registers the models
from vmzoo_kernels import Routes, available_backends, get_routes, route_scan, routes_from_table, selective_scan

GPU = torch.cuda.is_available()
BACKENDS = [name for name, reason in available_backends().items() if reason is None]
COMPILED = [name for name in BACKENDS if name != 'torch']
FLOWING = ('x', 'x_dbl', 'dt_weight', 'u', 'delta', 'B', 'C')  # the rest is float32


@contextmanager
def skipped_if_refused(backend: str) -> Iterator[None]:
    """A backend may leave some scans to others: then, asked for by name, it says so."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(f'scan backend {backend!r} cannot'):
            raise
        pytest.skip(str(error))


def map_inputs(
    batch: int, length: int, routes: int, dim: int, d_state: int, dtype, device, rank: int = 3
) -> dict[str, Tensor]:
    inputs = {
        'x': torch.randn(batch, length, dim),
        'x_dbl': torch.randn(batch, length, routes, rank + 2 * d_state),
        'A': -torch.exp(0.5 * torch.randn(routes, dim, d_state)),
        'D': torch.randn(routes, dim),
        'dt_weight': torch.randn(routes, dim, rank) * rank**-0.5,
        'dt_bias': torch.randn(routes, dim) - 2,
    }
    return {k: v.to(device, dtype if k in FLOWING else torch.float32) for k, v in inputs.items()}


def sequence_inputs(batch: int, length: int, dim: int, d_state: int, dtype, device) -> dict[str, Tensor]:
    inputs = {
        'u': torch.randn(batch, dim, length),
        'delta': torch.randn(batch, dim, length),
        'A': -torch.exp(0.5 * torch.randn(dim, d_state)),
        'B': torch.randn(batch, d_state, length),
        'C': torch.randn(batch, d_state, length),
        'D': torch.randn(dim),
        'delta_bias': torch.randn(dim) - 2,
    }
    return {k: v.to(device, dtype if k in FLOWING else torch.float32) for k, v in inputs.items()}


def value_and_grads(function, inputs: dict[str, Tensor], dy: Tensor | None = None, **settings) -> dict[str, Tensor]:
    leaves = {name: v.detach().requires_grad_() for name, v in inputs.items()}
    y = function(**leaves, **settings)
    if dy is None:
        dy = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)
    grads = torch.autograd.grad(y, leaves.values(), dy.to(y))
    return {'y': y.detach(), **dict(zip(leaves, grads))}


# routes, height, width, channels, d_state: in one piece and in segments, with one block of channels and with several
MAPS = [('cross', 33, 31, 96, 1), ('cross', 7, 9, 48, 16), ('cascade_rows', 9, 31, 32, 2)]
SEQUENCES = [(3136, 48, 1), (197, 24, 16)]
DTYPES = [torch.float16, torch.float32]
if GPU:
    MAPS.append(('forward_backward', 160, 128, 64, 1))


@pytest.mark.parametrize('backend', BACKENDS if GPU else ['torch'])  # the interpreter has but one order
@pytest.mark.parametrize('dtype', DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize('case', MAPS + SEQUENCES, ids=str)
def test_twenty_runs_agree_bit_for_bit(case, dtype, backend, device):
    if case in MAPS:
        name, height, width, dim, d_state = case
        routes = get_routes(name, height, width, device=device)
        inputs = map_inputs(2, height * width, routes.num_routes, dim, d_state, dtype, device)
        function, settings = route_scan, {'routes': routes}
    else:
        inputs = sequence_inputs(2, *case, dtype, device)
        function, settings = selective_scan, {'delta_softplus': True}
    with skipped_if_refused(backend):
        first = value_and_grads(function, inputs, backend=backend, **settings)
    for _ in range(19):
        again = value_and_grads(function, inputs, backend=backend, **settings)
        assert all(torch.equal(again[key], first[key]) for key in first)


def rows(height: int, width: int) -> Routes:
    """One route of independent sequences, one a row."""
    table = torch.arange(height * width, device='cuda').view(1, height, width)
    return routes_from_table(table, height * width)


LARGE = {
    # batch, positions, channels, its routes; positions and routes of the part that is computed alone
    'batch': (33, 2**16, 1024, lambda: get_routes('forward', 256, 256, 'cuda'), 2**16, None),
    'map': (1, 2**20, 2064, lambda: rows(1024, 1024), 2**12, lambda: rows(4, 1024)),
    'routes': (33, 2**14, 1024, lambda: get_routes('cross', 128, 128, 'cuda'), 2**14, None),
}


@pytest.mark.skipif(not GPU, reason='needs a GPU')
@pytest.mark.parametrize('backend', COMPILED)
@pytest.mark.parametrize('large', LARGE)
def test_tensors_of_more_than_31_bits(large, backend):
    """The last batch item, or the last rows of a map, come out as they do alone.

    The elements before them, or those of all routes together, number 2^31. They are zero, in the map and in the
    gradient, so that the parameters' gradients are those of the last part too.
    """
    batch, length, dim, make_routes, part, make_part_routes = LARGE[large]
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < 40:
        pytest.skip(f'needs a GPU with 40 GiB free, has {free:.0f}')
    routes = make_routes()
    assert batch * length * dim * routes.num_routes > 2**31
    assert ((batch - 1) * length + length - part) * dim * routes.num_routes >= 2**31
    inputs = map_inputs(1, part, routes.num_routes, dim, 1, torch.float16, 'cuda', rank=1)
    dy = torch.randn_like(inputs['x'])
    whole = {name: inputs[name].new_zeros(batch, length, *inputs[name].shape[2:]) for name in ('x', 'x_dbl')}
    whole_dy = torch.zeros_like(whole['x'])
    for tensor, end in ((whole['x'], inputs['x']), (whole['x_dbl'], inputs['x_dbl']), (whole_dy, dy)):
        tensor[-1:, -part:] = end
    with skipped_if_refused(backend):
        got = value_and_grads(route_scan, inputs | whole, whole_dy, routes=routes, backend=backend)
    alone = make_part_routes() if make_part_routes else routes
    want = value_and_grads(route_scan, inputs, dy, routes=alone, backend=backend)
    for name, value in want.items():
        end = got[name][-1:, -part:] if name in ('y', 'x', 'x_dbl') else got[name]
        assert (end.float() - value.float()).norm() <= 2e-3 * value.float().norm(), name


def batches(steps: int, noise: float, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Images of ten smooth patterns under noise, which leaves no loss of zero, however long the training."""
    generator = torch.Generator().manual_seed(0)
    patterns = F.interpolate(torch.randn(10, 1, 8, 8, generator=generator), size=32, mode='bilinear')
    for _ in range(steps):
        labels = torch.randint(10, (32,), generator=generator)
        images = patterns[labels] + noise * torch.randn(32, 1, 32, 32, generator=generator)
        yield images.to(device), labels.to(device)


TRAINING = (
    {'steps': 500, 'noise': 10.0, 'lr': 2e-3, 'model': {}}
    if GPU
    else {'steps': 200, 'noise': 5.0, 'lr': 4e-3, 'model': {'depths': (1, 1, 1, 1), 'embed_dim': (8, 16, 24, 32)}}
)


def train(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, torch.amp.GradScaler]:
    """Losses of a training, and its scaler, which halves its scale when a gradient is not finite."""
    torch.manual_seed(0)
    model = timm.create_model('vmamba_nano', in_chans=1, num_classes=10, **TRAINING['model']).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), TRAINING['lr'])
    scaler = torch.amp.GradScaler(device.type, init_scale=2**12, enabled=dtype == torch.float16)
    losses = []
    for images, labels in batches(TRAINING['steps'], TRAINING['noise'], device):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    return torch.stack(losses).cpu(), scaler


@pytest.fixture(scope='module')
def float32_losses() -> Tensor:
    return train(torch.float32, torch.device('cuda' if GPU else 'cpu'))[0]


@pytest.mark.parametrize(
    'dtype', [torch.float16, torch.bfloat16] if GPU else [torch.bfloat16], ids=lambda d: str(d)[6:]
)
def test_mixed_precision_trains_as_float32(dtype, float32_losses, device):
    losses, scaler = train(dtype, device)
    assert torch.isfinite(losses).all()
    if scaler.is_enabled():
        assert scaler.get_scale() == 2**12  # no step was left out
    final = float32_losses[-20:].mean().item()
    assert 0.6 < final < 0.75 * float32_losses[0]  # it learns, and has not come to the end
    assert losses[-20:].mean().item() == pytest.approx(final, rel=0.05)


def compilations(backend: str) -> int:
    """Kernels that a backend has compiled or loaded."""
    if backend == 'cuda':
        from vmzoo_kernels import nvrtc

        return nvrtc.load.cache_info().currsize
    from vmzoo_kernels import triton_scan

    kernels = [v for v in vars(triton_scan).values() if hasattr(v, 'device_caches')]
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


@pytest.mark.skipif(not GPU, reason='counts compilations')
@pytest.mark.parametrize('backend', COMPILED)
@pytest.mark.parametrize('d_state', [1, 16])
@pytest.mark.parametrize('operator', ['map', 'sequence'])
def test_sizes_and_batches_compile_nothing(operator, d_state, backend, device):
    def call(batch: int, height: int, width: int) -> None:
        if operator == 'map':
            routes = get_routes('cross', height, width, device=device)
            inputs = map_inputs(batch, height * width, 4, 96, d_state, torch.float16, device, rank=6)
            value_and_grads(route_scan, inputs, routes=routes, backend=backend)
        else:
            inputs = sequence_inputs(batch, height * width, 96, d_state, torch.float16, device)
            value_and_grads(selective_scan, inputs, delta_softplus=True, backend=backend)

    with skipped_if_refused(backend):  # small maps and large ones have kernels of their own
        for batch, height, width in [(2, 16, 16), (1, 7, 9), (2, 56, 56), (1, 256, 256), (64, 64, 64)]:
            call(batch, height, width)
    before = compilations(backend)
    assert before > 0
    for batch, height, width in [(3, 33, 5), (2, 1, 1), (1, 31, 67), (5, 97, 61), (17, 14, 14), (1, 200, 311)]:
        call(batch, height, width)
        assert compilations(backend) == before, (batch, height, width)


@pytest.mark.parametrize('operator', ['map', 'sequence'])
@pytest.mark.parametrize(('dynamic', 'graphs'), [(True, 1), (None, 2)], ids=['dynamic', 'automatic'])
def test_torch_compile_takes_sizes_and_batches_as_they_come(operator, dynamic, graphs, device):
    """One graph for all, or with torch's default one for the first size and one for all others."""

    def on_map(height, width, **inputs):
        return route_scan(**inputs, routes=get_routes('cross', height, width, device=inputs['x'].device))

    torch.compiler.reset()
    counter = CompileCounterWithBackend('inductor' if GPU else 'aot_eager')
    function = on_map if operator == 'map' else selective_scan
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
    for batch, height, width in [(2, 4, 6), (3, 5, 7), (2, 8, 3), (5, 6, 9), (4, 31, 2)]:
        if operator == 'map':
            inputs = map_inputs(batch, height * width, 4, 16, 1, torch.float32, device)
            settings = {'height': height, 'width': width}
        else:
            inputs, settings = (
                sequence_inputs(batch, height * width, 16, 1, torch.float32, device),
                {'delta_softplus': True},
            )
        want = value_and_grads(function, inputs, **settings)
        got = value_and_grads(compiled, inputs, **settings)
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == graphs
