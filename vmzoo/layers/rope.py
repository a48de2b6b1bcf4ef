"""2D rotary position embeddings over the channels of a token stream."""

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
    cos, sin = _tables(rows, cols, freqs, dtype)
    return cos.flatten(0, 1), sin.flatten(0, 1)


def pixel_rope_tables(
    grid: tuple[int, int],
    dim: int,
    theta: float = 10000.0,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines as of :func:`rope_tables`, with positions in pixels and frequencies from 1 to 1 / theta.

    Returns:
        cos, sin: [rows, columns, dim].
    """
    if dim % 4:
        raise ValueError(f'A 2D rotary embedding needs channels in multiples of 4, got {dim}.')
    freqs = 1.0 / theta ** torch.linspace(0, 1, dim // 4, device=device, dtype=torch.float32)
    rows, cols = (torch.arange(n, device=device, dtype=torch.float32) for n in grid)
    return _tables(rows, cols, freqs, dtype)


def _tables(rows: Tensor, cols: Tensor, freqs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # positions [H] and [W], freqs [dim / 4] -> cos, sin [H, W, dim]
    grid = rows.shape[0], cols.shape[0]
    rows, cols = (torch.outer(v, freqs).repeat_interleave(2, dim=-1) for v in (rows, cols))  # [n, dim / 2]
    angles = torch.cat((rows[:, None].expand(*grid, -1), cols[None].expand(*grid, -1)), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (2m, 2m + 1) of `x` [..., D] by the angles of `cos` and `sin`, of a shape that fits."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return x * cos + turned * sin
