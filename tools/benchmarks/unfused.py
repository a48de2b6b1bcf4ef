"""Models whose scans take the steps of the research repositories, each through memory, not the fused operator."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor

from vmzoo_kernels import Routes, gather_routes, merge_routes, route_scan, selective_scan


def unfused_route_scan(
    x: Tensor,
    x_dbl: Tensor,
    A: Tensor,
    D: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    routes: Routes,
    merge: bool = True,
    out_dtype: torch.dtype | None = None,
    backend: str = 'auto',
    **kwargs,
) -> Tensor:
    """`route_scan` in four steps: expand to K routes, project the step sizes, scan, merge.

    It takes and returns what `route_scan` does; further arguments are those that `selective_scan` has too.
    """
    rank, d_state = dt_weight.shape[-1], A.shape[-1]
    xs = gather_routes(x, routes)  # [B, K, S, T, D]
    batch, num_routes, sequences = xs.shape[:3]
    dt, B, C = gather_routes(x_dbl[..., : rank + 2 * d_state], routes).split([rank, d_state, d_state], dim=-1)
    delta = dt @ dt_weight.mT[:, None]
    u, delta, B, C = (v.permute(0, 2, 1, 4, 3).flatten(0, 1).contiguous() for v in (xs, delta, B, C))  # [B·S, K, ·, T]
    A, D, dt_bias = (v.flatten(0, 1) for v in (A, D, dt_bias))
    y = selective_scan(u.flatten(1, 2), delta.flatten(1, 2), A, B, C, D, None, dt_bias, True, backend=backend, **kwargs)
    y = y.unflatten(1, (num_routes, -1)).unflatten(0, (batch, sequences))  # [B, S, K, D, T]
    return merge_routes(y.to(out_dtype or y.dtype).permute(0, 2, 1, 4, 3), routes, reduce=merge)


@contextmanager
def unfused_operators() -> Iterator[SimpleNamespace]:
    """Puts `unfused_route_scan` in the place of `route_scan` in all of vmzoo; yields an object whose `calls` counts."""
    counter = SimpleNamespace(calls=0)

    def counted(*args, **kwargs) -> Tensor:
        counter.calls += 1
        return unfused_route_scan(*args, **kwargs)

    loaded = [module for name, module in list(sys.modules.items()) if name.startswith('vmzoo.')]
    users = [module for module in loaded if vars(module).get('route_scan') is route_scan]
    for module in users:
        module.route_scan = counted
    try:
        yield counter
    finally:
        for module in users:
            module.route_scan = route_scan
