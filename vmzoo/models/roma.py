"""RoMA (encoder)

Paper: `RoMA: Scaling up Mamba-based Foundation Models for Remote Sensing`
    - https://arxiv.org/abs/2503.10392
Reference: https://github.com/MiliLab/RoMA (no licence found).

An isotropic encoder for remote sensing, pretrained to predict the next cluster of patches. A block is a mixer of inner
width D that runs along rows, columns and their reverses, each with parameters of its own, and an MLP; the class token
stands in the middle of the sequence. The dense form makes a pyramid of the last block's map.

Written from the paper and the published checkpoints' layout; parameter names are theirs. Weights of the pretraining,
whose mixers have one direction, are converted as published: all directions start equal. What differs:
* columns are those of the patch grid, so that images need not be square, and the position embedding can be resized;
* the dense form has no classifier (the reference keeps one of 1000 classes that it never uses);
* A, D and the step biases have no weight decay.
"""

import logging
import re
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import LayerNorm2d
from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from ..layers.tokens import ClassToken, insert_tokens
from ._isotropic import Pyramid, build_isotropic, fit_pos_embed, fit_pyramid, isotropic_cfg, scaling_levels
from .shufflemamba import MambaMlp

__all__ = ['RoMA', 'RoMADense']

_logger = logging.getLogger(__name__)


class RoMA(MambaMlp):
    """RoMA's encoder.

    Args:
        global_pool: 'token' classifies the class token, 'avg' the mean of two means, of the patches before it and of
            those after it, '' returns all tokens.
        class_token: Where the class token stands.
        kwargs: Arguments of :class:`.shufflemamba.MambaMlp`.
    """

    def __init__(
        self,
        global_pool: Literal['token', 'avg', ''] = 'token',
        class_token: ClassToken = 'middle',
        **kwargs: Any,
    ):
        super().__init__(global_pool=global_pool, class_token=class_token, **kwargs)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens [B, L, D] -> [B, D] by `pool_type`, or by the model's own pooling."""
        pool_type = self.global_pool if pool_type is None else pool_type
        places = self.token_places(x.shape[1] - self.num_prefix_tokens)
        if pool_type != 'avg' or not any(places):
            return super().pool(x, pool_type)
        return (x[:, : places[0]].mean(dim=1) + x[:, places[0] + 1 :].mean(dim=1)) / 2


class RoMADense(Pyramid, RoMA):
    """RoMA for dense prediction: the last block's map at strides 4, 8, 16 and 32 (for 16-pixel patches).

    Args:
        num_classes: 0; there is no classifier.
        kwargs: Arguments of :class:`RoMA`.
    """

    min_grid = 2

    def __init__(
        self,
        img_size: int | tuple[int, int] = 384,
        num_classes: int = 0,
        global_pool: Literal['token', 'avg', ''] = '',
        device=None,
        dtype=None,
        **kwargs: Any,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__(img_size=img_size, num_classes=num_classes, global_pool=global_pool, **kwargs, **dd)
        self._set_levels([self.depth - 1] * 4)
        for level, module in enumerate(scaling_levels(self.embed_dim, partial(LayerNorm2d, **dd), **dd), start=1):
            setattr(self, f'fpn{level}', module)

    def _is_normed(self, i: int) -> bool:
        return True


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: RoMA) -> dict[str, Tensor]:
    """Fit a published checkpoint, or one of ours, to `model`.

    A position embedding with another number of rows than the model's is taken for a square grid and resized. Weights of
    the pretraining load without its decoder: every direction of a mixer gets its only one's parameters, the class token
    has a position embedding of zero, and what the pretraining lacks stays as initialised, with a warning. A classifier
    loads into the dense form without its head.
    """
    state_dict = {key.replace('fpn1.1.ln.', 'fpn1.1.'): value for key, value in state_dict.items()}
    if 'ar_token' in state_dict:
        state_dict = _from_pretraining(state_dict, model)
    if isinstance(model, RoMADense):
        state_dict = fit_pyramid(state_dict, model)
    if 'pos_embed' in state_dict:
        state_dict = {**state_dict, 'pos_embed': fit_pos_embed(state_dict['pos_embed'], model)}
    return state_dict


