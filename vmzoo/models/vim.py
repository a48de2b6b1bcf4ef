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

from functools import partial
from typing import Any, Literal

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers.mamba import TokenPaths, VimBlock
from ..layers.rope import apply_rope, rope_tables
from ..layers.tokens import ClassToken, class_token_places, drop_tokens, insert_tokens
from ._isotropic import (
    IsotropicMamba,
    Pyramid,
    build_isotropic,
    fit_pos_embed,
    fit_pyramid,
    isotropic_cfg,
    norm_class,
    scaling_levels,
)

__all__ = ['VisionMamba', 'VisionMambaPyramid']


class VisionMamba(IsotropicMamba):
    """Vision Mamba.

    Args:
        d_state: State size of each inner channel.
        d_conv: Kernel of the causal convolution.
        expand: Inner width of a block over `embed_dim`.
        dt_rank: Rank of the step projection; 'auto' is ceil(embed_dim / 16).
        bidirectional: Scan the tokens in both directions.
        average_directions: Halve the sum of the two directions.
        segment: Also scan every segment of so many tokens backwards within the forward direction (LBMamba, arXiv
            2506.15976); 'auto' chooses by the number of tokens.
        rope: Turn the patch tokens by a 2D rotary embedding before every block, beside the position embedding.
        rope_grid_size: Side of the grid that the rotary embedding was pretrained on; other grids are scaled to it.
        norm_layer: 'rmsnorm' or 'layernorm'.
        kwargs: Arguments of :class:`._isotropic.IsotropicMamba`.

    Raises:
        ValueError: Unknown `norm_layer`, and what :class:`._isotropic.IsotropicMamba` refuses.
    """

    def __init__(
        self,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2.0,
        dt_rank: int | str = 'auto',
        bidirectional: bool = True,
        average_directions: bool = True,
        segment: int | Literal['auto'] | None = None,
        rope: bool = False,
        rope_grid_size: int = 14,
        norm_layer: Literal['rmsnorm', 'layernorm'] = 'rmsnorm',
        **kwargs: Any,
    ):
        norm_cls = norm_class(norm_layer)
        scan = 'forward_backward' if bidirectional else 'forward'
        mixer_args = {'d_state': d_state, 'd_conv': d_conv, 'expand': expand, 'dt_rank': dt_rank}
        mixer_args |= {'scan': scan, 'average': average_directions, 'segment': segment}
        block_layer = partial(VimBlock, norm_layer=norm_cls, **mixer_args)
        super().__init__(block_layer, norm_cls, scan, **kwargs)
        self.rope = rope
        self.rope_grid_size = rope_grid_size
        self.init_weights(needs_reset=False)

    def _stem(self, x: Tensor) -> tuple[Tensor, tuple[int, int], tuple[TokenPaths, tuple[Tensor, Tensor] | None]]:
        x, grid, paths = super()._stem(x)
        if not self.rope:
            return x, grid, (paths, None)
        cos, sin = rope_tables(grid, self.embed_dim, self.rope_grid_size, device=x.device, dtype=x.dtype)
        places = self.token_places(grid[0] * grid[1])
        if places:  # the class token is not turned
            still = torch.ones_like(cos[None, :1])
            cos = insert_tokens(cos[None], still, places)[0]
            sin = insert_tokens(sin[None], 0 * still, places)[0]
        return apply_rope(x, cos, sin), grid, (paths, (cos, sin))

    def _apply_block(
        self, i: int, x: Tensor, context: tuple[TokenPaths, tuple[Tensor, Tensor] | None]
    ) -> tuple[Tensor, Tensor]:
        paths, rope = context
        x, mixed = super()._apply_block(i, x, paths)
        # by the depth as built, so that pruning changes no feature
        if rope is not None and i < self.depth - 1:
            x = apply_rope(x, *rope)
        return x, mixed


class VisionMambaPyramid(Pyramid, VisionMamba):
    """Vision Mamba as a dense backbone: four blocks' features as maps of stride 4, 8, 16 and 32 (for 16-pixel patches).

    Args:
        block_indices: Blocks whose features are the levels.
        features: 'stream' takes the residual stream after a block, 'mixer' the output of its mixer alone.
        num_classes: 0; there is no classifier.
        kwargs: Arguments of :class:`VisionMamba`. The final norm is kept for strict loading, not used by `forward`.
    """

    min_grid = 2

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
        super().__init__(
            img_size=img_size, num_classes=num_classes, global_pool=global_pool, class_token=class_token, **kwargs, **dd
        )
        self._set_levels(block_indices)
        self.features = features
        for level, module in enumerate(scaling_levels(self.embed_dim, partial(nn.BatchNorm2d, **dd), **dd), start=1):
            setattr(self, f'fpn{level}', module)

    def _feature(self, i: int, x: Tensor, branch: Tensor, norm: bool) -> Tensor:
        return super()._feature(i, branch if self.features == 'mixer' else x, branch, norm)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: VisionMamba) -> dict[str, Tensor]:
    """Fit a published checkpoint, or one of ours, to `model`.

    Stored rotary tables are dropped (they are computed), and the class token leaves, with its row of the position
    embedding, if the model has none. A position embedding with another number of rows than the model's is taken for a
    square grid and resized. A classifier loads into a pyramid, with a warning: without its head, and with the model's
    own pyramid.
    """
    rotary = any(key.startswith('rope.') for key in state_dict)
    state_dict = {key: value for key, value in state_dict.items() if not key.startswith('rope.')}
    if isinstance(model, VisionMambaPyramid):
        state_dict = fit_pyramid(state_dict, model)
    pos_embed = state_dict.get('pos_embed')
    if pos_embed is None or ('cls_token' not in state_dict and model.cls_token is not None):
        return state_dict
    if 'cls_token' in state_dict and model.cls_token is None:
        del state_dict['cls_token']
        # of the published checkpoints, those with rotary tables have the class token in front
        source = 'front' if rotary else 'middle'
        pos_embed = drop_tokens(pos_embed, class_token_places(source, pos_embed.shape[1] - 1))
    return {**state_dict, 'pos_embed': fit_pos_embed(pos_embed, model)}


def _cfg(file: str = '', **kwargs: Any) -> dict[str, Any]:
    url = f'https://huggingface.co/hustvl/{file}' if file else ''
    return isotropic_cfg(
        url=url,
        fixed_input_size=True,
        paper_name='Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model',
        paper_ids='arXiv:2401.09417',
        origin_url='https://github.com/hustvl/Vim',
        license='other' if url else 'apache-2.0',
        description=(
            'Licence of the weights unclear: their model card is tagged apache-2.0, but its text says non-commercial.'
            if url
            else None
        ),
        **kwargs,
    )


_seg_cfg = partial(_cfg, num_classes=0, input_size=(3, 512, 512), classifier=None)


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
    return build_isotropic(model_cls, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


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
