"""Vim (Vision Mamba)

Paper: `Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model`
    - https://arxiv.org/abs/2401.09417
Reference: https://github.com/hustvl/Vim (Apache-2.0). The weights carry the licence tag apache-2.0, but the text of
their model cards says "Non-commercial license".

An isotropic model: patches, a class token in the middle of the sequence, an absolute position embedding, and identical
blocks x + mixer(norm(x)). The mixer is a Mamba-1 block that runs over the tokens in row-major order and in reverse,
with one convolution, one set of projections and one A and D a direction.

Written from the paper and the published checkpoints' layout; parameter names are theirs. What differs:
* both directions are one call of the shared scan, which needs neither a patched mamba_ssm nor causal_conv1d and runs on
  any device;
* the position embedding follows the class token when it is resized, and the rotary embedding leaves the class token out
  wherever it stands (the reference takes both for a token in front);
* feature maps never contain the class token;
* A, D and the step biases have no weight decay.
"""

import logging
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    calculate_drop_path_rates,
    get_device_dtype,
    lecun_normal_,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from vmzoo_kernels import get_routes, route_scan

from ..layers.linear import Linear
from ..layers.norm import LayerNorm, RMSNorm
from ..layers.patch import check_images
from ..layers.rope import apply_rope, rope_tables
from ..layers.ssm_init import auto_dt_rank, compute_dtype, init_A_log_, init_dt_bias_, init_dt_weight_
from ..layers.tokens import ClassToken, class_token_index, drop_token, insert_token, resize_pos_embed
from ._builder import build_model

__all__ = ['VisionMamba', 'VisionMambaPyramid']

_logger = logging.getLogger(__name__)


_NORMS = {'rmsnorm': RMSNorm, 'layernorm': LayerNorm}


