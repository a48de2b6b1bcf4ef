"""2D rotary position embedding over the channels of a token stream, as the first Vision Mamba release used it."""

import torch
from torch import Tensor


def rope_tables(
    grid: tuple[int, int],
    dim: int,
    base_grid: int = 14,
    theta: float = 10000.0,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for every patch of a grid, row-major.

    The first half of the channels turns with the row, the second half with the column; each of the `dim / 4`
    frequencies of a half serves two neighbouring channels. Positions are scaled so that any grid spans `base_grid`
    units.

    Args:
        grid: Rows and columns of patches.
        dim: Channels, a multiple of 4.
        base_grid: Side of the grid that the model was pretrained on.
        theta: Base of the frequencies.
        device: Where the tables are made.
        dtype: Their dtype; they are computed in float32, as the tables stored in published checkpoints were.

    Returns:
        cos, sin: [rows * columns, dim].
    """
    if dim % 4:
        raise ValueError(f'A 2D rotary embedding needs channels in multiples of 4, got {dim}.')
    half = dim // 2
    freqs = 1.0 / theta ** (torch.arange(0, half, 2, device=device, dtype=torch.float32) / half)  # [dim / 4]
    rows, cols = (torch.arange(n, device=device, dtype=torch.float32) / n * base_grid for n in grid)
    rows = torch.outer(rows, freqs).repeat_interleave(2, dim=-1)  # [H, dim / 2]
    cols = torch.outer(cols, freqs).repeat_interleave(2, dim=-1)  # [W, dim / 2]
    rows, cols = rows[:, None].expand(*grid, -1), cols[None].expand(*grid, -1)
    angles = torch.cat((rows, cols), dim=-1).flatten(0, 1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (2m, 2m + 1) of `x` [B, L, D] by the angles of `cos` and `sin` [L, D]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return x * cos + turned * sin
