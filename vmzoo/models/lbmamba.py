"""LBVim (a Vim of locally bidirectional Mamba blocks)

Paper: `LBMamba: Locally Bi-directional Mamba`
    - https://arxiv.org/abs/2506.15976
Reference: https://github.com/cvlab-stonybrook/LBMamba (no licence found).

An isotropic model like Vim without a class token, whose mixers scan once, where Vim's scan in both directions. Within
the scan every segment of a few tokens is also scanned backwards, with the same parameters; and every second block runs
over the tokens in reverse, so that two blocks see all of them. The widths 300 and 528 are those that take as long as
Vim's 192 and 384.

Written from the paper and the published checkpoints' layout; parameter names are theirs. What differs:
* the tokens stay in place, and the scan and the convolution of every second block run backwards (the reference reverses
  the tokens after every block, so that those of a model with an odd depth come out in reverse);
* the length of a segment is an argument, `segment`; 'auto' follows the number of tokens as the published kernel does:
  4 in images of up to 176x176, 8 up to 256x256 (so at 224x224), 16 in larger ones;
* A, D and the step biases have no weight decay (of the reference's A, which is meant to have none, the optimizer has).
"""

import logging
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers.linear import Linear
from ..layers.mamba import TokenPaths, VimBlock, token_paths
from ..layers.norm import LayerNorm
from ._isotropic import IsotropicMamba, Pyramid, build_isotropic, fit_pos_embed, isotropic_cfg, norm_class

__all__ = ['LBVim', 'LBVimBackbone']

_logger = logging.getLogger(__name__)


class LatentPool(nn.Module):
    """Pools tokens by the attention of one learned query: no query or output projection, a LayerNorm at the end.

    Args:
        dim: Token channels D.
        num_heads: Heads of the attention.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`.
    """

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if dim % num_heads:
            raise ValueError(f'The width {dim} must be a multiple of the number of heads {num_heads}.')
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.kv = Linear(dim, 2 * dim, **dd)
        self.post_norm = LayerNorm(dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the query; sub-modules have their own method."""
        trunc_normal_(self.latent, std=self.latent.shape[-1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, L, D] -> [B, D]."""
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, L, D / heads]
        q = self.latent.to(k.dtype).unflatten(-1, (self.num_heads, -1)).transpose(1, 2).expand(len(x), -1, -1, -1)
        return self.post_norm(F.scaled_dot_product_attention(q, k, v).flatten(1))


class LBVim(IsotropicMamba):
    """Vim without class token, of locally bidirectional mixers whose direction alternates from block to block.

    Args:
        d_state: State size of each inner channel.
        d_conv: Kernel of the causal convolution.
        expand: Inner width of a block over `embed_dim`.
        dt_rank: Rank of the step projection; 'auto' is ceil(embed_dim / 16).
        segment: Tokens of the segments that are scanned in both directions, 'auto' for the published choice by the
            number of tokens, or None for scans in one direction.
        norm_layer: 'rmsnorm' or 'layernorm'.
        global_pool: 'avg' classifies the mean of the tokens, 'attn' their attention by a learned query, '' returns all
            tokens.
        pool_heads: Heads of that attention.
        kwargs: Arguments of :class:`._isotropic.IsotropicMamba`.

    Raises:
        ValueError: Unknown `norm_layer`, an `embed_dim` that `pool_heads` does not divide, and what
            :class:`._isotropic.IsotropicMamba` refuses.
    """

    global_pools = ('avg', 'attn', '')

    def __init__(
        self,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2.0,
        dt_rank: int | str = 'auto',
        segment: int | Literal['auto'] | None = 'auto',
        norm_layer: Literal['rmsnorm', 'layernorm'] = 'rmsnorm',
        global_pool: Literal['avg', 'attn', ''] = 'avg',
        pool_heads: int = 6,
        **kwargs: Any,
    ):
        norm_cls = norm_class(norm_layer)
        mixer_args = {'d_state': d_state, 'd_conv': d_conv, 'expand': expand, 'dt_rank': dt_rank, 'segment': segment}
        block_layer = partial(VimBlock, norm_layer=norm_cls, scan='forward', **mixer_args)
        self.pool_heads = pool_heads  # the base makes the head
        super().__init__(block_layer, norm_cls, 'forward', global_pool=global_pool, class_token='none', **kwargs)
        self.init_weights(needs_reset=False)

    def _build_head(self, num_classes: int, device=None, dtype=None) -> nn.Module:
        classifier = super()._build_head(num_classes, device=device, dtype=dtype)
        if self.global_pool != 'attn':
            return classifier
        head = getattr(self, 'head', None)
        is_pooling = isinstance(head, nn.Sequential)
        pool = head[0] if is_pooling else LatentPool(self.embed_dim, self.pool_heads, device=device, dtype=dtype)
        return nn.Sequential(pool, classifier)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head[1] if isinstance(self.head, nn.Sequential) else self.head

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens [B, L, D] -> [B, D] by `pool_type`, or by the model's own pooling."""
        pool_type = self.global_pool if pool_type is None else pool_type
        return self.head[0](x) if pool_type == 'attn' else super().pool(x, pool_type)

    def _stem(self, x: Tensor) -> tuple[Tensor, tuple[int, int], tuple[TokenPaths, TokenPaths]]:
        x, grid, forward = super()._stem(x)
        return x, grid, (forward, token_paths('backward', x.shape[1], x.device))

    def _apply_block(self, i: int, x: Tensor, context: tuple[TokenPaths, TokenPaths]) -> tuple[Tensor, Tensor]:
        return super()._apply_block(i, x, context[i % 2])


