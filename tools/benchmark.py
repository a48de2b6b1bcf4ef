"""Time operators and models against baselines in the same run, and print the ratios.

    python tools/benchmark.py ops                       # fused 2D scan against the unfused pipeline
    python tools/benchmark.py models                    # whole models against timm's convolutional networks
    python tools/benchmark.py models --models vmamba_tiny_s1l8 convnext_tiny --batch-size 1 --device cpu

Every figure is the median of repeated runs after a warm-up, which is printed apart as the first call's time (it holds
compilation). Figures of different runs are not comparable: quote the ratios.
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vmzoo_kernels import gather_routes, get_routes, merge_routes, route_scan, selective_scan

OP_SHAPES = [  # batch, channels, H = W, d_state
    (128, 96, 56, 1),
    (128, 192, 28, 1),
    (128, 384, 14, 1),
    (128, 768, 7, 1),
    (8, 96, 256, 1),
    (2, 96, 512, 1),
    (128, 192, 56, 16),
]
DTYPES = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}


def measure(function: Callable[[], object], device: torch.device, seconds: float) -> tuple[float, float]:
    """Milliseconds of the first call, and the median of those that follow, a few at a time on a GPU.

    Calls queued together keep a GPU busy, as in a model: the time is the GPU's unless the host is the slower one.
    """
    if device.type == 'cuda':
        torch.cuda.synchronize()

    def timed(calls: int) -> float:
        if device.type != 'cuda':
            start = time.perf_counter()
            for _ in range(calls):
                function()
            return 1e3 * (time.perf_counter() - start) / calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls

    first = timed(1)
    calls = max(1, int(20 / timed(3))) if device.type == 'cuda' else 1
    times, stop = [], time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < stop and len(times) < 1000):
        times.append(timed(calls))
    return first, statistics.median(times)


def scan_inputs(batch: int, dim: int, size: int, d_state: int, dtype: torch.dtype, device: torch.device) -> dict:
    """A map and the parameters of an SS2D core with VMamba's four routes and dt_rank."""
    rank, routes, length = -(-dim // 16), get_routes('cross', size, size, device=device), size * size

    def normal(*shape: int, **kwargs) -> Tensor:
        return torch.randn(*shape, device=device, **kwargs)

    tensors = {
        'x': normal(batch, length, dim, dtype=dtype),
        'x_proj': normal(4, rank + 2 * d_state, dim, dtype=dtype) * dim**-0.5,
        'A': -torch.exp(0.5 * normal(4, dim, d_state)),
        'D': normal(4, dim),
        'dt_weight': normal(4, dim, rank, dtype=dtype) * rank**-0.5,
        'dt_bias': normal(4, dim) - 3.0,
    }
    return {'routes': routes, **{name: v.requires_grad_() for name, v in tensors.items()}}


def fused(x, x_proj, A, D, dt_weight, dt_bias, routes) -> Tensor:
    """One matmul for the projections of all routes, then the fused operator."""
    x_dbl = (x @ x_proj.flatten(0, 1).mT).unflatten(-1, x_proj.shape[:2])
    return route_scan(x, x_dbl, A, D, dt_weight, dt_bias, routes)


def unfused(x, x_proj, A, D, dt_weight, dt_bias, routes) -> Tensor:
    """As the research repositories do it: expand to K routes, project, scan, merge; each step through memory."""
    rank, d_state = dt_weight.shape[-1], A.shape[-1]
    xs = gather_routes(x, routes)[:, :, 0].mT.contiguous()  # [B, K, D, L]
    dt, B, C = torch.einsum('bkdl,kcd->bkcl', xs, x_proj).split([rank, d_state, d_state], dim=2)
    delta = torch.einsum('bkrl,kdr->bkdl', dt, dt_weight)
    A, D, dt_bias = (v.flatten(0, 1) for v in (A, D, dt_bias))
    y = selective_scan(xs.flatten(1, 2), delta.flatten(1, 2), A, B, C, D, None, dt_bias, True)
    return merge_routes(y.unflatten(1, (routes.num_routes, -1)).mT.unsqueeze(2), routes)


def benchmark_ops(args: argparse.Namespace, device: torch.device) -> list[dict]:
    rows = []
    shapes = [tuple(int(v) for v in shape.split(',')) for shape in args.shapes] if args.shapes else OP_SHAPES
    for batch, dim, size, d_state in shapes:
        row = {'batch': batch, 'channels': dim, 'size': size, 'd_state': d_state}
        for name, function in (('unfused', unfused), ('fused', fused)):
            inputs = scan_inputs(batch, dim, size, d_state, DTYPES[args.dtype], device)
            leaves = [v for v in inputs.values() if isinstance(v, Tensor)]
            dy = torch.randn(batch, size * size, dim, device=device, dtype=DTYPES[args.dtype])

            def forward(function=function, inputs=inputs):
                with torch.no_grad():
                    return function(**inputs)

            def step(function=function, inputs=inputs, leaves=leaves, dy=dy):
                return torch.autograd.grad(function(**inputs), leaves, dy)

            row[f'{name} first ms'], row[f'{name} fwd ms'] = measure(forward, device, args.seconds)
            _, row[f'{name} fwd+bwd ms'] = measure(step, device, args.seconds)
        row['fwd ratio'] = row['unfused fwd ms'] / row['fused fwd ms']
        row['fwd+bwd ratio'] = row['unfused fwd+bwd ms'] / row['fused fwd+bwd ms']
        print_row(row)
        rows.append(row)
    return rows


def benchmark_models(args: argparse.Namespace, device: torch.device) -> list[dict]:
    import timm

    import vmzoo  # noqa: F401  registers the models

    rows = []
    for name in args.models:
        model = timm.create_model(name).to(device).eval()
        x = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
        autocast = torch.autocast(device.type, DTYPES[args.dtype], enabled=args.dtype != 'float32')

        def infer(model=model, x=x, autocast=autocast):
            with torch.inference_mode(), autocast:
                return model(x)

        def train(model=model, x=x, autocast=autocast):
            with autocast:
                loss = model(x).float().square().mean()
            loss.backward()
            model.zero_grad(set_to_none=True)

        row = {'model': name, 'batch': args.batch_size, 'size': args.img_size}
        row['first ms'], row['infer ms'] = measure(infer, device, args.seconds)
        if args.train:
            model.train()
            if device.type == 'cuda':
                torch.cuda.reset_peak_memory_stats()
            _, row['train ms'] = measure(train, device, args.seconds)
            if device.type == 'cuda':
                row['peak GiB'] = torch.cuda.max_memory_allocated() / 2**30
        for kind in ('infer', 'train')[: 1 + args.train]:
            row[f'{kind} img/s'] = 1e3 * args.batch_size / row[f'{kind} ms']
            baseline = rows[0] if rows else row
            row[f'{kind} time / {baseline["model"]}'] = row[f'{kind} ms'] / baseline[f'{kind} ms']
        print_row(row)
        rows.append(row)
    return rows


def print_row(row: dict) -> None:
    print('  '.join(f'{k} {v:.3f}' if isinstance(v, float) else f'{k} {v}' for k, v in row.items()), flush=True)


def machine(device: torch.device) -> str:
    versions = [f'torch {torch.__version__}']
    if device.type == 'cuda':
        import triton

        return ', '.join([torch.cuda.get_device_name(device), *versions, f'triton {triton.__version__}'])
    return ', '.join([f'CPU with {torch.get_num_threads()} threads', *versions])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('ops', 'models'))
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--dtype', choices=DTYPES, help='default: float16 on a GPU, float32 on a CPU')
    parser.add_argument('--seconds', type=float, default=1.0, help='time spent on each figure')
    parser.add_argument('--shapes', nargs='*', metavar='B,C,HW,N', help='ops: batch, channels, side, d_state')
    parser.add_argument(
        '--models', nargs='*', default=['convnext_tiny', 'vmamba_tiny_s1l8'], help='the first is the baseline'
    )
    parser.add_argument('--batch-size', type=int, default=1)
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--train', action='store_true', help='models: time a training step too')
    parser.add_argument('--csv', type=Path, help='also write the figures here')
    args = parser.parse_args()
    device = torch.device(args.device)
    args.dtype = args.dtype or ('float16' if device.type == 'cuda' else 'float32')
    print(f'{machine(device)}, {args.dtype}')
    rows = (benchmark_ops if args.what == 'ops' else benchmark_models)(args, device)
    if args.csv:
        with args.csv.open('w', newline='') as file:
            writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == '__main__':
    sys.exit(main())
