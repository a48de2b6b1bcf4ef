"""Public operators (plain reference for now)."""

import torch

from .reference import route_scan_reference, selective_scan_reference


def route_scan(x, x_dbl, A, D, dt_weight, dt_bias, routes, merge=True, out_dtype=None, backend='auto'):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    args = [v.to(dtype) for v in (x, x_dbl, A, D, dt_weight, dt_bias)]
    return route_scan_reference(*args, routes, merge=merge).to(out_dtype or x.dtype)


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    B, C = (v.unsqueeze(1) if v.ndim == 3 else v for v in (B, C))
    y, last = selective_scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return (y, last) if return_last_state else y
