"""What models of one resolution share: patches, extra tokens, a position embedding, equal blocks, a norm, a head.

A family gives the blocks (`block(x, paths)` returns the stream and the output of its last branch), the paths of their
mixers, and where tokens other than patches stand.
"""

import logging
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import calculate_drop_path_rates, get_device_dtype, lecun_normal_, trunc_normal_
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from ..layers.linear import init_truncated_
from ..layers.mamba import Scan, shuffle_paths, token_paths
from ..layers.norm import LayerNorm, RMSNorm
from ..layers.patch import StridedPatchEmbed
from ..layers.shuffle import LayerwiseShuffle
from ..layers.ssm_init import compute_dtype
from ..layers.tokens import ClassToken, class_token_places, column_order, drop_tokens, insert_tokens, resize_pos_embed
from ._builder import build_model, imagenet_cfg

_logger = logging.getLogger(__name__)

NORMS = {'rmsnorm': RMSNorm, 'layernorm': LayerNorm}
_NO_DECAY = re.compile(r'(pos_embed(_cls)?|cls_token)$|\.A\w*_log$|\.D(_\w+)?$|\.dt_proj\w*\.bias$')


def norm_class(name: str) -> type[nn.Module]:
    """The norm of that name; a ValueError that lists them if there is none."""
    if name not in NORMS:
        raise ValueError(f'norm_layer must be one of {sorted(NORMS)}, got {name!r}.')
    return NORMS[name]


