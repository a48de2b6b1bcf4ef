"""What the backends share."""

from typing import NamedTuple

import torch
from torch import Tensor

STATE_INTERVAL = 32
"""Steps of a route between the states that a forward pass keeps for its backward pass."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of state, softplus, exp and sums for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class ScanInputs(NamedTuple):
    """One scan, as every backend takes it.

    Attributes:
        x: [B, L, D] shared by all routes, or [B, L, K, D].
        dt: [B, L, K, R] to be projected by ``dt_weight``, or [B, L, K, D] whole.
        B: [B, L, K, N].
        C: [B, L, K, N].
        A: [K, D, N].
        D: [K, D], if there is a skip.
        dt_weight: [K, D, R], if step sizes are low-rank.
        dt_bias: [K, D], if there is one.
        gather: [K, S, T] int32, positions read; -1 for padding.
        merge: [K, S, T] int32, positions written; -1 for nowhere.
        complete: Every route reads and writes every position, once.
        softplus: Of the step sizes.
    """

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    A: Tensor
    D: Tensor | None
    dt_weight: Tensor | None
    dt_bias: Tensor | None
    gather: Tensor
    merge: Tensor
    complete: bool
    softplus: bool

    def in_dtype(self, dtype: torch.dtype) -> 'ScanInputs':
        """All tensors but the tables in one dtype."""
        return ScanInputs(*(v if v is None else v.to(dtype) for v in self[:8]), *self[8:])
