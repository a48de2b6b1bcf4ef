"""What each operator computes, in a few lines of plain torch: the definition that every backend must equal.

Step by step over the sequence, in the dtype of the input, differentiable by autograd. Run it in float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .routes import Routes, gather_routes, merge_routes


def scan_reference(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, segment: int = 0
) -> tuple[Tensor, Tensor]:
    """Selective scan (S6; Mamba, arXiv 2312.00752) along dimension -2, one step after the other.

    ``h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t`` and ``y_t = C_t · h_t`` with ``h_{-1} = 0``. With segments
    (LBMamba, arXiv 2506.15976) ``y_t = C_t · (h_t + r_t)``, where r is what the later steps of the same segment add:
    ``r_t = exp(delta_t A) (r_{t+1} + delta_{t+1} B_{t+1} u_{t+1})``, and 0 at its last step.

    Args:
        u: [..., T, D] input.
        delta: [..., T, D] step sizes, after bias and softplus.
        A: [..., D, N], broadcast against the leading dimensions of ``u``.
        B: [..., T, N] input projections, shared by the D channels.
        C: [..., T, N] output projections.
        segment: Steps of a segment, counted from the first one; 0 for none.

    Returns:
        y [..., T, D] and the last state [..., D, N].
    """
    steps = range(u.shape[-2])
    decays = [torch.exp(delta[..., t, :, None] * A) for t in steps]
    inputs = [(delta[..., t, :] * u[..., t, :])[..., None] * B[..., t, None, :] for t in steps]
    h = torch.zeros(*u.shape[:-2], u.shape[-1], A.shape[-1], dtype=u.dtype, device=u.device)
    ys = []
    for t in steps:
        h = decays[t] * h + inputs[t]
        ys.append((h * C[..., t, None, :]).sum(-1))
    nothing = later = torch.zeros_like(h)
    for t in reversed(steps) if segment else ():
        ends = (t + 1) % segment == 0 or t == steps[-1]
        later = nothing if ends else decays[t] * (later + inputs[t + 1])
        ys[t] = ys[t] + (later * C[..., t, None, :]).sum(-1)
    return torch.stack(ys, dim=-2), h


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    segment: int = 0,
) -> tuple[Tensor, Tensor]:
    """Definition of :func:`vmzoo_kernels.selective_scan`, for B and C of shape [B, G, N, L]; also the last state."""
    groups = B.shape[1]
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    grouped = [v.unflatten(1, (groups, -1)).transpose(2, 3) for v in (u, delta)]  # [B, G, L, D/G]
    y, last = scan_reference(*grouped, A.unflatten(0, (groups, -1)), B.transpose(2, 3), C.transpose(2, 3), segment)
    y = y.transpose(2, 3).flatten(1, 2)
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * F.silu(z)
    return y, last.flatten(1, 2)


def route_scan_reference(
    x: Tensor,
    x_dbl: Tensor,
    A: Tensor,
    D: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    routes: Routes,
    merge: bool = True,
    segment: int = 0,
) -> Tensor:
    """Definition of :func:`vmzoo_kernels.route_scan`: gather by route, scan, put back, sum."""
    rank, d_state = dt_weight.shape[-1], A.shape[-1]
    u = gather_routes(x, routes)  # [B, K, S, T, D]
    dt, B, C = gather_routes(x_dbl, routes).split([rank, d_state, d_state], dim=-1)
    delta = F.softplus(dt @ dt_weight.mT[:, None] + dt_bias[:, None, None])
    y, _ = scan_reference(u, delta, A[:, None], B, C, segment)
    return merge_routes(y + D[:, None, None] * u, routes, reduce=merge)