def _from_pretraining(state_dict: dict[str, Tensor], model: RoMA) -> dict[str, Tensor]:
    kept = {key: value for key, value in state_dict.items() if key.startswith(('patch_embed.', 'layers.'))}
    pos_embed = fit_pos_embed(state_dict['pos_embed'], model, class_token='none')
    places = model.token_places(pos_embed.shape[1])
    kept['pos_embed'] = insert_tokens(pos_embed, torch.zeros_like(pos_embed[:, : len(places)]), places)
    own = model.state_dict()
    for key in own.keys() - kept.keys():
        only = re.sub(r'(?<=mixer\.)(A|D|conv1d|x_proj|dt_proj)(_c)?(_b)?(?=_log$|\.|$)', r'\1', key)
        if only in kept:
            kept[key] = kept[only]
    fresh = {key: value for key, value in own.items() if key.startswith(('cls_token', 'norm_f.', 'head.', 'fpn'))}
    _logger.warning('The checkpoint is of the pretraining: %s stay as initialised.', ', '.join(sorted(fresh)))
    return kept | fresh


_cfg = partial(
    isotropic_cfg,
    fixed_input_size=True,
    paper_name='RoMA: Scaling up Mamba-based Foundation Models for Remote Sensing',
    paper_ids='arXiv:2503.10392',
    origin_url='https://github.com/MiliLab/RoMA',
)
_dense_cfg = partial(_cfg, num_classes=0, input_size=(3, 384, 384), classifier=None)


default_cfgs = generate_default_cfgs(
    {
        'roma_tiny.untrained': _cfg(),
        'roma_small.untrained': _cfg(),
        'roma_base.untrained': _cfg(),
        'roma_large.untrained': _cfg(),
        'roma_huge.untrained': _cfg(),
        'roma_base_dense.untrained': _dense_cfg(),
        'roma_large_dense.untrained': _dense_cfg(),
    }
)


def _create(variant: str, pretrained: bool = False, model_cls: type[RoMA] = RoMA, **kwargs: Any) -> RoMA:
    return build_isotropic(model_cls, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def roma_tiny(pretrained: bool = False, **kwargs: Any) -> RoMA:
    """RoMA-T: 22.2M params."""
    model_args = {'embed_dim': 384, 'depth': 12}
    return _create('roma_tiny', pretrained, **dict(model_args, **kwargs))


@register_model
def roma_small(pretrained: bool = False, **kwargs: Any) -> RoMA:
    """RoMA-S: 38.6M params."""
    model_args = {'embed_dim': 512, 'depth': 12}
    return _create('roma_small', pretrained, **dict(model_args, **kwargs))


@register_model
def roma_base(pretrained: bool = False, **kwargs: Any) -> RoMA:
    """RoMA-B: 85.0M params."""
    model_args = {'embed_dim': 768, 'depth': 12}
    return _create('roma_base', pretrained, **dict(model_args, **kwargs))


@register_model
def roma_large(pretrained: bool = False, **kwargs: Any) -> RoMA:
    """RoMA-L: 297.0M params."""
    model_args = {'embed_dim': 1024, 'depth': 24}
    return _create('roma_large', pretrained, **dict(model_args, **kwargs))


@register_model
def roma_huge(pretrained: bool = False, **kwargs: Any) -> RoMA:
    """RoMA-H: 662.7M params."""
    model_args = {'embed_dim': 1536, 'depth': 24}
    return _create('roma_huge', pretrained, **dict(model_args, **kwargs))


@register_model
def roma_base_dense(pretrained: bool = False, **kwargs: Any) -> RoMADense:
    """RoMA-B as a dense backbone: a pyramid of the last map."""
    model_args = {'embed_dim': 768, 'depth': 12}
    return _create('roma_base_dense', pretrained, RoMADense, **dict(model_args, **kwargs))


@register_model
def roma_large_dense(pretrained: bool = False, **kwargs: Any) -> RoMADense:
    """RoMA-L as a dense backbone: a pyramid of the last map."""
    model_args = {'embed_dim': 1024, 'depth': 24}
    return _create('roma_large_dense', pretrained, RoMADense, **dict(model_args, **kwargs))