class IsotropicMamba(nn.Module):
    """Base of the models of one resolution.

    Args:
        block_layer: Makes a block from `embed_dim`, `drop_path`, `device` and `dtype`.
        norm_layer: Class of the final norm.
        scan: Paths of the blocks' mixers, as :class:`..layers.mamba.MambaMixer` names them.
        img_size: Image size; the position embedding has one row a patch of it.
        patch_size: Side of a patch.
        stride: Step between patches; None is `patch_size`.
        pad_patches: Pad images at the bottom and right to a patch every `stride` pixels.
        patch_bias: Whether the patch embedding has a bias.
        in_chans: Image channels.
        num_classes: Classifier outputs; 0 for none.
        global_pool: 'token' classifies the class token, 'avg' the mean of the patches, '' returns all tokens.
        embed_dim: Token channels D.
        depth: Number of blocks.
        class_token: Where the class token stands in the sequence: 'middle', 'front', or 'none' for no class token.
        dynamic_img_size: Take images of any size: the position embedding is resized in every forward pass.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the position embedding.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0 at the first.
        shuffle_rate: Chance that the last block sees its tokens in random order while training, growing linearly from 0
            at the first; see :class:`..layers.shuffle.LayerwiseShuffle`.

    Raises:
        ValueError: Unknown `class_token` or `global_pool`, 'token' pooling without a class token, a classifier without
            pooling, or an image smaller than a patch.
    """

    global_pools: tuple[str, ...] = ('token', 'avg', '')
    _init_head = staticmethod(init_truncated_)

    def __init__(
        self,
        block_layer: Callable[..., nn.Module],
        norm_layer: type[nn.Module],
        scan: Scan = 'forward_backward',
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        pad_patches: bool = False,
        patch_bias: bool = True,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal['token', 'avg', ''] = 'token',
        embed_dim: int = 192,
        depth: int = 24,
        class_token: ClassToken = 'middle',
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        shuffle_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.embed_dim = embed_dim
        self.depth = depth
        self.scan = scan
        self.class_token = class_token
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False

        patch_embed = StridedPatchEmbed(
            img_size,
            patch_size,
            stride or patch_size,
            in_chans,
            embed_dim,
            strict_img_size=not dynamic_img_size,
            pad=pad_patches,
            bias=patch_bias,
            **dd,
        )
        num_patches = patch_embed.num_patches
        num_class_tokens = len(class_token_places(class_token, num_patches))  # refuses an unknown place
        self.num_prefix_tokens = len(self.token_places(num_patches))
        self._set_global_pool(global_pool, num_classes)
        has_tokens = self.num_prefix_tokens > 0
        self.cls_token = nn.Parameter(torch.empty(1, self.num_prefix_tokens, embed_dim, **dd)) if has_tokens else None
        self.pos_embed = nn.Parameter(torch.empty(1, num_patches + num_class_tokens, embed_dim, **dd))
        self.patch_embed = patch_embed
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._build_head(num_classes, **dd)
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        self.shuffle = LayerwiseShuffle(shuffle_rate, depth)
        self.layers = nn.ModuleList(block_layer(embed_dim, drop_path=rate, **dd) for rate in rates)
        self.norm_f = norm_layer(embed_dim, float32=True, **dd)
        self.feature_info = [
            {'module': f'layers.{i}', 'num_chs': embed_dim, 'reduction': patch_embed.feat_ratio()} for i in range(depth)
        ]

    @property
    def head_hidden_size(self) -> int:
        """Width of what the classifier takes."""
        return self.embed_dim

    def token_places(self, num_patches: int) -> tuple[int, ...]:
        """Indices of the tokens other than patches in a sequence with `num_patches` patches."""
        return class_token_places(self.class_token, num_patches)

    def _build_head(self, num_classes: int, device=None, dtype=None) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        head = nn.Linear(self.head_hidden_size, num_classes, device=device, dtype=dtype)
        self._init_head(head)
        return head

    def _set_global_pool(self, global_pool: str, num_classes: int) -> None:
        if global_pool not in self.global_pools:
            raise ValueError(f'global_pool must be one of {self.global_pools}, got {global_pool!r}.')
        if global_pool == 'token' and not self.num_prefix_tokens:
            raise ValueError("global_pool='token' needs a class token; use 'avg' with class_token='none'.")
        if num_classes and not global_pool:
            raise ValueError("A classifier needs pooled features: choose a global_pool other than '' or num_classes=0.")
        self.global_pool = global_pool

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as published.

        Args:
            needs_reset: Also reset what the modules initialised when they were made (needed after `to_empty()`).
        """
        if needs_reset:
            for module in reversed(list(self.modules())):  # a mixer after its layers, which it initialises differently
                if hasattr(module, 'reset_parameters'):
                    module.reset_parameters()
        trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        lecun_normal_(self.patch_embed.proj.weight)
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)
        classifier = self.get_classifier()
        if isinstance(classifier, nn.Linear):
            self._init_head(classifier)
        for block in self.layers:
            self._init_block(block)

    def _init_block(self, block: nn.Module) -> None:
        nn.init.kaiming_uniform_(block.mixer.out_proj.weight, a=5**0.5)
        with torch.no_grad():
            block.mixer.out_proj.weight.div_(self.depth**0.5)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that take no weight decay: embeddings, and what a scan is sensitive to."""
        return {name for name, _ in self.named_parameters() if _NO_DECAY.search(name)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort the parameters into layers, for layer-wise learning rates."""
        return {
            'stem': r'^cls_token|pos_embed|patch_embed',
            'blocks': [(r'^layers\.(\d+)', None), (r'^norm_f', (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; `global_pool` None keeps the pooling."""
        self._set_global_pool(self.global_pool if global_pool is None else global_pool, num_classes)
        self.head = self._build_head(num_classes, **get_device_dtype(self))
        self.num_classes = num_classes
        self.head.train(self.training)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Change the image size that the model expects; the position embedding is resized."""
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size)
        if self.patch_embed.grid_size != old_grid:
            resized = resize_pos_embed(self.pos_embed.detach(), old_grid, self.patch_embed.grid_size, self.class_token)
            self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
        update_model_input_size(self, self.patch_embed.img_size)

    def _pos_embed_for(self, grid: tuple[int, int]) -> Tensor:
        if not self.dynamic_img_size:
            return self.pos_embed
        return resize_pos_embed(self.pos_embed, self.patch_embed.grid_size, grid, self.class_token)

    def _add_tokens(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches [B, M, D] -> all tokens [B, L, D] with their position embedding."""
        places = self.token_places(x.shape[1])
        if places:
            x = insert_tokens(x, self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), places)
        return x + self._pos_embed_for(grid)

    def _stem(self, x: Tensor) -> tuple[Tensor, tuple[int, int], Any]:
        """Image -> stream [B, L, D] in at least float32, grid of the patches, and what blocks need beside them."""
        x, grid = self.patch_embed(x)
        x = self.pos_drop(self._add_tokens(x, grid))
        x = x.to(compute_dtype(x.dtype))
        columns = None
        if self.scan == 'cross':
            columns = column_order(grid, self.token_places(grid[0] * grid[1]), device=x.device)
        return x, grid, token_paths(self.scan, x.shape[1], x.device, columns)

    def _block_inputs(self, i: int, x: Tensor, context: Any) -> tuple[Any, ...]:
        """What block i is called with: the stream and the paths of its mixer."""
        order = self.shuffle(i, x.shape[1], x.device)
        return x, context if order is None else shuffle_paths(context, order)

    def _apply_block(self, i: int, x: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        """Stream -> the stream as the next block takes it, and the output of block i's last branch."""
        block = self.layers[i]
        inputs = self._block_inputs(i, x, context)  # drawn once: recomputing a block repeats its order
        return checkpoint(block, *inputs) if self.grad_checkpointing else block(*inputs)

    def _feature(self, i: int, x: Tensor, branch: Tensor, norm: bool) -> Tensor:
        """Block i's intermediate feature, of what `_apply_block` returns."""
        return self.norm_f(x) if norm else x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features after chosen blocks.

        Args:
            x: Image [B, in_chans, H, W].
            indices: Blocks to take: the last n if an int, all if None.
            return_prefix_tokens: Give each intermediate as a pair with the other tokens [B, n, D] of its block, if
                there are any.
            norm: Apply the final norm to the intermediates.
            stop_early: Leave out the blocks after the last one taken.
            output_fmt: 'NCHW' maps or 'NLC' tokens, of the patches alone.
            intermediates_only: Return the intermediates alone.

        Returns:
            Final tokens as `forward_features` gives them, and the intermediates; or the intermediates alone.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}.")
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        dtype = self.patch_embed.proj.weight.dtype
        x, grid, context = self._stem(x)
        places = self.token_places(grid[0] * grid[1])
        intermediates = []
        for i in range(max_index + 1 if stop_early else len(self.layers)):
            x, branch = self._apply_block(i, x, context)
            if i not in take_indices:
                continue
            tokens = self._feature(i, x, branch, norm).to(dtype)
            patches = drop_tokens(tokens, places)
            if output_fmt == 'NCHW':
                patches = patches.unflatten(1, grid).permute(0, 3, 1, 2).contiguous()
            with_tokens = return_prefix_tokens and places
            intermediates.append((patches, tokens[:, list(places)]) if with_tokens else patches)
        if intermediates_only:
            return intermediates
        return self.norm_f(x), intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the intermediates at `indices` don't need; returns them as absolute indices."""
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: max_index + 1]
        if prune_norm:
            self.norm_f = nn.Identity()
        if prune_head:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, H, W] -> normed tokens [B, L, D], patches and others."""
        x, _, context = self._stem(x)
        for i in range(len(self.layers)):
            x, _ = self._apply_block(i, x, context)
        return self.norm_f(x)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens [B, L, D] -> [B, D] by `pool_type`, or by the model's own pooling."""
        pool_type = self.global_pool if pool_type is None else pool_type
        if not pool_type:
            return x
        places = self.token_places(x.shape[1] - self.num_prefix_tokens)
        return x[:, places[0]] if pool_type == 'token' else drop_tokens(x, places).mean(dim=1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, L, D] -> logits [B, num_classes], or the pooled features if `pre_logits`."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, H, W] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


