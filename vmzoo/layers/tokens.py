"""Class-token placement and position-embedding resizing for models that keep one resolution.

A class token may sit in front of the patches or in their middle, at index `num_patches // 2`; its row of the position
embedding sits at the same index, so a resize has to take that row out first and put it back at the new index.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

ClassToken = Literal['front', 'middle', 'none']


def class_token_index(class_token: ClassToken, num_patches: int) -> int | None:
    """Index of the class token in a sequence of `num_patches` patches and that token; None without a class token."""
    if class_token not in get_args(ClassToken):
        raise ValueError(f"class_token must be 'front', 'middle' or 'none', got {class_token!r}.")
    return {'front': 0, 'middle': num_patches // 2, 'none': None}[class_token]


def insert_token(patches: Tensor, token: Tensor, index: int) -> Tensor:
    """Put `token` [B, 1, D] into `patches` [B, M, D] so that it has index `index`."""
    return torch.cat((patches[:, :index], token, patches[:, index:]), dim=1)


def drop_token(tokens: Tensor, index: int | None) -> Tensor:
    """`tokens` [B, L, D] without the one at `index`; all of them if `index` is None."""
    if index is None:
        return tokens
    if index == 0:
        return tokens[:, 1:]
    return torch.cat((tokens[:, :index], tokens[:, index + 1 :]), dim=1)


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
    index = class_token_index(class_token, num_patches)
    if pos_embed.shape[1] != num_patches + (index is not None):
        raise ValueError(
            f'A position embedding of {pos_embed.shape[1]} rows does not fit a grid of {old_grid[0]}x{old_grid[1]} '
            f'patches with class_token={class_token!r}.'
        )
    if old_grid == new_grid:
        return pos_embed
    grid = drop_token(pos_embed, index).unflatten(1, old_grid).permute(0, 3, 1, 2)  # [1, D, h, w]
    grid = grid.to(torch.promote_types(grid.dtype, torch.float32))
    grid = F.interpolate(grid, size=new_grid, mode='bicubic', align_corners=False)
    patches = grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)
    if index is None:
        return patches.contiguous()
    new_index = class_token_index(class_token, new_grid[0] * new_grid[1])
    return insert_token(patches, pos_embed[:, index : index + 1], new_index)