class StridedPatchEmbed(nn.Module):
    """Image to tokens by one convolution without padding; patches overlap where the stride is below their size.

    Args:
        img_size: Image size expected; sets `grid_size`.
        patch_size: Side of a patch.
        stride: Step between patches.
        in_chans: Image channels.
        embed_dim: Token channels.
        strict_img_size: Refuse images of another size.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int = 16,
        in_chans: int = 3,
        embed_dim: int = 192,
        strict_img_size: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.patch_size = to_2tuple(patch_size)
        self.stride = to_2tuple(stride)
        self.strict_img_size = strict_img_size
        self.set_input_size(img_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.stride, device=device, dtype=dtype)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Set the image size expected."""
        img_size = to_2tuple(img_size)
        self.grid_size = self.dynamic_feat_size(img_size)
        self.img_size = img_size
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels between neighbouring tokens."""
        return max(self.stride) if as_scalar else self.stride

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches in an image of `img_size`."""
        if any(size < patch for size, patch in zip(img_size, self.patch_size)):
            raise ValueError(
                f'An image of {img_size[0]}x{img_size[1]} holds no patch of {self.patch_size[0]}x{self.patch_size[1]}; '
                'resize or pad it.'
            )
        rows, cols = ((s - p) // step + 1 for s, p, step in zip(img_size, self.patch_size, self.stride))
        return rows, cols

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """[B, in_chans, H, W] -> tokens [B, M, D] in row-major order, and the grid they form."""
        check_images(x, self.proj.in_channels)
        img_size = tuple(x.shape[-2:])
        if self.strict_img_size and img_size != self.img_size:
            raise ValueError(
                f'The model is built for images of {self.img_size[0]}x{self.img_size[1]}, got '
                f'{img_size[0]}x{img_size[1]}. Resize the images, call set_input_size(), or create the model with '
                'img_size=... or dynamic_img_size=True.'
            )
        grid = self.dynamic_feat_size(img_size)
        return self.proj(x).flatten(2).transpose(1, 2), grid


class BidirectionalMamba(nn.Module):
    """Mamba-1 token mixer over a sequence and, with its own parameters, over its reverse.

    in_proj -> per direction: causal depthwise conv, SiLU, scan -> sum -> gate -> out_proj. Inner width d is
    `int(expand * dim)`; parameter names and shapes are those of the published checkpoints.

    Args:
        dim: Token channels D.
        d_state: State size N of each inner channel.
        d_conv: Kernel of the causal convolution.
        expand: Inner width over `dim`.
        dt_rank: Rank R of the step projection; 'auto' is ceil(dim / 16).
        bidirectional: Scan the reversed sequence too.
        average: Halve the sum of the two directions.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2.0,
        dt_rank: int | str = 'auto',
        bidirectional: bool = True,
        average: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        d_inner = int(expand * dim)
        if min(d_inner, d_state) < 1:
            raise ValueError(f'A scan needs inner channels and states, got expand={expand} and d_state={d_state}.')
        self.dt_rank = auto_dt_rank(dim, dt_rank)
        self.routes = 'forward_backward' if bidirectional else 'forward'
        self.bidirectional = bidirectional
        self.scale = 0.5 if bidirectional and average else 1.0

        self.A_log = nn.Parameter(torch.empty(d_inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(d_inner, **dd))
        if bidirectional:
            self.A_b_log = nn.Parameter(torch.empty(d_inner, d_state, **dd))
            self.D_b = nn.Parameter(torch.empty(d_inner, **dd))
        self.in_proj = Linear(dim, 2 * d_inner, bias=False, **dd)
        for suffix in ('', '_b') if bidirectional else ('',):
            setattr(self, f'conv1d{suffix}', nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, **dd))
            setattr(self, f'x_proj{suffix}', Linear(d_inner, self.dt_rank + 2 * d_state, bias=False, **dd))
            setattr(self, f'dt_proj{suffix}', Linear(self.dt_rank, d_inner, **dd))
        self.out_proj = Linear(d_inner, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as published; the backward direction's step projection is an ordinary Linear with zero bias."""
        for module in self.children():
            module.reset_parameters()
        init_dt_weight_(self.dt_proj.weight)
        init_dt_bias_(self.dt_proj.bias)
        init_A_log_(self.A_log)
        nn.init.ones_(self.D)
        if self.bidirectional:
            nn.init.zeros_(self.dt_proj_b.bias)
            init_A_log_(self.A_b_log)
            nn.init.ones_(self.D_b)

    def _causal_conv(self, x: Tensor, conv: nn.Conv1d, reverse: bool = False) -> Tensor:
        """Depthwise convolution that sees a token and those before it (after it, if `reverse`): [B, L, d] -> same."""
        weight, length, pad = conv.weight.unsqueeze(2), x.shape[1], conv.kernel_size[0] - 1
        # as a map of one row, [B, L, d] is a channels-last image: the 2D convolution needs no copy
        x = x.transpose(1, 2).unsqueeze(2)  # [B, d, 1, L]
        x = F.conv2d(x, weight.flip(-1) if reverse else weight, conv.bias, padding=(0, pad), groups=conv.groups)
        return x.squeeze(2).transpose(1, 2).narrow(1, pad if reverse else 0, length)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, L, D] -> [B, L, D]."""
        length = x.shape[1]
        x, z = self.in_proj(x).chunk(2, dim=-1)  # [B, L, d] each
        xs = [self._causal_conv(x, self.conv1d)]
        x_projs, dt_projs, A_logs, Ds = [self.x_proj], [self.dt_proj], [self.A_log], [self.D]
        if self.bidirectional:
            xs.append(self._causal_conv(x, self.conv1d_b, reverse=True))
            x_projs.append(self.x_proj_b)
            dt_projs.append(self.dt_proj_b)
            A_logs.append(self.A_b_log)
            Ds.append(self.D_b)
        x = F.silu(torch.stack(xs, dim=2))  # [B, L, K, d]
        x_dbl = torch.stack([proj(x[:, :, k]) for k, proj in enumerate(x_projs)], dim=2)  # [B, L, K, R + 2N]
        A_log = torch.stack(A_logs)
        y = route_scan(
            x,
            x_dbl,
            -torch.exp(A_log.to(compute_dtype(A_log.dtype))),
            torch.stack(Ds),
            torch.stack([proj.weight for proj in dt_projs]),
            torch.stack([proj.bias for proj in dt_projs]),
            get_routes(self.routes, 1, length, device=x.device),
        )
        # both directions have the same gate at a token, so it is applied to their sum
        return self.out_proj(y * (F.silu(z) * self.scale))


class VimBlock(nn.Module):
    """Pre-norm residual block around a :class:`BidirectionalMamba` (extra arguments are its own)."""

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        norm_layer: type[nn.Module] = RMSNorm,
        device=None,
        dtype=None,
        **mixer_args: Any,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.mixer = BidirectionalMamba(dim, **mixer_args, **dd)
        self.norm = norm_layer(dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Stream [B, L, D] -> the stream after the block, and the mixer's output alone."""
        mixed = self.mixer(self.norm(x))
        return x + self.drop_path(mixed), mixed


