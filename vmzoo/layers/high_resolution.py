"""HRNet's frame: branches of several resolutions side by side, which exchange what they hold.

Paper: `Deep High-Resolution Representation Learning for Visual Recognition` - https://arxiv.org/abs/1908.07919.
Maps are channels-first, [B, C, H, W].
"""

from collections.abc import Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct
from timm.models import checkpoint_seq
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from .conv import conv_bn


def bottleneck(in_dim: int, dim: int, always_project: bool = False, **dd) -> Bottleneck:
    """ResNet's residual block to `dim` channels, with a projection around it if these change, or always."""
    project = always_project or in_dim != dim
    shortcut = nn.Sequential(*conv_bn(in_dim, dim, 1, **dd)) if project else None
    return Bottleneck(in_dim, dim // Bottleneck.expansion, downsample=shortcut, **dd)


def _fusion(in_dim: int, dim: int, steps: int, **dd) -> nn.Sequential:
    """What takes a branch to the width of another: a 1x1 convolution to a finer one, `steps` halvings to a coarser."""
    if steps < 0:
        return nn.Sequential(*conv_bn(in_dim, dim, 1, **dd))
    halvings = []
    for out_dim in [in_dim] * (steps - 1) + [dim]:
        layers = conv_bn(in_dim, in_dim, 3, stride=2, groups=in_dim, **dd) + conv_bn(in_dim, out_dim, 1, **dd)
        halvings.append(nn.Sequential(*layers, nn.ReLU()))
    halvings[-1] = halvings[-1][:-1]
    return nn.Sequential(*halvings)


class HRModule(nn.Module):
    """Blocks on every branch, then their fusion: each branch becomes the sum of all, brought to its size.

    Args:
        branches: The blocks of each branch, finest first; they take channels-last maps.
        dims: Channels of the branches.
        outputs: Branches that come out; None for all.
    """

    def __init__(
        self,
        branches: Iterable[Iterable[nn.Module]],
        dims: tuple[int, ...],
        outputs: tuple[int, ...] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.grad_checkpointing = False
        self.branches = nn.ModuleList(nn.Sequential(*blocks) for blocks in branches)
        # keys are the branches' numbers, and stay so when some are pruned
        self.fuse_layers = nn.ModuleDict()
        for i in range(len(dims)) if outputs is None else outputs:
            sources = {str(j): _fusion(dim, dims[i], i - j, **dd) for j, dim in enumerate(dims) if j != i}
            self.fuse_layers[str(i)] = nn.ModuleDict(sources)

    def _forward_branch(self, branch: nn.Sequential, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = checkpoint_seq(branch, x) if self.grad_checkpointing and not torch.jit.is_scripting() else branch(x)
        return x.permute(0, 3, 1, 2)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """A map [B, C, H, W] of every branch -> one of every branch in `outputs`."""
        maps = [self._forward_branch(branch, x) for branch, x in zip(self.branches, maps)]
        fused = []
        for i, sources in self.fuse_layers.items():
            out = maps[int(i)]
            for j, layers in sources.items():
                y = layers(maps[int(j)])
                if int(j) > int(i):
                    y = F.interpolate(y, scale_factor=2 ** (int(j) - int(i)), mode='bilinear')
                    if y.shape[-2:] != out.shape[-2:]:  # sides that are not multiples of the step
                        y = F.interpolate(y, size=out.shape[-2:], mode='bilinear')
                out = out + y
            fused.append(F.relu(out))
        return fused


class FusionNeck(nn.Module):
    """Widen every branch and carry the sum down, from the finest to the coarsest.

    Args:
        in_dims: Channels of the branches.
        dims: Channels of the widened ones, multiples of 4.
        out_dim: Channels of the coarsest map at the end.
    """

    def __init__(self, in_dims: tuple[int, ...], dims: tuple[int, ...], out_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.increase_layers = nn.ModuleList(
            nn.Sequential(bottleneck(in_dim, dim, always_project=True, **dd)) for in_dim, dim in zip(in_dims, dims)
        )
        self.downsample_layers = nn.ModuleList(
            ConvNormAct(in_dim, dim, 3, stride=2, **dd) for in_dim, dim in pairwise(dims)
        )
        self.final_layer = ConvNormAct(dims[-1], out_dim, 1, **dd)

    def prune(self, levels: int) -> None:
        """Keep only what the finest `levels` maps need."""
        if levels < len(self.increase_layers):
            self.final_layer = nn.Identity()
        self.increase_layers = self.increase_layers[:levels]
        self.downsample_layers = self.downsample_layers[: levels - 1]

    def forward(self, branches: list[Tensor]) -> list[Tensor]:
        """Branches [B, C_i, H_i, W_i] -> the sum at every level, of `dims` channels, `out_dim` at the coarsest."""
        maps = [self.increase_layers[0](branches[0])]
        for increase, downsample, x in zip(self.increase_layers[1:], self.downsample_layers, branches[1:]):
            maps.append(increase(x) + downsample(maps[-1]))
        return [*maps[:-1], self.final_layer(maps[-1])]