class LBVimBackbone(Pyramid, LBVim):
    """LBVim as a dense backbone: the outputs of four blocks' mixers, each with a norm of its own, as maps of one size.

    Args:
        block_indices: Blocks whose maps are returned.
        out_dim: Channels of the maps; None is `embed_dim`, without a projection.
        img_size: Image size that the position embedding is made for; it is resized to others.
        dynamic_img_size: Take images of any size.
        num_classes: 0; there is no classifier.
        kwargs: Arguments of :class:`LBVim`.
    """

    def __init__(
        self,
        block_indices: tuple[int, int, int, int] = (5, 11, 17, 23),
        out_dim: int | None = None,
        img_size: int | tuple[int, int] = 224,
        dynamic_img_size: bool = True,
        num_classes: int = 0,
        global_pool: Literal['avg', ''] = '',
        norm_layer: Literal['rmsnorm', 'layernorm'] = 'layernorm',
        device=None,
        dtype=None,
        **kwargs: Any,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__(
            img_size=img_size,
            dynamic_img_size=dynamic_img_size,
            num_classes=num_classes,
            global_pool=global_pool,
            norm_layer=norm_layer,
            **kwargs,
            **dd,
        )
        self._set_levels(block_indices, scales=(1, 1, 1, 1))
        self.norm_f = nn.Identity()
        out_dim = out_dim or self.embed_dim
        for level, info in enumerate(self.feature_info):
            projects = out_dim != self.embed_dim
            setattr(self, f'out_map_{level}', Linear(self.embed_dim, out_dim, **dd) if projects else nn.Identity())
            info |= {'module': f'outnorm_{level}', 'num_chs': out_dim}
        for level in range(4):
            setattr(self, f'outnorm_{level}', LayerNorm(out_dim, **dd))

    def _feature(self, i: int, x: Tensor, branch: Tensor, norm: bool) -> Tensor:
        return branch

    def _make_level(self, level: int, x: Tensor) -> Tensor:
        x = getattr(self, f'out_map_{level}')(x.permute(0, 2, 3, 1))
        return getattr(self, f'outnorm_{level}')(x).permute(0, 3, 1, 2).contiguous()

    def _drop_level(self, level: int) -> None:
        setattr(self, f'out_map_{level}', nn.Identity())
        setattr(self, f'outnorm_{level}', nn.Identity())


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: IsotropicMamba) -> dict[str, Tensor]:
    """Fit a published checkpoint, or one of ours, to `model`.

    A position embedding with another number of rows than the model's is taken for a square grid and resized. A
    classifier loads into a backbone, with a warning: without its head and final norm, with the model's own output
    layers, and, as the published segmentation does, with biases of zero where the backbone has LayerNorms.
    """
    if isinstance(model, LBVimBackbone) and 'norm_f.weight' in state_dict:
        _logger.warning('The checkpoint is a classifier: its head is dropped, the output layers stay as initialised.')
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith(('head.', 'norm_f.'))}
        own = model.state_dict()
        state_dict |= {key: value for key, value in own.items() if key.startswith('out')}
        biases = [key for key in own if key.endswith('.norm.bias') and key not in state_dict]
        state_dict |= {key: torch.zeros_like(own[key]) for key in biases}
    if 'pos_embed' in state_dict:
        state_dict = {**state_dict, 'pos_embed': fit_pos_embed(state_dict['pos_embed'], model)}
    return state_dict