class VisionMamba(nn.Module):
    """Vision Mamba.

    Args:
        img_size: Image size; the position embedding has one row a patch of it.
        patch_size: Side of a patch.
        stride: Step between patches; None is `patch_size`.
        in_chans: Image channels.
        num_classes: Classifier outputs; 0 for none.
        global_pool: 'token' classifies the class token, 'avg' the mean of the patches, '' returns all tokens.
        embed_dim: Token channels D.
        depth: Number of blocks.
        d_state: State size of each inner channel.
        d_conv: Kernel of the causal convolution.
        expand: Inner width of a block over `embed_dim`.
        dt_rank: Rank of the step projection; 'auto' is ceil(embed_dim / 16).
        class_token: Where the class token stands in the sequence: 'middle', 'front', or 'none' for no class token.
        bidirectional: Scan the tokens in both directions.
        average_directions: Halve the sum of the two directions.
        rope: Turn the patch tokens by a 2D rotary embedding before every block, beside the position embedding.
        rope_grid_size: Side of the grid that the rotary embedding was pretrained on; other grids are scaled to it.
        norm_layer: 'rmsnorm' or 'layernorm'.
        dynamic_img_size: Take images of any size: the position embedding is resized in every forward pass.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the position embedding.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0 at the first.

    Raises:
        ValueError: Unknown `class_token`, `norm_layer` or `global_pool`, 'token' pooling without a class token, a
            classifier without pooling, or an image smaller than a patch.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal['token', 'avg', ''] = 'token',
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2.0,
        dt_rank: int | str = 'auto',
        class_token: ClassToken = 'middle',
        bidirectional: bool = True,
        average_directions: bool = True,
        rope: bool = False,
        rope_grid_size: int = 14,
        norm_layer: Literal['rmsnorm', 'layernorm'] = 'rmsnorm',
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if norm_layer not in _NORMS:
            raise ValueError(f'norm_layer must be one of {sorted(_NORMS)}, got {norm_layer!r}.')
        norm_cls = _NORMS[norm_layer]
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.depth = depth
        self.class_token = class_token
        self.num_prefix_tokens = int(class_token != 'none')
        self.rope = rope
        self.rope_grid_size = rope_grid_size
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False
        self._set_global_pool(global_pool, num_classes)

        patch_embed = StridedPatchEmbed(
            img_size,
            patch_size,
            stride or patch_size,
            in_chans,
            embed_dim,
            strict_img_size=not dynamic_img_size,
            **dd,
        )
        class_token_index(class_token, patch_embed.num_patches)  # refuses an unknown place
        num_tokens = patch_embed.num_patches + self.num_prefix_tokens
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if self.num_prefix_tokens else None
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, embed_dim, **dd))
        self.patch_embed = patch_embed
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._build_head(num_classes, **dd)

        self.layers = nn.ModuleList(
            VimBlock(
                embed_dim,
                drop_path=rate,
                norm_layer=norm_cls,
                d_state=d_state,
                d_conv=d_conv,
                expand=expand,
                dt_rank=dt_rank,
                bidirectional=bidirectional,
                average=average_directions,
                **dd,
            )
            for rate in calculate_drop_path_rates(drop_path_rate, depth)
        )
        self.norm_f = norm_cls(embed_dim, float32=True, **dd)
        self.feature_info = [
            {'module': f'layers.{i}', 'num_chs': embed_dim, 'reduction': patch_embed.feat_ratio()} for i in range(depth)
        ]
        self.init_weights(needs_reset=False)

    def _build_head(self, num_classes: int, device=None, dtype=None) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        head = nn.Linear(self.embed_dim, num_classes, device=device, dtype=dtype)
        self._init_head(head)
        return head

    @staticmethod
    def _init_head(head: nn.Linear) -> None:
        trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)

    def _set_global_pool(self, global_pool: str, num_classes: int) -> None:
        if global_pool not in ('', 'avg', 'token'):
            raise ValueError(f"global_pool must be 'token', 'avg' or '', got {global_pool!r}.")
        if global_pool == 'token' and self.class_token == 'none':
            raise ValueError("global_pool='token' needs a class token; use 'avg' with class_token='none'.")
        if num_classes and not global_pool:
            raise ValueError(
                "A classifier needs pooled features: choose global_pool 'token' or 'avg', or num_classes=0."
            )
        self.global_pool = global_pool

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as published.

        Args:
            needs_reset: Also reset what the modules initialised when they were made (needed after `to_empty()`).
        """
        trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        if isinstance(self.head, nn.Linear):
            self._init_head(self.head)
        for block in self.layers:
            if needs_reset:
                block.mixer.reset_parameters()
                block.norm.reset_parameters()
            nn.init.kaiming_uniform_(block.mixer.out_proj.weight, a=5**0.5)
            with torch.no_grad():
                block.mixer.out_proj.weight.div_(self.depth**0.5)
        if needs_reset and hasattr(self.norm_f, 'reset_parameters'):
            self.norm_f.reset_parameters()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that take no weight decay: embeddings, and what a scan is sensitive to."""
        endings = ('pos_embed', 'cls_token', '.A_log', '.A_b_log', '.D', '.D_b', '.dt_proj.bias', '.dt_proj_b.bias')
        return {name for name, _ in self.named_parameters() if name.endswith(endings)}

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

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int], tuple[Tensor, Tensor] | None]:
        """Image -> stream [B, L, D] in at least float32, grid of the patches, rotary tables [L, D] if there are any."""
        x, grid = self.patch_embed(x)
        index = class_token_index(self.class_token, x.shape[1])
        if index is not None:
            x = insert_token(x, self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), index)
        pos_embed = self.pos_embed
        if self.dynamic_img_size:
            pos_embed = resize_pos_embed(pos_embed, self.patch_embed.grid_size, grid, self.class_token)
        x = self.pos_drop(x + pos_embed)
        x = x.to(compute_dtype(x.dtype))
        if not self.rope:
            return x, grid, None
        cos, sin = rope_tables(grid, self.embed_dim, self.rope_grid_size, device=x.device, dtype=x.dtype)
        if index is not None:
            still = torch.ones_like(cos[:1])
            cos = torch.cat((cos[:index], still, cos[index:]))
            sin = torch.cat((sin[:index], 0 * still, sin[index:]))
        return apply_rope(x, cos, sin), grid, (cos, sin)

    def _apply_block(self, i: int, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Stream -> the stream as the next block takes it, and the output of block i's mixer."""
        block = self.layers[i]
        x, mixed = checkpoint(block, x) if self.grad_checkpointing else block(x)
        # by the depth as built, so that pruning changes no feature
        if rope is not None and i < self.depth - 1:
            x = apply_rope(x, *rope)
        return x, mixed

    def _feature(self, x: Tensor, mixed: Tensor) -> Tensor:
        """What a block contributes to the intermediate features, of what `_apply_block` returns."""
        return x

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
            return_prefix_tokens: Give each intermediate as a pair with the class token [B, 1, D] of its block.
            norm: Apply the final norm to the intermediates.
            stop_early: Leave out the blocks after the last one taken.
            output_fmt: 'NCHW' maps or 'NLC' tokens, both without the class token.
            intermediates_only: Return the intermediates alone.

        Returns:
            Final tokens as `forward_features` gives them, and the intermediates; or the intermediates alone.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}.")
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        dtype = self.patch_embed.proj.weight.dtype
        x, grid, rope = self._embed(x)
        index = class_token_index(self.class_token, grid[0] * grid[1])
        intermediates = []
        for i in range(max_index + 1 if stop_early else len(self.layers)):
            x, mixed = self._apply_block(i, x, rope)
            if i not in take_indices:
                continue
            tokens = self._feature(x, mixed)
            tokens = (self.norm_f(tokens) if norm else tokens).to(dtype)
            patches = drop_token(tokens, index)
            if output_fmt == 'NCHW':
                patches = patches.unflatten(1, grid).permute(0, 3, 1, 2).contiguous()
            with_token = return_prefix_tokens and index is not None
            intermediates.append((patches, tokens[:, index : index + 1]) if with_token else patches)
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
        """Image [B, in_chans, H, W] -> normed tokens [B, L, D], class token included."""
        x, _, rope = self._embed(x)
        for i in range(len(self.layers)):
            x, _ = self._apply_block(i, x, rope)
        return self.norm_f(x)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens [B, L, D] -> [B, D] by `pool_type`, or by the model's own pooling."""
        pool_type = self.global_pool if pool_type is None else pool_type
        if not pool_type:
            return x
        index = class_token_index(self.class_token, x.shape[1] - self.num_prefix_tokens)
        return x[:, index] if pool_type == 'token' else drop_token(x, index).mean(dim=1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, L, D] -> logits [B, num_classes], or the pooled features if `pre_logits`."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, H, W] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


