"""GroupMamba.

Paper: `GroupMamba: Efficient Group-Based Visual State Space Model` - https://arxiv.org/abs/2407.13772 (CVPR 2025)
Weights: https://github.com/Amshaker/GroupMamba (MIT)

A four-stage hierarchical backbone. Its token mixer splits the channels into four groups, each of which is scanned in
one direction only; their outputs are multiplied with the input and with a gate per channel, which lets the groups
interact. A second classifier learned from a convolutional teacher.

Written for timm from the paper's description of the function. What differs from the published code:
* the four groups are one call of the shared scan, and their projections one product each, so their parameters lie
  together in one tensor; published checkpoints are converted when they are loaded;
* the scan's decay, skip and step bias are exempt from weight decay.
"""

import math
import re
from collections.abc import Iterable
from functools import partial

import torch
from timm.layers import DropPath, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vmzoo_kernels import get_routes
from vmzoo_kernels.layer_norm import layer_norm

from ..layers import SS2D, ConvDownsample, DistilledHead, LayerNorm, Linear, Mlp, auto_dt_rank, grouped_linear
from ._builder import build_model, imagenet_cfg
from ._hierarchical import DistilledBackbone, Stage

__all__ = ['GroupMamba']

_NUM_GROUPS = 4


class GroupLinear(nn.Module):
    """Linear layer without bias, of each group of channels on its own.

    Args:
        in_features: Channels of the input; a group is a quarter of them that lie together.
        out_features: Channels of the output.
        chunks: The output is this many maps side by side, each with channels of every group.
    """

    def __init__(self, in_features: int, out_features: int, chunks: int = 1, device=None, dtype=None):
        super().__init__()
        self.chunks = chunks
        shape = (_NUM_GROUPS, out_features // _NUM_GROUPS, in_features // _NUM_GROUPS)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as published."""
        trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        x = grouped_linear(x.unflatten(-1, (_NUM_GROUPS, -1)), self.weight)  # [..., K, chunks * D]
        if self.chunks > 1:
            x = x.unflatten(-1, (self.chunks, -1)).transpose(-3, -2).flatten(-3, -2)  # [..., chunks * K, D]
        return x.flatten(-2)


class GroupLayerNorm(LayerNorm):
    """LayerNorm of each group of channels on its own."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        x = layer_norm(x.unflatten(-1, (_NUM_GROUPS, -1)), eps=self.eps).flatten(-2)
        return torch.addcmul(self.bias, x, self.weight).to(x.dtype)


class GroupSS2D(SS2D):
    """SS2D of four groups of channels, each along one route and with projections of its own: nothing is summed.

    The groups go by rows, by columns, and by both in reverse. Their parameters lie side by side.

    Args:
        dim: Channels C of input and output.
    """

    def __init__(self, dim: int, device=None, dtype=None):
        if dim % _NUM_GROUPS:
            raise ValueError(f'{dim} channels cannot be split into {_NUM_GROUPS} groups: choose a multiple.')
        rank = auto_dt_rank(dim // _NUM_GROUPS)
        super().__init__(dim, ssm_ratio=1.0, dt_rank=rank, conv_bias=True, gate=True, device=device, dtype=dtype)
        self.out_norm = GroupLayerNorm(dim, device=device, dtype=dtype)

    def _build_projection(self, in_features: int, out_features: int, dd: dict) -> nn.Module:
        return GroupLinear(in_features, out_features, chunks=out_features // self.d_inner, **dd)

    def _build_scan_parameters(self, dd: dict) -> None:
        k, d, n, r = self.num_routes, self.d_inner // _NUM_GROUPS, self.d_state, self.dt_rank
        self.x_proj_weight = nn.Parameter(torch.empty(k, r + 2 * n, d, **dd))
        self.dt_projs_weight = nn.Parameter(torch.empty(k, d, r, **dd))
        self.dt_projs_bias = nn.Parameter(torch.empty(k, d, **dd))
        self.A_logs = nn.Parameter(torch.empty(k * d, n, **dd))
        self.Ds = nn.Parameter(torch.empty(k * d, **dd))

    def _scan_map(self, x: Tensor, height: int, width: int) -> Tensor:
        # x [B, L, C] -> [B, L, C]
        routes = get_routes(self.scan, height, width, device=x.device)
        x = x.unflatten(-1, (_NUM_GROUPS, -1))  # [B, L, K, D]
        return self._scan_pass(x, routes, self.x_proj_weight, *self.scan_parameters()).flatten(2)


class ModulatedGroupMixer(nn.Module):
    """Group scans, multiplied with their input and with a gate that sees all groups ("channel affinity modulation").

    Args:
        dim: Channels C.
        gate_reduction: `dim` over the hidden width of the gate.
    """

    def __init__(self, dim: int, gate_reduction: int = 16, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if dim < gate_reduction:
            raise ValueError(f'{dim} channels leave the gate, which has {gate_reduction} times fewer, no hidden one.')
        self.skip_scale = nn.Parameter(torch.empty(1, **dd))
        self.norm = LayerNorm(dim, **dd)
        self.scan = GroupSS2D(dim, **dd)
        self.fc1 = Linear(dim, dim // gate_reduction, **dd)
        self.act = nn.ReLU()
        self.fc2 = Linear(dim // gate_reduction, dim, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise what is not in a sub-module."""
        nn.init.ones_(self.skip_scale)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = self.norm(x)
        gate = self.fc2(self.act(self.fc1(x.mean((1, 2), keepdim=True)))).sigmoid()  # [B, 1, 1, C]
        x = self.scan(x) * x * (self.skip_scale * gate)
        return self.proj(self.norm(x))


class DepthwiseMlp(Mlp):
    """MLP with a depthwise 3x3 convolution before its activation (PVT v2, https://arxiv.org/abs/2106.13797)."""

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None):
        super().__init__(dim, hidden_dim, device=device, dtype=dtype)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = self.fc1(x).permute(0, 3, 1, 2)  # a channels_last view: no copy
        return self.fc2(self.act(self.dwconv(x).permute(0, 2, 3, 1)))


