"""Necks that the mm libraries don't have."""

from collections.abc import Sequence

import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from torch import Tensor, nn


@MODELS.register_module()
class UpsamplingFPN(BaseModule):
    """A feature pyramid for backbones whose finest map is coarse: finer levels are made from it.

    Every map is normed before its lateral convolution. Transposed convolutions, each of half the stride, go from the
    finest sum of the pyramid to finer levels; coarser levels take every other pixel of the last. EfficientViM
    (https://arxiv.org/abs/2411.15241) and MobileMamba (https://arxiv.org/abs/2411.15941) have it between their maps of
    stride 16, 32 and 64 and detectors whose levels begin at stride 4 or 8.

    Args:
        in_channels: Channels of the maps, from the finest to the coarsest.
        out_channels: Channels of every level.
        num_finer: Levels that are finer than the finest map.
        num_outs: Levels in all.

    Raises:
        ValueError: There are more maps and finer levels than levels.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        num_finer: int = 1,
        num_outs: int = 5,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg or dict(type='Xavier', layer=['Conv2d', 'ConvTranspose2d'], distribution='uniform'))
        self.num_coarser = num_outs - num_finer - len(in_channels)
        if self.num_coarser < 0:
            raise ValueError(
                f'{len(in_channels)} maps and num_finer={num_finer} are more levels than num_outs={num_outs}.'
            )
        self.norms = nn.ModuleList(LayerNorm2d(dim, eps=1e-5) for dim in in_channels)
        self.lateral_convs = nn.ModuleList(nn.Conv2d(dim, out_channels, 1) for dim in in_channels)
        self.finer_convs = nn.ModuleList(
            nn.ConvTranspose2d(out_channels, out_channels, 2, stride=2) for _ in range(num_finer)
        )
        self.output_convs = nn.ModuleList(
            nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in range(num_finer + len(in_channels))
        )

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps [B, C, h, w] -> levels [B, out_channels, h, w], from the finest to the coarsest."""
        sums = [conv(norm(x)) for conv, norm, x in zip(self.lateral_convs, self.norms, maps)]
        for i in range(len(sums) - 1, 0, -1):
            sums[i - 1] = sums[i - 1] + F.interpolate(sums[i], size=sums[i - 1].shape[2:], mode='nearest')
        for conv in self.finer_convs:
            sums.insert(0, conv(sums[0]))
        levels = [conv(x) for conv, x in zip(self.output_convs, sums)]
        for _ in range(self.num_coarser):
            levels.append(levels[-1][..., ::2, ::2])
        return tuple(levels)
