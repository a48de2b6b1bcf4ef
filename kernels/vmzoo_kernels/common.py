"""What the backends share."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

STATE_INTERVAL = 32
"""Steps of a route between the states that a forward pass keeps for its backward pass."""


def state_interval(segment: int) -> int:
    """:data:`STATE_INTERVAL`, or as many whole segments as are nearest below it (but one at least)."""
    return STATE_INTERVAL if segment == 0 else max(STATE_INTERVAL // segment, 1) * segment


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of state, softplus, exp and sums for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def runs_plainly(*tensors: Tensor | None) -> bool:
    """Whether nothing looks into a computation: no compiler, tracer, transform, mode or tensor of another class."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    return not torch._C._len_torch_dispatch_stack() and all(type(v) in _PLAIN for v in tensors)


_PLAIN = (Tensor, nn.Parameter, type(None))


class ScanInputs(NamedTuple):
    """One scan, as every backend takes it.

    Attributes:
        x: [B, L, D] shared by all routes, or [B, L, K, D].
        dt: [B, L, K, R] to be projected by ``dt_weight``, or [B, L, K, D] whole; or rows dt | B | C
            [B, L, K, >= R + 2N].
        B: [B, L, K, N]; None if in the rows.
        C: As ``B``.
        A: [K, D, N].
        D: [K, D], if there is a skip.
        dt_weight: [K, D, R], if step sizes are low-rank.
        dt_bias: [K, D], if there is one.
        gather: [K, S, T] int32, positions read; -1 for padding.
        merge: [K, S, T] int32, positions written; -1 for nowhere.
        complete: Every route reads and writes every position, once.
        softplus: Of the step sizes.
        segment: Steps of the segments, counted from the start of every sequence, that are also scanned backwards; 0
            for none.
    """

    x: Tensor
    dt: Tensor
    B: Tensor | None
    C: Tensor | None
    A: Tensor
    D: Tensor | None
    dt_weight: Tensor | None
    dt_bias: Tensor | None
    gather: Tensor
    merge: Tensor
    complete: bool
    softplus: bool
    segment: int = 0

    def unpacked(self) -> 'ScanInputs':
        """With dt, B and C apart, as views of the rows."""
        if self.B is not None:
            return self
        rank, d_state = self.dt_weight.shape[-1], self.A.shape[-1]
        dt, B, C = self.dt[..., : rank + 2 * d_state].split([rank, d_state, d_state], dim=-1)
        return self._replace(dt=dt, B=B, C=C)

    def in_dtype(self, dtype: torch.dtype) -> 'ScanInputs':
        """All tensors but the tables in one dtype."""
        return ScanInputs(*(v if v is None else v.to(dtype) for v in self[:8]), *self[8:])