class GroupMambaBlock(nn.Module):
    """Residual block on channels-last maps: mixer (which norms its input itself), then an MLP.

    Args:
        dim: Channels.
        mlp_ratio: Hidden width of the MLP over `dim`.
        drop_path: Stochastic depth rate of both branches.
    """

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.mixer = ModulatedGroupMixer(dim, **dd)
        self.norm2 = LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = DepthwiseMlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = x + self.drop_path(self.mixer(x))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ClassBlock(nn.Module):
    """Residual block on the pooled features alone: mixer with a norm after it, then an MLP.

    Args:
        dim: Channels.
        mlp_ratio: Hidden width of the MLP over `dim`.
    """

    def __init__(self, dim: int, mlp_ratio: float, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm1 = LayerNorm(dim, eps=1e-6, **dd)
        self.norm2 = LayerNorm(dim, eps=1e-6, **dd)
        self.mixer = ModulatedGroupMixer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C] -> [B, C]."""
        x = x + self.norm1(self.mixer(x[:, None, None]).flatten(1))
        return x + self.mlp(self.norm2(x))


class GroupMambaStem(nn.Module):
    """Three convolutions, the first of stride 2, then a downsampling: a map of a quarter of the image's side.

    Args:
        in_chans: Channels of the image.
        hidden_dim: Channels of the convolutions.
        dim: Channels of the output.
    """

    def __init__(self, in_chans: int, hidden_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        layers = []
        for i, (chans, size) in enumerate(((in_chans, 7), (hidden_dim, 3), (hidden_dim, 3))):
            conv = nn.Conv2d(chans, hidden_dim, size, stride=1 if i else 2, padding=size // 2, bias=False, **dd)
            layers += [conv, nn.BatchNorm2d(hidden_dim, **dd), nn.ReLU()]
        self.conv = nn.Sequential(*layers)
        self.downsample = ConvDownsample(hidden_dim, dim, **dd)

    def min_input(self, size: int) -> int:
        """Smallest image side that gives `size` output positions."""
        return 2 * self.downsample.min_input(size) - 1

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, H / 4, W / 4, dim], sides rounded up."""
        return self.downsample(self.conv(x).permute(0, 2, 3, 1))


