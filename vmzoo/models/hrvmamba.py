"""HRVMamba.

Paper: `HRVMamba: High-Resolution Visual State Space Model for Dense Prediction` - https://arxiv.org/abs/2410.03174
Weights: https://github.com/zhanghao5201/HRVMamba (no licence stated)

HRNet's frame of four parallel resolutions, 1/4 to 1/32 of the image, which exchange what they hold after every module.
The residual block is a state-space one: depthwise convolutions of four sizes, then VMamba's SS2D whose depthwise
convolution is a deformable one (DCNv4), then an MLP. Four forms share the frame:

* `hrvmamba_{nano,tiny,small,base}` classify: a neck carries every branch down to the coarsest.
* `hrvmamba_*_seg` return the neck's four maps, each with a norm of its own.
* `hrvmamba_*_crowdpose` return the four branches, as a bottom-up pose head takes them.
* `hrvmamba_*_pose` end in the finest branch and a map of scores for every keypoint.

Written for timm from the paper's description of the function; parameter names are those of the published checkpoints.
The deformable convolution needs no compiled extension. Maps of any size are fused, in every form, where the published
pose code needs sides that are multiples of 32. As in timm's HRNet, all branches come out of the last stage together;
they are the features of `features_only=True` (without a level at half of the image's size).
"""

import logging
import re
from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ConvNormAct, SelectAdaptivePool2d, calculate_drop_path_rates, get_device_dtype, trunc_normal_
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from ..layers import SS2D, DCNv4, LayerNorm, Linear, VSSBlock, check_images
from ._builder import build_model

__all__ = ['HRVMamba', 'HRVMambaBranches', 'HRVMambaPose', 'HRVMambaPyramid']

_logger = logging.getLogger(__name__)

_NO_CLASSIFIER = 'This form has no classifier: use num_classes=0, or one of the models for classification.'
_KERNEL_SIZES = (3, 5, 7, 9)


