"""Extra tokens among patches, orders of tokens, and position-embedding resizing, for models of one resolution.

A class token may sit in front of the patches or in their middle, at index `num_patches // 2`; its row of the position
embedding sits at the same index, so a resize has to take that row out first and put it back at the new index.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

ClassToken = Literal['front', 'middle', 'none']


def class_token_places(class_token: ClassToken, num_patches: int) -> tuple[int, ...]:
    """Index of the class token in a sequence of `num_patches` patches and that token; empty without a class token."""
    if class_token not in get_args(ClassToken):
        raise ValueError(f"class_token must be 'front', 'middle' or 'none', got {class_token!r}.")
    return {'front': (0,), 'middle': (num_patches // 2,), 'none': ()}[class_token]


def insert_tokens(patches: Tensor, tokens: Tensor, places: Sequence[int]) -> Tensor:
    """Put `tokens` [B, n, D] into `patches` [B, M, D] so that they have the ascending indices `places`."""
    pieces, start = [], 0
    for i, place in enumerate(places):
        pieces += [patches[:, start : place - i], tokens[:, i : i + 1]]
        start = place - i
    return torch.cat((*pieces, patches[:, start:]), dim=1)


def drop_tokens(tokens: Tensor, places: Sequence[int]) -> Tensor:
    """`tokens` [B, L, D] without those at the ascending indices `places`."""
    starts, stops = (0, *(place + 1 for place in places)), (*places, tokens.shape[1])
    pieces = [tokens[:, start:stop] for start, stop in zip(starts, stops) if start < stop]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def column_order(grid: tuple[int, int], places: Sequence[int] = (), device: torch.device | None = None) -> Tensor:
    """The tokens in column-major order: int64 [L], for patches of a grid with other tokens at the indices `places`.

    The other tokens stay where they are; the patches around them change from row-major to column-major order.
    """
    tokens = torch.arange(grid[0] * grid[1] + len(places), device=device)[None, :, None]  # [1, L, 1]
    patches = drop_tokens(tokens, places).unflatten(1, grid).transpose(1, 2).flatten(1, 2)
    others = [tokens[:, place : place + 1] for place in places]
    return insert_tokens(patches, torch.cat((patches[:, :0], *others), dim=1), places).flatten()


def resize_pos_embed(
    pos_embed: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    class_token: ClassToken = 'none',
) -> Tensor:
    """Resize a position embedding to another patch grid (bicubic, half-pixel centres, no antialiasing).

    Args:
        pos_embed: [1, M, D], or [1, M + 1, D] with a class token's row, for M = rows * columns of `old_grid`.
        old_grid: Rows and columns that the patches of `pos_embed` form.
        new_grid: Rows and columns wanted.
        class_token: Where the class token's row is; it is kept as it is and moves to its index in the new grid.

    Returns:
        [1, M' (+ 1), D] in the dtype of `pos_embed`; `pos_embed` itself if the grid stays the same.
    """
    old_grid, new_grid = tuple(old_grid), tuple(new_grid)
    num_patches = old_grid[0] * old_grid[1]
    places = class_token_places(class_token, num_patches)
    if pos_embed.shape[1] != num_patches + len(places):
        raise ValueError(
            f'A position embedding of {pos_embed.shape[1]} rows does not fit a grid of {old_grid[0]}x{old_grid[1]} '
            f'patches with class_token={class_token!r}.'
        )
    if old_grid == new_grid:
        return pos_embed
    grid = drop_tokens(pos_embed, places).unflatten(1, old_grid).permute(0, 3, 1, 2)  # [1, D, h, w]
    grid = grid.to(torch.promote_types(grid.dtype, torch.float32))
    grid = F.interpolate(grid, size=new_grid, mode='bicubic', align_corners=False)
    patches = grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)
    if not places:
        return patches.contiguous()
    token = pos_embed[:, places[0] : places[0] + 1]
    return insert_tokens(patches, token, class_token_places(class_token, new_grid[0] * new_grid[1]))