class GroupMambaStage(Stage):
    """Stage with a norm after its blocks."""

    def __init__(self, blocks: Iterable[nn.Module], downsample: nn.Module | None, norm: nn.Module | None):
        super().__init__(blocks, downsample)
        self.norm = nn.Identity() if norm is None else norm

    def forward_blocks(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C], without the downsampling."""
        return self.norm(super().forward_blocks(x))


class GroupMamba(DistilledBackbone):
    """GroupMamba backbone and classifier. Takes images [B, in_chans, H, W] of any size.

    The features of all stages but the last are normed, as the next one takes them. The network's final norm belongs to
    the head: it was trained on pooled features.

    Args:
        in_chans: Channels of the image.
        num_classes: Outputs of the classifier; 0 for none.
        global_pool: Pooling before the classifier: 'avg', or '' for none.
        output_stride: Accepted for timm's sake: only the network's own stride is possible.
        stem_dim: Channels of the stem.
        depths: Blocks of each stage.
        embed_dim: Channels of each stage, multiples of 4.
        mlp_ratio: Hidden width of the MLPs of each stage over that of the stage.
        distillation: Have a second classifier, which learns from a teacher (see `set_distilled_training`).
        drop_rate: Dropout before the classifiers.
        drop_path_rate: Stochastic depth rate of the last block; it grows linearly from zero.

    Raises:
        ValueError: Options that do not fit together.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        output_stride: int | None = None,
        stem_dim: int = 32,
        depths: tuple[int, ...] = (3, 4, 9, 3),
        embed_dim: tuple[int, ...] = (64, 128, 348, 448),
        mlp_ratio: tuple[float, ...] = (8, 8, 4, 4),
        distillation: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        if not len(depths) == len(embed_dim) == len(mlp_ratio):
            raise ValueError(
                f'depths {tuple(depths)}, embed_dim {tuple(embed_dim)} and mlp_ratio {tuple(mlp_ratio)} differ in '
                'their number of stages.'
            )
        stem = GroupMambaStem(in_chans, stem_dim, embed_dim[0], **dd)
        stages = []
        for i, rates in enumerate(calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)):
            dim = embed_dim[i]
            blocks = [GroupMambaBlock(dim, mlp_ratio[i], drop_path=rate, **dd) for rate in rates]
            is_last = i == len(depths) - 1
            down = None if is_last else ConvDownsample(dim, embed_dim[i + 1], **dd)
            stages.append(GroupMambaStage(blocks, down, None if is_last else LayerNorm(dim, eps=1e-6, **dd)))
        neck = nn.Sequential(ClassBlock(embed_dim[-1], mlp_ratio[-1], **dd), LayerNorm(embed_dim[-1], eps=1e-6, **dd))
        head = DistilledHead(embed_dim[-1], num_classes, global_pool, drop_rate, distillation, neck, **dd)
        super().__init__(
            stem, stages, embed_dim, in_chans, num_classes, output_stride=output_stride, classifier=head, **dd
        )
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise every parameter; `needs_reset` also those that constructors have initialised (`to_empty()`)."""
        super().init_weights(needs_reset)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the features of the given stages do not need; returns their indices."""
        take_indices = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if not self.classifier.global_pool:
            self.classifier.neck = nn.Identity()
        return take_indices


