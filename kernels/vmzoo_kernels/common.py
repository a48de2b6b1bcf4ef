"""What the backends share."""

import torch

STATE_INTERVAL = 32
"""Steps of a route between the states that a forward pass keeps for its backward pass."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of state, softplus, exp and sums for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32
