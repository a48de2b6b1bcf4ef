"""Deformable depthwise aggregation, as the fourth deformable convolution (DCNv4) defines it, on channels-last maps.

Paper: `Efficient Deformable ConvNets: Rethinking Dynamic and Sparse Operator for Vision Applications` -
https://arxiv.org/abs/2401.06197
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from .linear import Linear
from .ssm_init import compute_dtype


def _count_weighted_sums(*operators) -> None:
    # every row that enters a bag is a multiply-accumulate for each of its values; no weights, no product
    operators = [operator for operator in operators if operator not in flop_registry]
    if operators:

        @register_flop_formula(operators)
        def _(table_shape, rows_shape, *args, **kwargs) -> int:
            weights_shape = kwargs.get('per_sample_weights', args[4] if len(args) > 4 else None)
            return 0 if weights_shape is None else 2 * torch.Size(rows_shape).numel() * table_shape[1]


_count_weighted_sums(torch.ops.aten._embedding_bag, torch.ops.aten._embedding_bag_forward_only)


def deform_aggregate(x: Tensor, offset: Tensor, mask: Tensor, kernel_size: int = 3) -> Tensor:
    """Sum over the points of a kernel of `mask` times the map at the point moved by `offset`.

    Every group of channels has points of its own. Between pixels the map is interpolated bilinearly, outside it is
    zero. Positions are computed in at least float32, and in pixels, which keeps more digits than the normalised grid of
    ``F.grid_sample``. The sum over points and their neighbours is one ``F.embedding_bag`` over pixels: nothing of the
    size of map times points is stored.

    Args:
        x: Map [B, H, W, D].
        offset: [B, H, W, G, K, 2] for G groups and K = kernel_size², (x, y) in pixels; point `i * kernel_size + j` lies
            in column i and row j of the kernel.
        mask: Weights of the points [B, H, W, G, K].
        kernel_size: Side of the kernel.

    Returns:
        [B, H, W, D] in the dtype of `x`.
    """
    batch, height, width, dim = x.shape
    groups, num_points = mask.shape[-2:]
    dtype = compute_dtype(offset.dtype)
    offset, mask = offset.to(dtype), mask.to(dtype)

    arange = partial(torch.arange, device=x.device, dtype=dtype)
    step = arange(kernel_size) - kernel_size // 2
    columns = arange(width)[:, None, None] + step.repeat_interleave(kernel_size)  # [W, 1, K]
    rows = arange(height)[:, None, None, None] + step.repeat(kernel_size)  # [H, 1, 1, K]
    # beyond one pixel outside, the map is zero and stays zero: the border below holds every neighbour
    columns = (offset[..., 0] + columns).clamp(-1, width)  # [B, H, W, G, K]
    rows = (offset[..., 1] + rows).clamp(-1, height)
    # positions that are not finite keep their weights so, and must not become addresses
    left, top = (side.detach().floor().nan_to_num() for side in (columns, rows))

    right_part, lower_part = columns - left, rows - top
    lower = mask * lower_part
    upper = mask - lower
    lower_right, upper_right = lower * right_part, upper * right_part
    weights = torch.stack((upper - upper_right, upper_right, lower - lower_right, lower_right), dim=-1)

    table = F.pad(x, (0, 0, 1, 2, 1, 2)).reshape(-1, dim // groups)  # row ((b * (H + 3) + y) * (W + 3) + x) * G + g
    first = torch.arange(batch, device=x.device)[:, None, None, None, None] * (height + 3) + top.long() + 1
    first = (first * (width + 3) + left.long() + 1) * groups + torch.arange(groups, device=x.device)[:, None]
    below = (width + 3) * groups
    neighbours = torch.stack((first, first + groups, first + below, first + below + groups), dim=-1)

    shape = (batch * height * width * groups, 4 * num_points)
    out = F.embedding_bag(
        neighbours.reshape(shape), table, per_sample_weights=weights.reshape(shape).to(x.dtype), mode='sum'
    )
    return out.reshape(batch, height, width, dim)


class DCNv4(nn.Module):
    """Deformable depthwise aggregation whose offsets and (unbounded) weights are linear in the map: DCNv4.

    Parameter names and shapes are those of the published layer; outputs of `offset_mask` beyond the first 27 G are
    filling that nothing reads.

    Args:
        dim: Channels D.
        groups: Groups G of channels, each with its own points.
        kernel_size: Side of the kernel, odd.
        offset_kernel_size: Of a depthwise convolution before the offsets are computed, odd; 0 for none.
        pointwise: Linear layers on the map before the aggregation and after it.

    Raises:
        ValueError: `groups` does not divide `dim`, or an even kernel.
    """

    def __init__(
        self,
        dim: int,
        groups: int,
        kernel_size: int = 3,
        offset_kernel_size: int = 0,
        pointwise: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if dim % groups:
            raise ValueError(f'The {dim} channels must be a multiple of the {groups} groups.')
        if kernel_size % 2 == 0 or (offset_kernel_size and offset_kernel_size % 2 == 0):
            raise ValueError(f'Kernels must be odd, got {kernel_size} and {offset_kernel_size}.')
        self.groups = groups
        self.kernel_size = kernel_size
        self.num_points = kernel_size**2
        self.offset_mask_dw = (
            nn.Conv2d(dim, dim, offset_kernel_size, padding=offset_kernel_size // 2, groups=dim, **dd)
            if offset_kernel_size
            else None
        )
        self.offset_mask = Linear(dim, 8 * math.ceil(3 * groups * self.num_points / 8), **dd)
        self.value_proj = Linear(dim, dim, **dd) if pointwise else nn.Identity()
        self.output_proj = Linear(dim, dim, bias=False, **dd) if pointwise else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, D] -> [B, H, W, D]."""
        context = x
        if self.offset_mask_dw is not None:
            context = self.offset_mask_dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        used = 3 * self.groups * self.num_points
        points = self.offset_mask(context)[..., :used].unflatten(-1, (self.groups, -1))  # [B, H, W, G, 3K]
        offset, mask = points.split((2 * self.num_points, self.num_points), dim=-1)
        offset = offset.unflatten(-1, (self.num_points, 2))
        return self.output_proj(deform_aggregate(self.value_proj(x), offset, mask, self.kernel_size))