def scaling_levels(
    dim: int, norm_layer: Callable[[int], nn.Module], device=None, dtype=None
) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    """Modules that bring maps [B, D, h, w] to 4, 2, 1 and 1/2 times their size."""

    def double() -> nn.ConvTranspose2d:
        return nn.ConvTranspose2d(dim, dim, 2, stride=2, device=device, dtype=dtype)

    four_times = nn.Sequential(double(), norm_layer(dim), nn.GELU(), double())
    return four_times, nn.Sequential(double()), nn.Identity(), nn.MaxPool2d(2)


def fit_pos_embed(pos_embed: Tensor, model: IsotropicMamba, class_token: ClassToken | None = None) -> Tensor:
    """A checkpoint's position embedding for a model's grid: another number of rows is that of a square grid.

    Args:
        pos_embed: [1, M, D], or [1, M + 1, D] with a class token's row.
        model: Whose grid it is to fit.
        class_token: Where the checkpoint's class token stands; None for where the model's does.

    Raises:
        ValueError: The rows form no square grid.
    """
    class_token = model.class_token if class_token is None else class_token
    num_patches = pos_embed.shape[1] - len(class_token_places(class_token, 1))
    if num_patches == model.patch_embed.num_patches:
        return pos_embed
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(
            f"The checkpoint's position embedding has {num_patches} patches, which form no square grid, and the "
            f'model has {model.patch_embed.num_patches}. Load it into a model of the img_size it was trained at, '
            'then call set_input_size().'
        )
    return resize_pos_embed(pos_embed, (side, side), model.patch_embed.grid_size, class_token)