# Published names of modules; their stages are counted from 1.
_RENAMES = {
    'patch_embed1.conv.': 'patch_embed.conv.',
    'patch_embed1.proj.': 'patch_embed.downsample.1.',
    'patch_embed1.norm.': 'patch_embed.downsample.3.',
    **{f'patch_embed{i + 2}.proj.': f'layers.{i}.downsample.1.' for i in range(3)},
    **{f'patch_embed{i + 2}.norm.': f'layers.{i}.downsample.3.' for i in range(3)},
    **{f'block{i + 1}.': f'layers.{i}.blocks.' for i in range(4)},
    **{f'norm{i + 1}.': f'layers.{i}.norm.' for i in range(3)},
    'post_network.0.': 'classifier.neck.0.',
    'norm4.': 'classifier.neck.1.',
    'head.': 'classifier.head.',
    'dist_head.': 'classifier.head_dist.',
}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Map the published names to ours, and put the parameters of the four groups together.

    Args:
        state_dict: Unwrapped weights, published or ours.
        model: The model they are for.
    """
    out, groups = {}, {}
    for name, value in state_dict.items():
        prefix = next((prefix for prefix in _RENAMES if name.startswith(prefix)), '')
        name = _RENAMES.get(prefix, '') + name.removeprefix(prefix)
        name = name.replace('.attn.', '.mixer.').replace('.dwconv.dwconv.', '.dwconv.')
        if match := re.search(r'\.mamba_g([1-4])\.', name):
            groups.setdefault(name.replace(match[0], '.scan.'), {})[match[1]] = value
        else:
            out[name] = value
    for name, values in groups.items():
        values = [values[group] for group in sorted(values)]
        out[name] = torch.stack(values) if name.endswith('_proj.weight') else torch.cat(values)
    return out


def _cfg(drive_id: str) -> dict:
    return imagenet_cfg(
        url=f'https://drive.google.com/file/d/{drive_id}/view',
        first_conv='patch_embed.conv.0',
        classifier=('classifier.head', 'classifier.head_dist'),
        license='mit',
        origin_url='https://github.com/Amshaker/GroupMamba',
        paper_name='GroupMamba: Efficient Group-Based Visual State Space Model',
        paper_ids='arXiv:2407.13772',
    )


default_cfgs = generate_default_cfgs(
    {
        'groupmamba_tiny.dist_in1k': _cfg('1TrYYs0uGZbja_2ONQLyfiNdp8C5ZYP1o'),
        'groupmamba_small.dist_in1k': _cfg('1vTN9ynDcsDuOVrcT9GcQ5nBSk-hXySlh'),
        'groupmamba_base.dist_in1k': _cfg('1A_srBeDYpsinU5W3PAEADu1saoz413EU'),
    }
)

_create_groupmamba = partial(build_model, GroupMamba, pretrained_filter_fn=checkpoint_filter_fn)


@register_model
def groupmamba_tiny(pretrained: bool = False, **kwargs) -> GroupMamba:
    """GroupMamba-T, 23.4 M parameters, 83.3 % top-1 on ImageNet-1k (drop path 0.05)."""
    model_args = {'stem_dim': 32, 'depths': (3, 4, 9, 3), 'embed_dim': (64, 128, 348, 448)}
    return _create_groupmamba('groupmamba_tiny', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def groupmamba_small(pretrained: bool = False, **kwargs) -> GroupMamba:
    """GroupMamba-S, 34.8 M parameters, 83.9 % top-1 on ImageNet-1k (drop path 0.05)."""
    model_args = {'stem_dim': 64, 'depths': (3, 4, 16, 3), 'embed_dim': (64, 128, 348, 512)}
    return _create_groupmamba('groupmamba_small', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def groupmamba_base(pretrained: bool = False, **kwargs) -> GroupMamba:
    """GroupMamba-B, 57.2 M parameters, 84.5 % top-1 on ImageNet-1k (drop path 0.05)."""
    model_args = {'stem_dim': 64, 'depths': (3, 6, 21, 3), 'embed_dim': (96, 192, 424, 512)}
    return _create_groupmamba('groupmamba_base', pretrained=pretrained, **dict(model_args, **kwargs))
