"""Models whose scans take the steps of the research repositories, each through memory, not the fused operator."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from vmzoo_kernels import Routes, gather_routes, merge_routes, projected_scan, route_scan, selective_scan


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


def unfused_projected_scan(x: Tensor, x_proj: Tensor, A_log: Tensor, *args, **kwargs) -> Tensor:
    """`projected_scan` as a product and :func:`unfused_route_scan`."""
    x_dbl = F.linear(x, x_proj.flatten(0, 1)).unflatten(-1, x_proj.shape[:2])
    return unfused_route_scan(x, x_dbl, -torch.exp(A_log.float()), *args, **kwargs)


@contextmanager
def unfused_operators() -> Iterator[SimpleNamespace]:
    """Puts the unfused operators in the place of the fused in all of vmzoo; yields an object whose `calls` counts."""
    counter = SimpleNamespace(calls=0)

    def counted(operator):
        def call(*args, **kwargs) -> Tensor:
            counter.calls += 1
            return operator(*args, **kwargs)

        return call

    loaded = [module for name, module in list(sys.modules.items()) if name.startswith('vmzoo.')]
    users = [
        (module, fused.__name__, fused, counted(unfused))
        for fused, unfused in ((route_scan, unfused_route_scan), (projected_scan, unfused_projected_scan))
        for module in loaded
        if vars(module).get(fused.__name__) is fused
    ]
    for module, name, _, unfused in users:
        setattr(module, name, unfused)
    try:
        yield counter
    finally:
        for module, name, fused, _ in users:
            setattr(module, name, fused)