class Pyramid:
    """Turns an isotropic model, the class after it, into a dense backbone: maps of chosen blocks, and no classifier.

    A model gives the block of each level to `_set_levels`, and has modules `fpn1` to `fpn4` that make the level of its
    map; one with other modules overrides `_make_level` and `_drop_level`. `min_grid` is the fewest rows and columns of
    patches that every level can be made of.
    """

    min_grid = 1

    def _set_levels(self, block_indices: Sequence[int], scales: Sequence[float] = (4, 2, 1, 0.5)) -> None:
        if len(block_indices) != 4 or not set(block_indices) <= set(range(self.depth)):
            raise ValueError(f'block_indices must be four of the {self.depth} blocks, got {block_indices}.')
        self.block_indices = sorted(block_indices)
        stride = self.patch_embed.feat_ratio()
        self.feature_info = [
            {'module': f'fpn{level}', 'num_chs': self.embed_dim, 'reduction': max(int(stride / scale), 1)}
            for level, scale in enumerate(scales, start=1)
        ]
        if not any(map(self._is_normed, self.block_indices)):
            self.norm_f.requires_grad_(False)  # kept for strict loading

    def _is_normed(self, i: int) -> bool:
        """Whether the map of block i is the stream after the final norm."""
        return False

    def _feature(self, i: int, x: Tensor, branch: Tensor, norm: bool) -> Tensor:
        return super()._feature(i, x, branch, norm or self._is_normed(i))

    def _make_level(self, level: int, x: Tensor) -> Tensor:
        """Map [B, D, h, w] of a level's block -> the level."""
        return getattr(self, f'fpn{level + 1}')(x)

    def _drop_level(self, level: int) -> None:
        setattr(self, f'fpn{level + 1}', nn.Identity())

    def _set_global_pool(self, global_pool: str, num_classes: int) -> None:
        if num_classes:
            raise ValueError(
                'The pyramid has no classifier; use num_classes=0, or one of the models for classification.'
            )
        super()._set_global_pool(global_pool, num_classes)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """As :meth:`IsotropicMamba.forward_intermediates`; `indices` count the levels, whose maps differ in size."""
        if output_fmt != 'NCHW':
            raise ValueError(f"A pyramid's levels are maps: output_fmt must be 'NCHW', got {output_fmt!r}.")
        if min(self.patch_embed.dynamic_feat_size(x.shape[-2:])) < self.min_grid:
            raise ValueError(
                f'An image of {x.shape[-2]}x{x.shape[-1]} is too small: the coarsest level needs '
                f'{self.min_grid}x{self.min_grid} patches.'
            )
        levels = sorted(feature_take_indices(len(self.block_indices), indices)[0])
        blocks = sorted({self.block_indices[level] for level in levels})
        final, maps = super().forward_intermediates(x, blocks, norm=norm, stop_early=stop_early)
        maps = [self._make_level(level, maps[blocks.index(self.block_indices[level])]) for level in levels]
        return maps if intermediates_only else (final, maps)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the levels at `indices` don't need; returns them as absolute indices."""
        levels, _ = feature_take_indices(len(self.block_indices), indices)
        blocks = sorted({self.block_indices[level] for level in levels})
        prune_norm = prune_norm and not any(map(self._is_normed, blocks))
        super().prune_intermediate_layers(blocks, prune_norm, prune_head)
        for level in set(range(len(self.block_indices))).difference(levels):
            self._drop_level(level)
        return levels

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image [B, in_chans, H, W] -> a map [B, D, h, w] a level, finest first."""
        return self.forward_intermediates(x, stop_early=True, intermediates_only=True)


def fit_pyramid(state_dict: dict[str, Tensor], model: IsotropicMamba) -> dict[str, Tensor]:
    """A checkpoint for a pyramid: without a head, and, if it is a classifier's, with the model's own `fpn` modules."""
    own = {key: value for key, value in model.state_dict().items() if key.startswith('fpn')}
    if own and not any(key.startswith('fpn') for key in state_dict):
        _logger.warning('The checkpoint is a classifier: its head is dropped, the pyramid stays as initialised.')
        state_dict = state_dict | own
    return {key: value for key, value in state_dict.items() if not key.startswith('head.')}


isotropic_cfg = partial(imagenet_cfg, pool_size=None, first_conv='patch_embed.proj', classifier='head')


def build_isotropic(model_cls: type[IsotropicMamba], variant: str, pretrained: bool, **kwargs: Any) -> IsotropicMamba:
    """:func:`._builder.build_model` with the features of four blocks at equal distances, or of a pyramid's levels."""
    depth = kwargs.get('depth', 24)
    step = max(depth // 4, 1)
    out_indices = (0, 1, 2, 3) if issubclass(model_cls, Pyramid) else tuple(range(step - 1, depth, step))
    feature_cfg = {'out_indices': out_indices, 'feature_cls': 'getter'}
    return build_model(model_cls, variant, pretrained, feature_cfg=feature_cfg, **kwargs)
