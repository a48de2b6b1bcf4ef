"""Initialisation of the parameters of a selective scan, shared by every family.

The recipe is Mamba's (https://arxiv.org/abs/2312.00752): `softplus(dt_bias)` starts log-uniform between 1e-3 and 0.1,
the low-rank step projection keeps the variance of its input, `A` starts as -1..-N. All functions work in place, on any
device (meta tensors included) and any floating dtype, and return the tensor they were given.
"""

import math

import torch
from torch import Tensor, nn


def auto_dt_rank(dim: int, dt_rank: int | str = 'auto') -> int:
    """Rank of the low-rank step projection: `dt_rank` itself, or `ceil(dim / 16)` for 'auto'.

    Args:
        dim: Width that the rank follows. Vision families take the block's width, not the expanded inner width.
        dt_rank: A positive rank or 'auto'.
    """
    if dt_rank == 'auto':
        return math.ceil(dim / 16)
    if isinstance(dt_rank, str) or dt_rank < 1:
        raise ValueError(f"dt_rank must be a positive integer or 'auto', got {dt_rank!r}.")
    return dt_rank


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which the scan's own parameters enter it: float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)


@torch.no_grad()
def init_dt_bias_(bias: Tensor, dt_min: float = 1e-3, dt_max: float = 0.1, dt_floor: float = 1e-4) -> Tensor:
    """Fill a step bias so that `softplus(bias)` is log-uniform in [dt_min, dt_max], and at least `dt_floor`."""
    dt = torch.empty_like(bias, dtype=compute_dtype(bias.dtype))
    dt.uniform_(math.log(dt_min), math.log(dt_max)).exp_().clamp_(min=dt_floor)
    # inverse softplus log(exp(dt) - 1), written so that a small dt keeps its digits
    return bias.copy_(dt + torch.log(-torch.expm1(-dt)))


@torch.no_grad()
def init_dt_weight_(weight: Tensor, scale: float = 1.0) -> Tensor:
    """Fill a step projection [..., D, R] uniformly in +-scale / sqrt(R), which keeps the variance at initialisation."""
    bound = scale * weight.shape[-1] ** -0.5
    return nn.init.uniform_(weight, -bound, bound)


@torch.no_grad()
def init_linear_weight_(weight: Tensor) -> Tensor:
    """Fill weights [..., O, I] as ``nn.Linear`` does, uniformly in +-1 / sqrt(I)."""
    bound = weight.shape[-1] ** -0.5
    return nn.init.uniform_(weight, -bound, bound)


@torch.no_grad()
def init_A_log_(A_log: Tensor) -> Tensor:
    """Fill `A_log` [..., N] with log(1..N) for every channel (S4D-real)."""
    states = torch.arange(1, A_log.shape[-1] + 1, device=A_log.device, dtype=compute_dtype(A_log.dtype))
    return A_log.copy_(states.log().expand_as(A_log))