_cfg = partial(
    isotropic_cfg,
    paper_name='LBMamba: Locally Bi-directional Mamba',
    paper_ids='arXiv:2506.15976',
    origin_url='https://github.com/cvlab-stonybrook/LBMamba',
)
_fixed_cfg = partial(_cfg, fixed_input_size=True)
_backbone_cfg = partial(_cfg, num_classes=0, input_size=(3, 512, 512), classifier=None)


default_cfgs = generate_default_cfgs(
    {
        'lbvim_tiny.untrained': _fixed_cfg(),
        'lbvim_300.untrained': _fixed_cfg(),
        'lbvim_small.untrained': _fixed_cfg(),
        'lbvim_528_atthead.untrained': _fixed_cfg(classifier='head.1'),
        'lbvim_tiny_backbone.untrained': _backbone_cfg(),
        'lbvim_300_backbone.untrained': _backbone_cfg(),
        'lbvim_small_backbone.untrained': _backbone_cfg(),
        'lbvim_528_backbone.untrained': _backbone_cfg(),
    }
)


def _create_lbvim(variant: str, pretrained: bool = False, model_cls: type[LBVim] = LBVim, **kwargs: Any) -> LBVim:
    return build_isotropic(model_cls, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def lbvim_tiny(pretrained: bool = False, **kwargs: Any) -> LBVim:
    """LBVim-Ti, published as lbvim_tiny_patch16_224: 6.4M params."""
    model_args = {'embed_dim': 192}
    return _create_lbvim('lbvim_tiny', pretrained, **dict(model_args, **kwargs))


@register_model
def lbvim_300(pretrained: bool = False, **kwargs: Any) -> LBVim:
    """LBVim as fast as Vim-Ti, published as lbvim_300_patch16_224: 14.9M params."""
    model_args = {'embed_dim': 300}
    return _create_lbvim('lbvim_300', pretrained, **dict(model_args, **kwargs))


@register_model
def lbvim_small(pretrained: bool = False, **kwargs: Any) -> LBVim:
    """LBVim-S, published as lbvim_small_patch16_224: 23.9M params."""
    model_args = {'embed_dim': 384}
    return _create_lbvim('lbvim_small', pretrained, **dict(model_args, **kwargs))


@register_model
def lbvim_528_atthead(pretrained: bool = False, **kwargs: Any) -> LBVim:
    """LBVim as fast as Vim-S, pooled by attention, published as lbvim_528_patch16_224_atthead: 44.8M params."""
    model_args = {'embed_dim': 528, 'global_pool': 'attn'}
    return _create_lbvim('lbvim_528_atthead', pretrained, **dict(model_args, **kwargs))


@register_model
def lbvim_tiny_backbone(pretrained: bool = False, **kwargs: Any) -> LBVimBackbone:
    """LBVim-Ti as a dense backbone."""
    model_args = {'embed_dim': 192}
    return _create_lbvim('lbvim_tiny_backbone', pretrained, LBVimBackbone, **dict(model_args, **kwargs))


@register_model
def lbvim_300_backbone(pretrained: bool = False, **kwargs: Any) -> LBVimBackbone:
    """The 300 channels wide LBVim as a dense backbone, with maps of Vim-Ti's width."""
    model_args = {'embed_dim': 300, 'out_dim': 192}
    return _create_lbvim('lbvim_300_backbone', pretrained, LBVimBackbone, **dict(model_args, **kwargs))


@register_model
def lbvim_small_backbone(pretrained: bool = False, **kwargs: Any) -> LBVimBackbone:
    """LBVim-S as a dense backbone."""
    model_args = {'embed_dim': 384}
    return _create_lbvim('lbvim_small_backbone', pretrained, LBVimBackbone, **dict(model_args, **kwargs))


@register_model
def lbvim_528_backbone(pretrained: bool = False, **kwargs: Any) -> LBVimBackbone:
    """The 528 channels wide LBVim as a dense backbone, with maps of Vim-S's width."""
    model_args = {'embed_dim': 528, 'out_dim': 384}
    return _create_lbvim('lbvim_528_backbone', pretrained, LBVimBackbone, **dict(model_args, **kwargs))