class VisionMambaPyramid(VisionMamba):
    """Vision Mamba as a dense backbone: four blocks' features as maps of stride 4, 8, 16 and 32 (for 16-pixel patches).

    Args:
        block_indices: Blocks whose features are the levels.
        features: 'stream' takes the residual stream after a block, 'mixer' the output of its mixer alone.
        num_classes: 0; there is no classifier.
        kwargs: Arguments of :class:`VisionMamba`. The final norm is kept for strict loading, not used by `forward`.
    """

    def __init__(
        self,
        block_indices: tuple[int, int, int, int] = (5, 11, 17, 23),
        features: Literal['stream', 'mixer'] = 'stream',
        img_size: int | tuple[int, int] = 512,
        num_classes: int = 0,
        global_pool: Literal['avg', ''] = '',
        class_token: ClassToken = 'none',
        device=None,
        dtype=None,
        **kwargs: Any,
    ):
        dd = {'device': device, 'dtype': dtype}
        if features not in ('stream', 'mixer'):
            raise ValueError(f"features must be 'stream' or 'mixer', got {features!r}.")
        if num_classes:
            raise ValueError(
                'The pyramid has no classifier; use num_classes=0, or one of the models for classification.'
            )
        super().__init__(
            img_size=img_size,
            num_classes=0,
            global_pool=global_pool,
            class_token=class_token,
            **kwargs,
            **dd,
        )
        if len(set(block_indices)) != 4 or not set(block_indices) <= set(range(self.depth)):
            raise ValueError(
                f'block_indices must be four different ones of the {self.depth} blocks, got {block_indices}.'
            )
        self.block_indices = sorted(block_indices)
        self.features = features
        dim, stride = self.embed_dim, self.patch_embed.feat_ratio()
        self.norm_f.requires_grad_(False)  # no level goes through it
        self.fpn1 = nn.Sequential(
            nn.ConvTranspose2d(dim, dim, 2, stride=2, **dd),
            nn.BatchNorm2d(dim, **dd),
            nn.GELU(),
            nn.ConvTranspose2d(dim, dim, 2, stride=2, **dd),
        )
        self.fpn2 = nn.Sequential(nn.ConvTranspose2d(dim, dim, 2, stride=2, **dd))
        self.fpn3 = nn.Identity()
        self.fpn4 = nn.MaxPool2d(2)
        self.feature_info = [
            {'module': f'fpn{level + 1}', 'num_chs': dim, 'reduction': max(stride * 2**level // 4, 1)}
            for level in range(4)
        ]

    def _feature(self, x: Tensor, mixed: Tensor) -> Tensor:
        return mixed if self.features == 'mixer' else x

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise the backbone as published, the pyramid as torch does."""
        super().init_weights(needs_reset)
        if needs_reset:
            for module in (*self.fpn1, *self.fpn2):
                if hasattr(module, 'reset_parameters'):
                    module.reset_parameters()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """There is no classifier: only `num_classes` 0 is possible."""
        if num_classes:
            raise ValueError('The pyramid has no classifier: num_classes must be 0.')
        super().reset_classifier(0, global_pool)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """As :meth:`VisionMamba.forward_intermediates`; `indices` count the levels, and the maps differ in stride."""
        if output_fmt != 'NCHW':
            raise ValueError(f"A pyramid's levels are maps: output_fmt must be 'NCHW', got {output_fmt!r}.")
        if min(self.patch_embed.dynamic_feat_size(x.shape[-2:])) < 2:
            raise ValueError(
                f'An image of {x.shape[-2]}x{x.shape[-1]} is too small: the coarsest level needs 2x2 patches.'
            )
        levels = sorted(feature_take_indices(4, indices)[0])
        final, maps = super().forward_intermediates(
            x,
            [self.block_indices[level] for level in levels],
            norm=norm,
            stop_early=stop_early,
        )
        maps = [getattr(self, f'fpn{level + 1}')(feature) for level, feature in zip(levels, maps)]
        return maps if intermediates_only else (final, maps)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the levels at `indices` don't need; returns them as absolute indices."""
        levels, max_level = feature_take_indices(4, indices)
        super().prune_intermediate_layers([self.block_indices[max_level]], prune_norm, prune_head)
        for level in set(range(4)).difference(levels):
            setattr(self, f'fpn{level + 1}', nn.Identity())
        return levels

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image [B, in_chans, H, W] -> four maps [B, D, h, w], finest first."""
        return self.forward_intermediates(x, stop_early=True, intermediates_only=True)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: VisionMamba) -> dict[str, Tensor]:
    """Fit a published checkpoint, or one of ours, to `model`.

    Stored rotary tables are dropped (they are computed), and the class token leaves, with its row of the position
    embedding, if the model has none. A position embedding with another number of rows than the model's is taken for a
    square grid and resized. A classifier loads into a pyramid, with a warning: without its head, and with the model's
    own pyramid.
    """
    rotary = any(key.startswith('rope.') for key in state_dict)
    state_dict = {key: value for key, value in state_dict.items() if not key.startswith('rope.')}
    if isinstance(model, VisionMambaPyramid) and not any(key.startswith('fpn') for key in state_dict):
        _logger.warning('The checkpoint is a classifier: its head is dropped, the pyramid stays as initialised.')
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith('head.')}
        state_dict |= {key: value for key, value in model.state_dict().items() if key.startswith('fpn')}
    pos_embed = state_dict.get('pos_embed')
    if pos_embed is None or ('cls_token' not in state_dict and model.cls_token is not None):
        return state_dict
    if 'cls_token' in state_dict and model.cls_token is None:
        del state_dict['cls_token']
        # of the published checkpoints, those with rotary tables have the class token in front
        source = 'front' if rotary else 'middle'
        pos_embed = drop_token(pos_embed, class_token_index(source, pos_embed.shape[1] - 1))
    if pos_embed.shape[1] != model.pos_embed.shape[1]:
        num_patches = pos_embed.shape[1] - model.num_prefix_tokens
        side = math.isqrt(num_patches)
        if side * side != num_patches:
            raise ValueError(
                f"The checkpoint's position embedding has {num_patches} patches, which form no square grid, and the "
                f'model has {model.patch_embed.num_patches}. Load it into a model of the img_size it was trained at, '
                'then call set_input_size().'
            )
        pos_embed = resize_pos_embed(pos_embed, (side, side), model.patch_embed.grid_size, model.class_token)
    return {**state_dict, 'pos_embed': pos_embed}


def _cfg(file: str = '', **kwargs: Any) -> dict[str, Any]:
    url = f'https://huggingface.co/hustvl/{file}' if file else ''
    return {
        'url': url,
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'fixed_input_size': True,
        'pool_size': None,
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj',
        'classifier': 'head',
        'paper_name': 'Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model',
        'paper_ids': 'arXiv:2401.09417',
        'origin_url': 'https://github.com/hustvl/Vim',
        'license': 'other' if url else 'apache-2.0',
        'description': (
            'Licence of the weights unclear: their model card is tagged apache-2.0, but its text says non-commercial.'
            if url
            else None
        ),
        **kwargs,
    }


def _seg_cfg(**kwargs: Any) -> dict[str, Any]:
    return _cfg(num_classes=0, input_size=(3, 512, 512), classifier=None, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        'vim_tiny_patch16_224.in1k': _cfg('Vim-tiny-midclstok/resolve/main/vim_t_midclstok_76p1acc.pth'),
        'vim_tiny_patch16_stride8_224.in1k': _cfg('Vim-tiny-midclstok/resolve/main/vim_t_midclstok_ft_78p3acc.pth'),
        'vim_small_patch16_224.in1k': _cfg('Vim-small-midclstok/resolve/main/vim_s_midclstok_80p5acc.pth'),
        'vim_small_patch16_stride8_224.in1k': _cfg('Vim-small-midclstok/resolve/main/vim_s_midclstok_ft_81p6acc.pth'),
        'vim_base_patch16_224.in1k': _cfg('Vim-base-midclstok/resolve/main/vim_b_midclstok_81p9acc.pth'),
        'vim_tiny_patch16_224_rope.in1k': _cfg('Vim-tiny/resolve/main/vim_tiny_73p1.pth'),
        'vim_tiny_patch16_gap_224.untrained': _cfg(),
        'vim_small_patch16_gap_224.untrained': _cfg(),
        'vim_base_patch16_gap_224.untrained': _cfg(),
        'vim_tiny_seg.untrained': _seg_cfg(),
        'vim_small_seg.untrained': _seg_cfg(),
    }
)


def _create_vim(variant: str, pretrained: bool = False, model_cls: type = VisionMamba, **kwargs: Any) -> VisionMamba:
    step = max(kwargs.get('depth', 24) // 4, 1)
    out_indices = (
        (0, 1, 2, 3) if model_cls is VisionMambaPyramid else tuple(range(step - 1, kwargs.get('depth', 24), step))
    )
    return build_model(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={'out_indices': out_indices, 'feature_cls': 'getter'},
        **kwargs,
    )


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti: 7.1M params, 76.1 top-1."""
    model_args = {'embed_dim': 192}
    return _create_vim('vim_tiny_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S: 25.8M params, 80.5 top-1."""
    model_args = {'embed_dim': 384}
    return _create_vim('vim_small_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-B: 97.6M params, 81.9 top-1."""
    model_args = {'embed_dim': 768}
    return _create_vim('vim_base_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti+, overlapping patches, fine-tuned on the longer sequence: 7.3M params, 78.3 top-1."""
    model_args = {'embed_dim': 192, 'stride': 8}
    return _create_vim('vim_tiny_patch16_stride8_224', pretrained, **dict(model_args, **kwargs))


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S+, overlapping patches, fine-tuned on the longer sequence: 26.0M params, 81.6 top-1."""
    model_args = {'embed_dim': 384, 'stride': 8}
    return _create_vim('vim_small_patch16_stride8_224', pretrained, **dict(model_args, **kwargs))


@register_model
def vim_tiny_patch16_224_rope(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti, first release: class token in front, rotary embedding, directions summed. 7.1M params, 73.1 top-1."""
    model_args = {'embed_dim': 192, 'class_token': 'front', 'rope': True, 'average_directions': False}
    return _create_vim('vim_tiny_patch16_224_rope', pretrained, **dict(model_args, **kwargs))


@register_model
def vim_tiny_patch16_gap_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti without class token, averaging the patches: 7.1M params."""
    model_args = {'embed_dim': 192, 'class_token': 'none', 'global_pool': 'avg'}
    return _create_vim('vim_tiny_patch16_gap_224', pretrained, **dict(model_args, **kwargs))


@register_model
def vim_small_patch16_gap_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S without class token, averaging the patches: 25.8M params."""
    model_args = {'embed_dim': 384, 'class_token': 'none', 'global_pool': 'avg'}
    return _create_vim('vim_small_patch16_gap_224', pretrained, **dict(model_args, **kwargs))


@register_model
def vim_base_patch16_gap_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-B without class token, averaging the patches: 97.6M params."""
    model_args = {'embed_dim': 768, 'class_token': 'none', 'global_pool': 'avg'}
    return _create_vim('vim_base_patch16_gap_224', pretrained, **dict(model_args, **kwargs))


@register_model
def vim_tiny_seg(pretrained: bool = False, **kwargs: Any) -> VisionMambaPyramid:
    """Vim-Ti as ADE20K's segmentation backbone: outputs of four mixers as a pyramid."""
    model_args = {'embed_dim': 192, 'features': 'mixer'}
    return _create_vim('vim_tiny_seg', pretrained, VisionMambaPyramid, **dict(model_args, **kwargs))


@register_model
def vim_small_seg(pretrained: bool = False, **kwargs: Any) -> VisionMambaPyramid:
    """Vim-S as ADE20K's segmentation backbone: rotary embedding, directions summed, residual stream as a pyramid."""
    model_args = {'embed_dim': 384, 'rope': True, 'average_directions': False, 'features': 'stream'}
    return _create_vim('vim_small_seg', pretrained, VisionMambaPyramid, **dict(model_args, **kwargs))
