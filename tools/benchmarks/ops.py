"""The scan operators against the pipeline that they replace, and against mamba-ssm."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from vmzoo_kernels import gather_routes, get_routes, merge_routes, projected_scan, selective_scan

from .timing import Row, Setting

Shapes = Sequence[tuple[int, ...]]
PASSES = ('fwd', 'fwd+bwd')
BASELINES = ('unfused', 'mamba-ssm')

SS2D_SHAPES = [  # batch, channels, H = W, d_state
    (128, 96, 56, 1),
    (128, 192, 28, 1),
    (128, 384, 14, 1),
    (128, 768, 7, 1),
    (8, 96, 256, 1),
    (2, 96, 512, 1),
    (128, 192, 56, 16),
]
SCAN_SHAPES = [  # batch, channels, length, d_state
    (64, 384, 3136, 1),
    (64, 384, 3136, 16),
    (128, 384, 197, 16),
    (1, 192, 16384, 16),
]
SIDES = (16, 32, 64, 128, 256, 512, 1024, 2048)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SWEEP_PIXELS = 2**19  # of a batch, as nearly as its images allow: two images of 512x512
SWEEP_CHANNELS, SWEEP_SIDE = 96, 56
CPU_SHARE = 64  # a CPU gets this fraction of the batches, so that a table takes minutes
CPU_LARGEST_SIDE, CPU_LARGEST_BATCH = 128, 4


def ss2d_inputs(setting: Setting, batch: int, dim: int, side: int, d_state: int) -> dict:
    """A map and the parameters of an SS2D core with VMamba's four routes and dt_rank."""
    rank, length = -(-dim // 16), side * side
    device, dtype = setting.device, setting.dtype

    def normal(*shape: int, **kwargs) -> Tensor:
        return torch.randn(*shape, device=device, **kwargs)

    tensors = {
        'x': normal(batch, length, dim, dtype=dtype),
        'x_proj': normal(4, rank + 2 * d_state, dim, dtype=dtype) * dim**-0.5,
        'A_log': 0.5 * normal(4, dim, d_state),
        'D': normal(4, dim),
        'dt_weight': normal(4, dim, rank) * rank**-0.5,
        'dt_bias': normal(4, dim) - 3.0,
    }
    return {**tensors, 'routes': get_routes('cross', side, side, device=device)}


def fused(x, x_proj, A_log, D, dt_weight, dt_bias, routes, backend='auto') -> Tensor:
    """The fused operator, projections of all routes included."""
    return projected_scan(x, x_proj, A_log, D, dt_weight, dt_bias, routes, backend=backend)


def unfused(x, x_proj, A_log, D, dt_weight, dt_bias, routes) -> Tensor:
    """As the research repositories do it: expand to K routes, project, scan, merge; each step through memory."""
    rank, d_state = dt_weight.shape[-1], A_log.shape[-1]
    xs = gather_routes(x, routes)[:, :, 0].mT.contiguous()  # [B, K, D, L]
    dt, B, C = torch.einsum('bkdl,kcd->bkcl', xs, x_proj).split([rank, d_state, d_state], dim=2)
    delta = torch.einsum('bkrl,kdr->bkdl', dt, dt_weight.to(dt.dtype))
    A, D, dt_bias = (v.flatten(0, 1) for v in (-torch.exp(A_log), D, dt_bias))
    y = selective_scan(xs.flatten(1, 2), delta.flatten(1, 2), A, B, C, D, None, dt_bias, True)
    return merge_routes(y.unflatten(1, (routes.num_routes, -1)).mT.unsqueeze(2), routes)


def scan_inputs(setting: Setting, batch: int, dim: int, length: int, d_state: int) -> dict:
    """Inputs of a 1-D scan, by the names that ours and mamba-ssm's function share."""
    device, dtype = setting.device, setting.dtype

    def normal(*shape: int, **kwargs) -> Tensor:
        return torch.randn(*shape, device=device, **kwargs)

    return {
        'u': normal(batch, dim, length, dtype=dtype),
        'delta': normal(batch, dim, length, dtype=dtype),
        'A': -torch.exp(0.5 * normal(dim, d_state)),
        'B': normal(batch, d_state, length, dtype=dtype),
        'C': normal(batch, d_state, length, dtype=dtype),
        'D': normal(dim),
        'delta_bias': normal(dim) - 3.0,
        'delta_softplus': True,
    }


def mamba_ssm_scan() -> Callable[..., Tensor] | None:
    """mamba-ssm's `selective_scan_fn`; without it, says so."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        print(f'selective_scan: no column for mamba-ssm, which does not import ({error})')
        return None
    return selective_scan_fn


def time_passes(setting: Setting, function: Callable[..., Tensor], inputs: dict) -> Row:
    """First and median milliseconds of the forward pass alone, and of it with the gradients of all tensors; on a GPU
    also as CUDA graphs."""
    setting.release_memory()
    inputs = {k: v.detach().requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    leaves = [v for v in inputs.values() if isinstance(v, Tensor)]
    dy = torch.randn_like(leaves[0])  # outputs have the shape of the input

    def forward():
        with torch.no_grad():
            return function(**inputs)

    def step():
        return torch.autograd.grad(function(**inputs), leaves, dy)

    calls = dict(zip(PASSES, (forward, step)))
    times = {name: setting.measure(call) for name, call in calls.items()}
    graphs = {f'{name} graph ms': setting.measure_graph(call) for name, call in calls.items()} if setting.on_gpu else {}
    return {
        **{f'first {name} ms': first for name, (first, _) in times.items()},
        **{f'{name} ms': median for name, (_, median) in times.items()},
        **graphs,
    }


def compare(
    setting: Setting,
    labels: Row,
    ours: Callable[..., Tensor],
    backends: Sequence[str],
    baseline: tuple[str, Callable[..., Tensor] | None],
    inputs: dict,
) -> Iterator[Row]:
    """One row a backend; the baseline is timed once. A ratio is how many times faster ours is."""
    name, function = baseline
    base = time_passes(setting, function, inputs) if function else None
    for backend in backends:
        try:
            times = time_passes(setting, partial(ours, backend=backend), inputs)
        except RuntimeError as error:
            if not str(error).startswith(f'scan backend {backend!r} cannot'):
                raise
            print(f'{labels["op"]}: {error}')
            continue
        row = {**labels, 'backend': backend, **times}
        if base:
            row |= {f'{name} {p} ms': base[f'{p} ms'] for p in PASSES}
            row |= {f'{p} ratio': base[f'{p} ms'] / row[f'{p} ms'] for p in PASSES}
        yield row


def _default(setting: Setting, shapes: Shapes) -> Shapes:
    return shapes if setting.on_gpu else [(max(1, batch // CPU_SHARE), *rest) for batch, *rest in shapes]


def benchmark_ss2d(setting: Setting, backends: Sequence[str], shapes: Shapes | None = None) -> Iterator[Row]:
    """The SS2D core (projection, scan, merge), on maps of (batch, channels, side, d_state)."""
    for shape in shapes or _default(setting, SS2D_SHAPES):
        labels = {'op': 'SS2D core', **dict(zip(('batch', 'channels', 'side', 'd_state'), shape))}
        yield from compare(setting, labels, fused, backends, ('unfused', unfused), ss2d_inputs(setting, *shape))


def benchmark_scan(setting: Setting, backends: Sequence[str], shapes: Shapes | None = None) -> Iterator[Row]:
    """The 1-D `selective_scan` with softplus, skip and bias, on (batch, channels, length, d_state)."""
    baseline = ('mamba-ssm', mamba_ssm_scan())
    for shape in shapes or _default(setting, SCAN_SHAPES):
        labels = {'op': 'selective_scan', **dict(zip(('batch', 'channels', 'length', 'd_state'), shape))}
        yield from compare(setting, labels, selective_scan, backends, baseline, scan_inputs(setting, *shape))


def benchmark_sweeps(
    setting: Setting,
    backends: Sequence[str],
    sides: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
) -> Iterator[Row]:
    """The SS2D core over the side of the map, with about equal work and of one image, and over the batch."""
    sides = sides or [side for side in SIDES if setting.on_gpu or side <= CPU_LARGEST_SIDE]
    batches = batches or [batch for batch in BATCHES if setting.on_gpu or batch <= CPU_LARGEST_BATCH]
    pixels = SWEEP_PIXELS // (1 if setting.on_gpu else CPU_SHARE)
    cases = [
        *(('equal work', max(1, pixels // side**2), side) for side in sides),
        *(('one image', 1, side) for side in sides),
        *(('batch', batch, SWEEP_SIDE) for batch in batches),
    ]
    for sweep, batch, side in cases:
        shape = {'batch': batch, 'channels': SWEEP_CHANNELS, 'side': side, 'd_state': 1}
        labels = {'op': 'SS2D core', 'sweep': sweep, **shape}
        inputs = ss2d_inputs(setting, *shape.values())
        for row in compare(setting, labels, fused, backends, ('unfused', unfused), inputs):
            yield row | {f'{p} ns/pixel': 1e6 * row[f'{p} ms'] / (batch * side**2) for p in PASSES}


def linearity(rows: Iterable[Row]) -> Iterator[str]:
    """Of each backend: the time per pixel of the largest image over that of an image with a sixteenth of its pixels."""
    costs = {}
    for row in rows:
        if row.get('sweep') == 'one image':
            costs.setdefault(row['backend'], {})[row['side']] = [row[f'{p} ns/pixel'] for p in PASSES]
    for backend, by_side in costs.items():
        side = max(by_side)
        if side // 4 in by_side:
            forward, both = (large / small for large, small in zip(by_side[side], by_side[side // 4]))
            yield (
                f'{backend}: time per pixel of one image of {side}x{side} over that of one of {side // 4}x{side // 4}: '
                f'{forward:.2f} forward, {both:.2f} forward and backward'
            )
