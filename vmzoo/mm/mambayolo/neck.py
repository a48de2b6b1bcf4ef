"""Neck of Mamba-YOLO: levels are fused from coarse to fine, and back, by ODSS blocks."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from vmzoo.layers import ConvBnAct, ODSSBlock


@MODELS.register_module()
class MambaYOLOPAFPN(BaseModule):
    """Path aggregation whose levels keep their channels.

    Args:
        in_channels: Channels of each level, of input and output, from fine to coarse.
        num_scans: Scans in a row in each block.
        d_state: State size of the scans.
        ssm_ratio: Width of the scans over that of the block.
        mlp_ratio: Hidden width of the gated MLPs over that of the block, of which a third is taken off.
        init_cfg: As in mmengine; weights start as the published ones do without it.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_scans: int = 1,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        mlp_ratio: float = 4.0,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.in_channels = tuple(in_channels)

        def block(in_dim: int, dim: int) -> ODSSBlock:
            return ODSSBlock(dim, ConvBnAct(in_dim, dim), num_scans, d_state, ssm_ratio, mlp_ratio)

        steps = list(pairwise(in_channels))  # (fine, coarse)
        self.top_down = nn.ModuleList(block(coarse + fine, fine) for fine, coarse in reversed(steps))
        self.downsamples = nn.ModuleList(ConvBnAct(fine, fine, 3, stride=2) for fine, _ in steps)
        self.bottom_up = nn.ModuleList(block(fine + coarse, coarse) for fine, coarse in steps)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps [B, C_i, H_i, W_i] -> as many of the same shapes.

        Raises:
            ValueError: A map is not half as large as the one before it.
        """
        for fine, coarse in pairwise(maps):
            if fine.shape[2:] != tuple(2 * size for size in coarse.shape[2:]):
                raise ValueError(
                    f'Maps of {tuple(fine.shape[2:])} and {tuple(coarse.shape[2:])} do not fit together: sides of '
                    'images must be multiples of the coarsest stride. Pad them, as '
                    'data_preprocessor=dict(pad_size_divisor=32) does.'
                )
        *rest, x = maps
        lateral = [x]  # from coarse to fine
        for block, fine in zip(self.top_down, reversed(rest)):
            lateral.append(_fuse(block, F.interpolate(lateral[-1], scale_factor=2, mode='nearest'), fine))
        out = [lateral.pop()]
        for downsample, block in zip(self.downsamples, self.bottom_up):
            out.append(_fuse(block, downsample(out[-1]), lateral.pop()))
        return tuple(out)


def _fuse(block: ODSSBlock, *maps: Tensor) -> Tensor:
    """[B, C_i, H, W] of several levels -> [B, C, H, W]."""
    return block(torch.cat(maps, dim=1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
