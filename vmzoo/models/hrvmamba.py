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
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, create_classifier, get_device_dtype
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from ..layers import (
    SS2D,
    DCNv4,
    DepthwiseConv,
    FusionNeck,
    HRModule,
    LayerNorm,
    MultiScaleConv,
    SqueezeExcite,
    VSSBlock,
    bottleneck,
    check_images,
    conv_bn,
    init_truncated_,
)
from ._builder import build_model, imagenet_cfg
from ._hierarchical import ScanBackbone

__all__ = ['HRVMamba', 'HRVMambaBranches', 'HRVMambaPose', 'HRVMambaPyramid']

_logger = logging.getLogger(__name__)

_NO_CLASSIFIER = 'This form has no classifier: use num_classes=0, or one of the models for classification.'


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
        super().__init__(dim, mixer_layer=DeformSS2D, **kwargs, **dd)
        self.cpe1 = DepthwiseConv(dim, **dd) if pos_conv else None
        self.conv2d = MultiScaleConv(dim, **dd)
        self.conv_drop_path = conv_drop_path
        self.norm0 = LayerNorm(dim, **dd)
        self.cpe2 = DepthwiseConv(dim, **dd) if pos_conv else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        y = x if self.cpe1 is None else x + self.cpe1(x)
        y = F.gelu(self.conv2d(self.norm0(y)))
        x = x + (self.drop_path(y) if self.conv_drop_path else y)
        x = x + self.drop_path(self.op(self.norm(x)))
        if self.cpe2 is not None:
            x = x + self.cpe2(x)
        return x if self.mlp is None else x + self.drop_path(self.mlp(self.norm2(x)))


class HRVMambaBranches(ScanBackbone):
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
        block = partial(
            DVSSBlock,
            pos_conv=pos_conv,
            conv_drop_path=conv_drop_path,
            mlp_ratio=mlp_ratio,
            d_state=d_state,
            ssm_ratio=ssm_ratio,
            dt_rank=dt_rank,
            offset_conv=offset_conv,
            dcn_pointwise=dcn_pointwise,
            se=se,
        )

        self.conv1, self.bn1 = conv_bn(in_chans, 64, 3, stride=2, **dd)
        self.conv2, self.bn2 = conv_bn(64, 64, 3, stride=2, **dd)
        dim = stage1_dim * Bottleneck.expansion
        self.layer1 = nn.Sequential(bottleneck(64, dim, **dd), bottleneck(dim, dim, **dd))

        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(num_modules) * depth))
        for i, count in enumerate(num_modules):
            transition = nn.ModuleDict()
            if i == 0:
                transition['0'] = nn.Sequential(*conv_bn(dim, dims[0], 3, **dd), nn.ReLU())
            new = nn.Sequential(*conv_bn(dim if i == 0 else dims[i], dims[i + 1], 3, stride=2, **dd), nn.ReLU())
            transition[str(i + 1)] = nn.Sequential(new)
            modules = []
            for module in range(count):
                is_last = i == 2 and module == count - 1
                drop_path = [next(rates) for _ in range(depth)]
                branches = [[block(dim, drop_path=rate, **dd) for rate in drop_path] for dim in dims[: i + 2]]
                modules.append(HRModule(branches, dims[: i + 2], self.levels if is_last else None, **dd))
            setattr(self, f'transition{i + 1}', transition)
            setattr(self, f'stage{i + 2}', nn.Sequential(*modules))

        self.num_features = self.head_hidden_size = dims[self.levels[-1]]
        self.feature_info = [
            {'num_chs': dims[i], 'reduction': 4 * 2**i, 'module': f'stage4.{num_modules[-1] - 1}.fuse_layers.{i}'}
            for i in self.levels
        ]
        self.init_weights(needs_reset=False)

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
        self.global_pool, self.head = create_classifier(
            self.num_features, num_classes, pool_type, **get_device_dtype(self)
        )
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        if num_classes:
            init_truncated_(self.head)
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


def _cfg(file: str, **kwargs) -> dict:
    options = {
        'url': f'https://drive.google.com/file/d/{file}/view',
        'input_size': (3, 256, 256),
        'pool_size': (8, 8),
        'first_conv': 'conv1',
        'classifier': 'head',
        'origin_url': 'https://github.com/zhanghao5201/HRVMamba',
        'paper_name': 'HRVMamba: High-Resolution Visual State Space Model for Dense Prediction',
        'paper_ids': 'arXiv:2410.03174',
    }
    return imagenet_cfg(**dict(options, **kwargs))


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

_SIZES = {
    'nano': {'stage1_dim': 16, 'embed_dim': 8, 'pos_conv': True, 'se': True},
    'tiny': {'stage1_dim': 32, 'embed_dim': 16, 'pos_conv': True, 'se': True},
    'small': {'stage1_dim': 64, 'embed_dim': 32},
    'base': {'stage1_dim': 64, 'embed_dim': 80, 'offset_conv': True},
}

# Class and options of each form.
_FORMS = {
    '': (HRVMamba, {}),
    'seg': (HRVMambaPyramid, {}),
    'pose': (HRVMambaPose, {'conv_drop_path': False}),
    'crowdpose': (HRVMambaBranches, {'conv_drop_path': False}),
}


def _create_hrvmamba(variant: str, pretrained: bool = False, **kwargs) -> HRVMambaBranches:
    _, size, *form = variant.split('_')
    model_cls, form_args = _FORMS[''.join(form)]
    return build_model(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={'out_indices': model_cls.levels},
        **{**_SIZES[size], **form_args, **kwargs},
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
    return _create_hrvmamba('hrvmamba_tiny_pose', pretrained=pretrained, **kwargs)


@register_model
def hrvmamba_small_pose(pretrained: bool = False, **kwargs) -> HRVMambaPose:
    """HRVMamba-S for 17 keypoints, 8.0 M parameters, 74.6 AP on COCO at 256x192, 76.4 at 384x288."""
    return _create_hrvmamba('hrvmamba_small_pose', pretrained=pretrained, **kwargs)


@register_model
def hrvmamba_base_pose(pretrained: bool = False, **kwargs) -> HRVMambaPose:
    """HRVMamba-B for 17 keypoints, 47.1 M parameters, 76.5 AP on COCO at 256x192, 77.7 at 384x288."""
    return _create_hrvmamba('hrvmamba_base_pose', pretrained=pretrained, **kwargs)


@register_model
def hrvmamba_small_crowdpose(pretrained: bool = False, **kwargs) -> HRVMambaBranches:
    """HRVMamba-S for bottom-up poses, 8.2 M parameters, 68.8 AP on CrowdPose with a DEKR head (drop path 0.2)."""
    return _create_hrvmamba('hrvmamba_small_crowdpose', pretrained=pretrained, **kwargs)


@register_model
def hrvmamba_base_crowdpose(pretrained: bool = False, **kwargs) -> HRVMambaBranches:
    """HRVMamba-B for bottom-up poses, 47.5 M parameters, 69.6 AP on CrowdPose with a DEKR head (drop path 0.6)."""
    return _create_hrvmamba('hrvmamba_base_crowdpose', pretrained=pretrained, **kwargs)


@register_model
def hrvmamba_base_seg(pretrained: bool = False, **kwargs) -> HRVMambaPyramid:
    """HRVMamba-B for segmentation, 58.5 M parameters, 51.4 mIoU on ADE20K with UPerNet (drop path 0.15)."""
    return _create_hrvmamba('hrvmamba_base_seg', pretrained=pretrained, **kwargs)