def _conv2d(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution on a channels-last map, which to PyTorch is a tensor in channels_last format: nothing is copied."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _init_linear(layer: nn.Linear) -> None:
    trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class MultiScaleConv(nn.ModuleList):
    """Depthwise convolutions of four sizes, each on a quarter of the channels, whose outputs are interleaved.

    Args:
        dim: Channels C, a multiple of 4.
    """

    def __init__(self, dim: int, device=None, dtype=None):
        part = dim // len(_KERNEL_SIZES)
        dd = {'device': device, 'dtype': dtype}
        super().__init__([nn.Conv2d(part, part, k, padding=k // 2, groups=part, **dd) for k in _KERNEL_SIZES])

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        parts = [_conv2d(conv, part) for conv, part in zip(self, x.chunk(len(self), dim=-1))]
        return torch.stack(parts, dim=-1).flatten(-2)


class SqueezeExcite(nn.Module):
    """Scale the channels of a channels-last map by a function of their means."""

    def __init__(self, dim: int, reduction: int = 8, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype, 'bias': False}
        hidden = max(dim // reduction, 1)
        self.fc = nn.Sequential(Linear(dim, hidden, **dd), nn.ReLU(), Linear(hidden, dim, **dd), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, D] -> [B, H, W, D]."""
        return x * self.fc(x.mean(dim=(1, 2), keepdim=True))


class DeformSS2D(SS2D):
    """SS2D with a deformable convolution before the scan; its groups are as many as the rank of the step sizes.

    Args:
        dim: Channels C.
        offset_conv: A depthwise convolution before the offsets are computed.
        dcn_pointwise: Linear layers around the deformable convolution.
        se: Channel attention on the scan's normed output.
        kwargs: Arguments of `SS2D`.
    """

    def __init__(
        self,
        dim: int,
        offset_conv: bool = False,
        dcn_pointwise: bool = False,
        se: bool = False,
        device=None,
        dtype=None,
        **kwargs,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__(dim, kernel_size=0, **kwargs, **dd)
        self.conv2d = DCNv4(self.d_inner, self.dt_rank, 3, 3 if offset_conv else 0, dcn_pointwise, **dd)
        self.se = SqueezeExcite(self.d_inner, **dd) if se else nn.Identity()

    def mix_locally(self, x: Tensor) -> Tensor:
        return self.conv2d(x)

    def project_out(self, y: Tensor) -> Tensor:
        return self.out_proj(self.se(y))


class DVSSBlock(VSSBlock):
    """Deformable VSS block: multi-scale convolutions, a scan, an MLP, each pre-normed and residual.

    One stochastic depth serves all three.

    Args:
        dim: Channels C, a multiple of 4.
        pos_conv: Depthwise 3x3 convolutions that know the position, before the multi-scale ones (what these add goes on
            top of the block's input, without it) and before the MLP.
        conv_drop_path: Stochastic depth for the multi-scale convolutions too.
        kwargs: Arguments of `VSSBlock` and, through it, of `DeformSS2D`.

    Raises:
        ValueError: `dim` is not a multiple of 4.
    """

    def __init__(
        self,
        dim: int,
        pos_conv: bool = False,
        conv_drop_path: bool = True,
        device=None,
        dtype=None,
        **kwargs,
    ):
        dd = {'device': device, 'dtype': dtype}
        if dim % len(_KERNEL_SIZES):
            raise ValueError(f'The width of every branch must be a multiple of {len(_KERNEL_SIZES)}, got {dim}.')
        super().__init__(dim, mixer_layer=DeformSS2D, **kwargs, **dd)
        self.cpe1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if pos_conv else None
        self.conv2d = MultiScaleConv(dim, **dd)
        self.conv_drop_path = conv_drop_path
        self.norm0 = LayerNorm(dim, **dd)
        self.cpe2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if pos_conv else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        y = x if self.cpe1 is None else x + _conv2d(self.cpe1, x)
        y = F.gelu(self.conv2d(self.norm0(y)))
        x = x + (self.drop_path(y) if self.conv_drop_path else y)
        x = x + self.drop_path(self.op(self.norm(x)))
        if self.cpe2 is not None:
            x = x + _conv2d(self.cpe2, x)
        return x if self.mlp is None else x + self.drop_path(self.mlp(self.norm2(x)))


def _conv_bn(in_dim: int, dim: int, kernel_size: int, stride: int = 1, groups: int = 1, **dd) -> list[nn.Module]:
    padding = kernel_size // 2
    conv = nn.Conv2d(in_dim, dim, kernel_size, stride=stride, padding=padding, groups=groups, bias=False, **dd)
    return [conv, nn.BatchNorm2d(dim, **dd)]


def _bottleneck(in_dim: int, dim: int, always_project: bool = False, **dd) -> Bottleneck:
    project = always_project or in_dim != dim
    shortcut = nn.Sequential(*_conv_bn(in_dim, dim, 1, **dd)) if project else None
    return Bottleneck(in_dim, dim // Bottleneck.expansion, downsample=shortcut, **dd)


def _fusion(in_dim: int, dim: int, steps: int, **dd) -> nn.Sequential:
    """What takes a branch to the width of another: a 1x1 convolution to a finer one, `steps` halvings to a coarser."""
    if steps < 0:
        return nn.Sequential(*_conv_bn(in_dim, dim, 1, **dd))
    halvings = []
    for out_dim in [in_dim] * (steps - 1) + [dim]:
        layers = _conv_bn(in_dim, in_dim, 3, stride=2, groups=in_dim, **dd) + _conv_bn(in_dim, out_dim, 1, **dd)
        halvings.append(nn.Sequential(*layers, nn.ReLU()))
    halvings[-1] = halvings[-1][:-1]
    return nn.Sequential(*halvings)


class HRModule(nn.Module):
    """Blocks on every branch, then their fusion: each branch becomes the sum of all, brought to its size.

    Args:
        dims: Channels of the branches, finest first.
        drop_path: Stochastic depth rate of each block of a branch; their number is the depth.
        outputs: Branches that come out.
        block_kwargs: Arguments of every block.
    """

    def __init__(
        self,
        dims: tuple[int, ...],
        drop_path: list[float],
        outputs: tuple[int, ...],
        block_kwargs: dict,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.grad_checkpointing = False
        self.branches = nn.ModuleList(
            nn.Sequential(*[DVSSBlock(dim, drop_path=rate, **block_kwargs, **dd) for rate in drop_path]) for dim in dims
        )
        # keys are the branches' numbers, and stay so when some are pruned
        self.fuse_layers = nn.ModuleDict()
        for i in outputs:
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
            nn.Sequential(_bottleneck(in_dim, dim, always_project=True, **dd)) for in_dim, dim in zip(in_dims, dims)
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


class HRVMambaBranches(nn.Module):
    """HRVMamba without neck and head: images [B, in_chans, H, W] of any size -> the four branches, finest first.

    Args:
        in_chans: Channels of the image.
        num_classes: 0; there is no classifier.
        output_stride: Accepted for timm's sake: only the network's own stride is possible.
        stage1_dim: Width of the first stage's bottlenecks; they return four times as many channels.
        embed_dim: Channels of each branch, or those of the finest, which then double from branch to branch.
        num_modules: Modules of stages two to four, which have two to four branches.
        depth: Blocks of a branch in every module.
        d_state: State size of the scan.
        ssm_ratio: Width of the scan over that of the block.
        dt_rank: Rank of the scan's step projection, and groups of the deformable convolution ('auto': a sixteenth of
            the block's width).
        mlp_ratio: Hidden width of the MLPs over that of the block.
        pos_conv: Two depthwise convolutions in every block that know the position.
        se: Channel attention on the scan's output.
        offset_conv: A depthwise convolution before the offsets of the deformable convolution are computed.
        dcn_pointwise: Linear layers around the deformable convolution. The published source has them as its default,
            the published weights do not.
        conv_drop_path: Stochastic depth also for the multi-scale convolutions of a block.
        drop_rate: Dropout before the head of the forms that have one.
        drop_path_rate: Stochastic depth rate of the last block; it grows linearly from zero.

    Raises:
        ValueError: An option outside its choices, or widths that do not fit the blocks.
    """

    # branches that the last stage returns
    levels: tuple[int, ...] = (0, 1, 2, 3)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 0,
        output_stride: int | None = None,
        stage1_dim: int = 64,
        embed_dim: int | tuple[int, ...] = 32,
        num_modules: tuple[int, int, int] = (1, 4, 2),
        depth: int = 2,
        d_state: int = 1,
        ssm_ratio: float = 2.0,
        dt_rank: int | str = 'auto',
        mlp_ratio: float = 2.0,
        pos_conv: bool = False,
        se: bool = False,
        offset_conv: bool = False,
        dcn_pointwise: bool = False,
        conv_drop_path: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        dims = tuple(embed_dim * 2**i for i in range(4)) if isinstance(embed_dim, int) else tuple(embed_dim)
        if len(dims) != 4 or len(num_modules) != 3:
            raise ValueError(f'embed_dim takes 1 or 4 numbers and num_modules 3, got {embed_dim} and {num_modules}.')
        if num_classes:
            raise ValueError(_NO_CLASSIFIER)
        if output_stride not in (None, 32):
            raise ValueError(f'output_stride must be 32 here, got {output_stride}: a scan cannot be dilated.')
        self.in_chans = in_chans
        self.num_classes = 0
        self.embed_dim = dims
        self.pos_conv = pos_conv
        self.se = se
        self.drop_rate = drop_rate
        block_kwargs = {
            'pos_conv': pos_conv,
            'conv_drop_path': conv_drop_path,
            'mlp_ratio': mlp_ratio,
            'd_state': d_state,
            'ssm_ratio': ssm_ratio,
            'dt_rank': dt_rank,
            'offset_conv': offset_conv,
            'dcn_pointwise': dcn_pointwise,
            'se': se,
        }

        self.conv1, self.bn1 = _conv_bn(in_chans, 64, 3, stride=2, **dd)
        self.conv2, self.bn2 = _conv_bn(64, 64, 3, stride=2, **dd)
        dim = stage1_dim * Bottleneck.expansion
        self.layer1 = nn.Sequential(_bottleneck(64, dim, **dd), _bottleneck(dim, dim, **dd))

        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(num_modules) * depth))
        for i, count in enumerate(num_modules):
            transition = nn.ModuleDict()
            if i == 0:
                transition['0'] = nn.Sequential(*_conv_bn(dim, dims[0], 3, **dd), nn.ReLU())
            new = nn.Sequential(*_conv_bn(dim if i == 0 else dims[i], dims[i + 1], 3, stride=2, **dd), nn.ReLU())
            transition[str(i + 1)] = nn.Sequential(new)
            modules = []
            for module in range(count):
                is_last = i == 2 and module == count - 1
                outputs = self.levels if is_last else tuple(range(i + 2))
                drop_path = [next(rates) for _ in range(depth)]
                modules.append(HRModule(dims[: i + 2], drop_path, outputs, block_kwargs, **dd))
            setattr(self, f'transition{i + 1}', transition)
            setattr(self, f'stage{i + 2}', nn.Sequential(*modules))

        self.num_features = self.head_hidden_size = dims[self.levels[-1]]
        self.feature_info = [
            {'num_chs': dims[i], 'reduction': 4 * 2**i, 'module': f'stage4.{num_modules[-1] - 1}.fuse_layers.{i}'}
            for i in self.levels
        ]
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise every parameter; `needs_reset` also those that constructors have initialised (`to_empty()`)."""

        def init(module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                _init_linear(module)
            elif needs_reset and hasattr(module, 'reset_parameters'):
                module.reset_parameters()

        self.apply(init)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that the scan is sensitive to."""
        return {name for name, _ in self.named_parameters() if name.endswith(('.A_logs', '.Ds', '.dt_projs_bias'))}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups, from the stem on, for layer-wise learning rates; neck and head are the last."""
        return {
            'stem': r'^(?:conv|bn)[12]\.',
            'blocks': r'^(?:layer|stage|transition)(\d+)'
            if coarse
            else [
                (r'^layer(\d+)\.(\d+)', None),
                (r'^stage(\d+)\.(\d+)', None),
                (r'^transition(\d+)', (99999,)),  # joins the last group before it
            ],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations."""
        for module in self.modules():
            if isinstance(module, HRModule):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Nothing: there is no classifier."""
        return nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """There is no classifier: only `num_classes` 0 is possible."""
        if num_classes:
            raise ValueError(_NO_CLASSIFIER)

    def forward_levels(self, x: Tensor) -> list[Tensor]:
        """Image [B, in_chans, H, W] -> the feature map [B, C_i, H_i, W_i] of every level in `levels`."""
        check_images(x, self.in_chans)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        maps = [self.layer1(x)]
        for transition, stage in (
            (self.transition1, self.stage2),
            (self.transition2, self.stage3),
            (self.transition3, self.stage4),
        ):
            kept = [x for i, x in enumerate(maps) if str(i) not in transition]
            maps = stage(kept + [layers(maps[-1]) for layers in transition.values()])
        return maps

    def _combine(self, maps: list[Tensor]) -> Tensor | list[Tensor]:
        """Features of the image from those of the levels."""
        return maps

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor | list[Tensor], list[Tensor]]:
        """Features of the image, and of chosen levels, which all come out of the last stage.

        Args:
            x: Image [B, in_chans, H, W].
            indices: Levels to return, finest first: the last n if an integer, all if None.
            norm: Without effect: the levels have no norm that could be left out.
            stop_early: Without effect: the levels come together.
            output_fmt: Layout of the level's features: 'NCHW'.
            intermediates_only: Return only these.

        Returns:
            The list of level features, preceded by what `forward_features` returns unless `intermediates_only`.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}.")
        take_indices, _ = feature_take_indices(len(self.feature_info), indices)
        maps = self.forward_levels(x)
        intermediates = [y for i, y in zip(self.levels, maps) if i in take_indices]
        return intermediates if intermediates_only else (self._combine(maps), intermediates)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the features of the given levels do not need; returns their indices."""
        take_indices, _ = feature_take_indices(len(self.feature_info), indices)
        self._keep_levels(take_indices)
        return take_indices

    def _keep_levels(self, levels: list[int]) -> None:
        self.levels = tuple(sorted(levels))
        self._keep_branches(self.levels)
        self.num_features = self.head_hidden_size = self.feature_info[self.levels[-1]]['num_chs']

    def _keep_branches(self, indices: tuple[int, ...]) -> None:
        fuse_layers = self.stage4[-1].fuse_layers
        for i in [*fuse_layers]:
            if int(i) not in indices:
                del fuse_layers[i]

    def forward_features(self, x: Tensor) -> Tensor | list[Tensor]:
        """Image [B, in_chans, H, W] -> features of every level."""
        return self._combine(self.forward_levels(x))

    def forward_head(self, x: Tensor | list[Tensor], pre_logits: bool = False) -> Tensor | list[Tensor]:
        """Returns the features as they are: there is no head."""
        return x

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Image [B, in_chans, H, W] -> what `forward_head` makes of its features."""
        return self.forward_head(self.forward_features(x))


class HRVMambaPyramid(HRVMambaBranches):
    """HRVMamba for segmentation: images [B, in_chans, H, W] -> the four maps of the neck, each normed, finest first.

    Args:
        neck_dims: Channels of the neck's levels, multiples of 4.
        num_features: Channels of the coarsest map.
        kwargs: Arguments of `HRVMambaBranches`.
    """

    def __init__(
        self,
        neck_dims: tuple[int, int, int, int] = (128, 256, 512, 1024),
        num_features: int = 2048,
        device=None,
        dtype=None,
        **kwargs,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__(**kwargs, **dd)
        self.neck = FusionNeck(self.embed_dim, neck_dims, num_features, **dd)
        self.num_features = self.head_hidden_size = num_features
        for i, dim in enumerate((*neck_dims[:-1], num_features)):
            setattr(self, f'outnorm{i}', LayerNorm(dim, **dd))
            self.feature_info[i].update(num_chs=dim, module=f'outnorm{i}')

    def _keep_levels(self, levels: list[int]) -> None:
        super()._keep_levels(levels)
        for i in range(4):
            if i not in levels and hasattr(self, f'outnorm{i}'):
                delattr(self, f'outnorm{i}')
        self.neck.prune(self.levels[-1] + 1)

    def _keep_branches(self, indices: tuple[int, ...]) -> None:
        super()._keep_branches(tuple(range(indices[-1] + 1)))  # the neck sums up to the last level

    def forward_levels(self, x: Tensor) -> list[Tensor]:
        """Image [B, in_chans, H, W] -> the feature map [B, C_i, H_i, W_i] of every level in `levels`."""
        maps = self.neck(super().forward_levels(x))
        norms = [getattr(self, f'outnorm{i}') for i in self.levels]
        return [norm(maps[i].permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for i, norm in zip(self.levels, norms)]


class HRVMambaPose(HRVMambaBranches):
    """HRVMamba for poses: images [B, in_chans, H, W] -> a score map [B, num_classes, H / 4, W / 4] of every keypoint.

    The last fusion makes the finest branch alone, which is also the only level of features.

    Args:
        num_classes: Keypoints; 0 for features instead of score maps.
        kwargs: Arguments of `HRVMambaBranches`.
    """

    levels = (0,)
    task = 'pose'

    def __init__(self, num_classes: int = 17, device=None, dtype=None, **kwargs):
        super().__init__(**kwargs, device=device, dtype=dtype)
        self.head_drop = nn.Dropout(self.drop_rate)
        self.head = nn.Module()
        self.reset_classifier(num_classes)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The layer that makes the score maps."""
        return self.head.final_layer

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the layer that makes the score maps by one for `num_classes` keypoints, or by none."""
        layer = nn.Conv2d(self.num_features, num_classes, 1, **get_device_dtype(self)) if num_classes else nn.Identity()
        self.head.final_layer = layer.train(self.training)
        self.num_classes = num_classes

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the head, if `prune_head`; the one level of features needs all else."""
        if prune_head:
            self.reset_classifier(0)
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)

    def _combine(self, maps: list[Tensor]) -> Tensor:
        return maps[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [B, C, H', W'] -> score maps [B, num_classes, H', W'], or the features if `pre_logits`."""
        x = self.head_drop(x)
        return x if pre_logits else self.head.final_layer(x)


class HRVMamba(HRVMambaBranches):
    """HRVMamba backbone and classifier. Takes images [B, in_chans, H, W] of any size.

    Args:
        num_classes: Outputs of the classifier; 0 for none.
        global_pool: Pooling before the classifier, '' for none.
        neck_dims: Channels of the neck's levels, multiples of 4.
        num_features: Channels of the features that are pooled.
        kwargs: Arguments of `HRVMambaBranches`.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        neck_dims: tuple[int, int, int, int] = (128, 256, 512, 1024),
        num_features: int = 2048,
        device=None,
        dtype=None,
        **kwargs,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__(**kwargs, **dd)
        self.neck = FusionNeck(self.embed_dim, neck_dims, num_features, **dd)
        self.num_features = num_features
        self.head_drop = nn.Dropout(self.drop_rate)
        self.reset_classifier(num_classes, global_pool)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The final linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one; `global_pool` None keeps the pooling."""
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        if num_classes and self.neck is None:
            raise ValueError('The model was pruned to its branches; a classifier needs the neck.')
        if num_classes and not pool_type:
            raise ValueError("A classifier needs pooled features: choose a global_pool other than '' or num_classes=0.")
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.head_hidden_size, num_classes, **get_device_dtype(self))
            _init_linear(self.head)
        self.train(self.training)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the features of the given branches do not need; returns their indices.

        Without `prune_head` the model is kept as it is if the coarsest branch is among them: its classifier needs all.
        """
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        if prune_head or max_index < 3:
            self.neck = None
            self._keep_levels(take_indices)
            self.reset_classifier(0, '')
        return take_indices

    def _combine(self, maps: list[Tensor]) -> Tensor | list[Tensor]:
        return maps if self.neck is None else self.neck(maps)[-1]

    def forward_head(self, x: Tensor | list[Tensor], pre_logits: bool = False) -> Tensor | list[Tensor]:
        """Features [B, C, H', W'] -> logits [B, num_classes], or pooled features if `pre_logits`."""
        if self.neck is None:
            return x
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)


# Options of which a checkpoint's keys tell.
_TELLTALES = {
    'pos_conv': '.cpe1.',
    'se': '.op.se.',
    'offset_conv': '.offset_mask_dw.',
    'dcn_pointwise': '.value_proj.',
}
# Parts that only some of the forms have.
_HEADS = re.compile(r'(neck|head|outnorm\d)\.')
_FUSIONS = re.compile(r'stage4\.\d+\.fuse_layers\.[1-3]\.')


def _check_options(state_dict: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    wanted = []
    for option, telltale in _TELLTALES.items():
        given, expected = (any(telltale in key for key in keys) for keys in (state_dict, target))
        if given != expected:
            wanted.append(f'{option}={given}')
    if wanted:
        raise ValueError(f'create the model with {", ".join(wanted)}')


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: HRVMambaBranches) -> dict[str, Tensor]:
    """Fit a published checkpoint of any form, or one of ours, to `model`.

    A model without a classifier takes weights of another form: without the parts that it does not have. Neck, norms and
    head that the checkpoint does not have at all stay as they are in the model, with a warning.

    Raises:
        ValueError: The blocks have other parts than the model's, which options would give it.
    """
    target = model.state_dict()
    width = 'transition1.0.0.weight'
    if width in state_dict and state_dict[width].shape == target[width].shape:
        _check_options(state_dict, target)
    if isinstance(model, HRVMamba):
        return state_dict
    weights = {
        key: value
        for key, value in state_dict.items()
        if key in target or not (_HEADS.match(key) or _FUSIONS.match(key))
    }
    parts = {key.partition('.')[0] for key in weights}
    own = {key: value for key, value in target.items() if _HEADS.match(key) and key.partition('.')[0] not in parts}
    if own:
        names = sorted({key.partition('.')[0] for key in own})
        _logger.warning('The checkpoint has no %s: as initialised in the model', ', '.join(names))
    return weights | own


def _cfg(file: str = '', **kwargs) -> dict:
    return {
        'url': f'https://drive.google.com/file/d/{file}/view' if file else '',
        'num_classes': 1000,
        'input_size': (3, 256, 256),
        'pool_size': (8, 8),
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1',
        'classifier': 'head',
        'license': 'unknown',
        'origin_url': 'https://github.com/zhanghao5201/HRVMamba',
        'paper_name': 'HRVMamba: High-Resolution Visual State Space Model for Dense Prediction',
        'paper_ids': 'arXiv:2410.03174',
        **kwargs,
    }


def _dense_cfg(file: str, size: tuple[int, int], num_classes: int = 0) -> dict:
    return _cfg(file, input_size=(3, *size), num_classes=num_classes, pool_size=None, classifier=None, crop_pct=1.0)


default_cfgs = generate_default_cfgs(
    {
        'hrvmamba_nano.in1k': _cfg('1vjoEmX8NGh3D4aIB2zTP6eKN23zXmd7i'),
        'hrvmamba_tiny.in1k': _cfg('18MnK9b-Ip7RLevdAzzPBFNIe_BNHg2Ry'),
        'hrvmamba_small.in1k': _cfg('1Gxo0Pxg2D7x3dU0P2AZ2YGEFS-7XMxIX'),
        'hrvmamba_base.in1k': _cfg('1jbXjvCBdjgraeEaJrDjD2wStpxJtCEuy', input_size=(3, 224, 224), pool_size=(7, 7)),
        'hrvmamba_tiny_pose.coco_256x192': _dense_cfg('1cj6VPnSiyCDQHuDEZIIytyEQO-Xr-pPO', (256, 192), 17),
        'hrvmamba_small_pose.coco_256x192': _dense_cfg('1L3CO3D4L1Q1galRaSC82taDDqFqmukKt', (256, 192), 17),
        'hrvmamba_small_pose.coco_384x288': _dense_cfg('1aqkUoQog4hl1dSbkUkwQvlwgistpxtzQ', (384, 288), 17),
        'hrvmamba_base_pose.coco_256x192': _dense_cfg('14JE7v6jdxtJaEMJCatqbmuhLkfBYVBOX', (256, 192), 17),
        'hrvmamba_base_pose.coco_384x288': _dense_cfg('161d_LhWBBvBOSXxPBGRBNCjYr8PP0w9c', (384, 288), 17),
        'hrvmamba_small_crowdpose.crowdpose_640': _dense_cfg('1J4OoX8QeclHUGeBOTU8twPX8T7DYZ2EV', (640, 640)),
        'hrvmamba_base_crowdpose.crowdpose_640': _dense_cfg('1Xbuj1-NWg9ivCzUFaLUGc-eQp0d0146j', (640, 640)),
        'hrvmamba_base_seg.ade20k_512': _dense_cfg('1O288Y_VhuWRtTXO2WpTbGkEwEn2raik-', (512, 512)),
    }
)

_ARGS = {
    'nano': {'stage1_dim': 16, 'embed_dim': 8, 'pos_conv': True, 'se': True},
    'tiny': {'stage1_dim': 32, 'embed_dim': 16, 'pos_conv': True, 'se': True},
    'small': {'stage1_dim': 64, 'embed_dim': 32},
    'base': {'stage1_dim': 64, 'embed_dim': 80, 'offset_conv': True},
}


def _create_hrvmamba(
    variant: str, pretrained: bool = False, cls: type[HRVMambaBranches] = HRVMamba, **kwargs
) -> HRVMambaBranches:
    size = variant.split('_')[1]
    return build_model(
        cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={'out_indices': cls.levels, 'feature_cls': 'getter'},
        **dict(_ARGS[size], **kwargs),
    )


@register_model
def hrvmamba_nano(pretrained: bool = False, **kwargs) -> HRVMamba:
    """HRVMamba-Nano, 12.3 M parameters, 74.8 % top-1 on ImageNet-1k (trained with drop path 0.1)."""
    return _create_hrvmamba('hrvmamba_nano', pretrained=pretrained, **kwargs)


@register_model
def hrvmamba_tiny(pretrained: bool = False, **kwargs) -> HRVMamba:
    """HRVMamba-T, 14.1 M parameters, 78.6 % top-1 on ImageNet-1k (drop path 0.1)."""
    return _create_hrvmamba('hrvmamba_tiny', pretrained=pretrained, **kwargs)


@register_model
def hrvmamba_small(pretrained: bool = False, **kwargs) -> HRVMamba:
    """HRVMamba-S, 20.1 M parameters, 81.3 % top-1 on ImageNet-1k (drop path 0.2)."""
    return _create_hrvmamba('hrvmamba_small', pretrained=pretrained, **kwargs)


@register_model
def hrvmamba_base(pretrained: bool = False, **kwargs) -> HRVMamba:
    """HRVMamba-B, 60.5 M parameters, 84.2 % top-1 on ImageNet-1k (drop path 0.2)."""
    return _create_hrvmamba('hrvmamba_base', pretrained=pretrained, **kwargs)


@register_model
def hrvmamba_tiny_pose(pretrained: bool = False, **kwargs) -> HRVMambaPose:
    """HRVMamba-T for 17 keypoints, 2.3 M parameters, 69.5 AP on COCO (no drop path).

    The published code names blocks without `pos_conv` and `se`, the name of the published file those with them.
    """
    model_args = {'conv_drop_path': False}
    return _create_hrvmamba('hrvmamba_tiny_pose', pretrained, HRVMambaPose, **dict(model_args, **kwargs))


@register_model
def hrvmamba_small_pose(pretrained: bool = False, **kwargs) -> HRVMambaPose:
    """HRVMamba-S for 17 keypoints, 8.0 M parameters, 74.6 AP on COCO at 256x192, 76.4 at 384x288."""
    model_args = {'conv_drop_path': False}
    return _create_hrvmamba('hrvmamba_small_pose', pretrained, HRVMambaPose, **dict(model_args, **kwargs))


@register_model
def hrvmamba_base_pose(pretrained: bool = False, **kwargs) -> HRVMambaPose:
    """HRVMamba-B for 17 keypoints, 47.1 M parameters, 76.5 AP on COCO at 256x192, 77.7 at 384x288."""
    model_args = {'conv_drop_path': False}
    return _create_hrvmamba('hrvmamba_base_pose', pretrained, HRVMambaPose, **dict(model_args, **kwargs))


@register_model
def hrvmamba_small_crowdpose(pretrained: bool = False, **kwargs) -> HRVMambaBranches:
    """HRVMamba-S for bottom-up poses, 8.2 M parameters, 68.8 AP on CrowdPose with a DEKR head (drop path 0.2)."""
    model_args = {'conv_drop_path': False}
    return _create_hrvmamba('hrvmamba_small_crowdpose', pretrained, HRVMambaBranches, **dict(model_args, **kwargs))


@register_model
def hrvmamba_base_crowdpose(pretrained: bool = False, **kwargs) -> HRVMambaBranches:
    """HRVMamba-B for bottom-up poses, 47.5 M parameters, 69.6 AP on CrowdPose with a DEKR head (drop path 0.6)."""
    model_args = {'conv_drop_path': False}
    return _create_hrvmamba('hrvmamba_base_crowdpose', pretrained, HRVMambaBranches, **dict(model_args, **kwargs))


@register_model
def hrvmamba_base_seg(pretrained: bool = False, **kwargs) -> HRVMambaPyramid:
    """HRVMamba-B for segmentation, 58.5 M parameters, 51.4 mIoU on ADE20K with UPerNet (drop path 0.15)."""
    return _create_hrvmamba('hrvmamba_base_seg', pretrained, HRVMambaPyramid, **kwargs)
