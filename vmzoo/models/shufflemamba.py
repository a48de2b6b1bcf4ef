"""ShuffleMamba (Vim, Mamba-Reg and MambaMLP trained with a stochastic layer-wise shuffle)

Paper: `Stochastic Layer-Wise Shuffle for Improving Vision Mamba Training`
    - https://arxiv.org/abs/2408.17081
Reference: https://github.com/huangzizheng01/ShuffleMamba (no licence found).

A training-time regulariser for isotropic models: each layer, with a chance that grows linearly with depth, sees its
tokens in random order, and the order is restored after it; in evaluation the models are what they were. Three are
published with it: `shufflemamba_*` is Vim with the class token in front, `shufflemamba_reg_*` is Mamba-Reg
(https://arxiv.org/abs/2405.14858), whose classifier reads registers spread over the sequence, and `mambamlp_*` has
blocks of a four-way mixer of inner width D and an MLP.

Written from the paper and the published checkpoints' layout; parameter names are theirs. What differs:
* `shuffle_rate` is 0 unless given (the published entry points take 0.1, training used up to 0.6);
* columns are those of the patch grid, so that images need not be square;
* A, D and the step biases have no weight decay.
"""

import logging
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers.linear import Linear, init_truncated_
from ..layers.mamba import MambaMlpBlock, Scan, VimBlock
from ..layers.norm import LayerNorm
from ..layers.tokens import ClassToken, insert_tokens
from ._isotropic import IsotropicMamba, Pyramid, build_isotropic, fit_pos_embed, fit_pyramid, isotropic_cfg, norm_class

__all__ = ['MambaMlp', 'MambaReg', 'ShuffleMamba', 'ShuffleMambaBackbone']

_logger = logging.getLogger(__name__)


class ShuffleMamba(IsotropicMamba):
    """Vim with its class token in front of the patches.

    Args:
        class_token: Where the class token stands.
        dynamic_img_size: Take images of any size.
        norm_layer: 'rmsnorm' or 'layernorm'.
        kwargs: Arguments of :class:`._isotropic.IsotropicMamba`; `shuffle_rate` among them.
    """

    def __init__(
        self,
        class_token: ClassToken = 'front',
        dynamic_img_size: bool = True,
        norm_layer: Literal['rmsnorm', 'layernorm'] = 'rmsnorm',
        **kwargs: Any,
    ):
        norm_cls = norm_class(norm_layer)
        super().__init__(
            partial(VimBlock, norm_layer=norm_cls),
            norm_cls,
            class_token=class_token,
            dynamic_img_size=dynamic_img_size,
            **kwargs,
        )
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as published: projections but `out_proj` are truncated normals, steps start at softplus(0)."""
        super().init_weights(needs_reset)
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)
        for name, module in self.layers.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith('out_proj'):
                init_truncated_(module)


class ShuffleMambaBackbone(Pyramid, ShuffleMamba):
    """ShuffleMamba for dense prediction: four maps, all of the patches' stride.

    A map is what a block's mixer returns, without the residual stream; that of the last block is the normed stream.

    Args:
        block_indices: Blocks whose maps are returned.
        num_classes: 0; there is no classifier.
        kwargs: Arguments of :class:`ShuffleMamba`.
    """

    def __init__(
        self,
        block_indices: tuple[int, int, int, int] = (5, 11, 17, 23),
        img_size: int | tuple[int, int] = 512,
        num_classes: int = 0,
        global_pool: Literal['avg', ''] = '',
        class_token: ClassToken = 'none',
        **kwargs: Any,
    ):
        super().__init__(
            img_size=img_size, num_classes=num_classes, global_pool=global_pool, class_token=class_token, **kwargs
        )
        self._set_levels(block_indices, scales=(1, 1, 1, 1))
        for level in range(1, 5):
            setattr(self, f'fpn{level}', nn.Identity())

    def _is_normed(self, i: int) -> bool:
        return i == self.depth - 1

    def _feature(self, i: int, x: Tensor, branch: Tensor, norm: bool) -> Tensor:
        return super()._feature(i, x if self._is_normed(i) else branch, branch, norm)


class MambaReg(IsotropicMamba):
    """Mamba-Reg: registers, spread evenly over the patches, are reduced and joined for the classifier.

    Args:
        num_registers: Number n of registers.
        reduction: What their width is divided by before they are joined; 1 for no reduction.
        norm_layer: 'rmsnorm' or 'layernorm'.
        kwargs: Arguments of :class:`._isotropic.IsotropicMamba`; `global_pool` 'token' is that of the registers.

    Raises:
        ValueError: No register, or a `reduction` that does not divide `embed_dim`.
    """

    def __init__(
        self,
        num_registers: int = 12,
        reduction: int = 1,
        norm_layer: Literal['rmsnorm', 'layernorm'] = 'rmsnorm',
        embed_dim: int = 192,
        device=None,
        dtype=None,
        **kwargs: Any,
    ):
        if min(num_registers, reduction) < 1 or embed_dim % reduction:
            raise ValueError(
                f'It takes one register or more, and a reduction that divides embed_dim={embed_dim}; got '
                f'num_registers={num_registers} and reduction={reduction}.'
            )
        self.num_registers = num_registers  # the base asks for their places
        self.reduction = reduction
        self.norm_cls = norm_class(norm_layer)
        super().__init__(
            partial(VimBlock, norm_layer=self.norm_cls),
            self.norm_cls,
            class_token='none',
            embed_dim=embed_dim,
            device=device,
            dtype=dtype,
            **kwargs,
        )
        self.pos_embed_cls = nn.Parameter(torch.empty_like(self.cls_token))
        self.init_weights(needs_reset=False)

    @property
    def head_hidden_size(self) -> int:
        """Width of what the classifier takes."""
        joined = self.num_registers * (self.embed_dim // self.reduction)
        return joined if self.global_pool == 'token' else self.embed_dim

    def token_places(self, num_patches: int) -> tuple[int, ...]:
        """Indices of the registers in a sequence with `num_patches` patches."""
        run = num_patches // (self.num_registers + 1)
        return tuple(run + k * (run + 1) for k in range(self.num_registers))

    def _build_head(self, num_classes: int, device=None, dtype=None) -> nn.Module:
        dd = {'device': device, 'dtype': dtype}
        if self.global_pool != 'token' or self.reduction == 1:
            self.neck, self.norm_neck = nn.Identity(), nn.Identity()
        elif not isinstance(getattr(self, 'neck', None), nn.Linear):
            self.neck = Linear(self.embed_dim, self.embed_dim // self.reduction, bias=False, **dd)
            self.norm_neck = self.norm_cls(self.head_hidden_size, **dd)
            trunc_normal_(self.neck.weight, std=0.02)
        self.neck.train(self.training)
        self.norm_neck.train(self.training)
        return super()._build_head(num_classes, **dd)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as published."""
        super().init_weights(needs_reset)
        trunc_normal_(self.pos_embed_cls, std=0.02)
        if isinstance(self.neck, nn.Linear):
            trunc_normal_(self.neck.weight, std=0.02)

    def _add_tokens(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self._pos_embed_for(grid)
        registers = (self.cls_token + self.pos_embed_cls).to(x.dtype).expand(x.shape[0], -1, -1)
        return insert_tokens(x, registers, self.token_places(x.shape[1]))

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens [B, L, D] -> [B, head_hidden_size] by `pool_type`, or by the model's own pooling."""
        if (self.global_pool if pool_type is None else pool_type) != 'token':
            return super().pool(x, pool_type)
        registers = x[:, list(self.token_places(x.shape[1] - self.num_registers))]
        return self.norm_neck(self.neck(registers).flatten(1))


class MambaMlp(IsotropicMamba):
    """MambaMLP: a mixer of inner width D along rows and columns, then an MLP, in every block.

    Args:
        scan: Paths of the mixers: 'cross' for rows, columns and their reverses, 'forward_backward', or 'forward'.
        global_pool: 'avg' classifies the mean of the patches, 'token' the class token, '' returns all tokens.
        class_token: Where the class token stands.
        kwargs: Arguments of :class:`._isotropic.IsotropicMamba`.
    """

    def __init__(
        self,
        scan: Scan = 'cross',
        global_pool: Literal['token', 'avg', ''] = 'avg',
        class_token: ClassToken = 'front',
        **kwargs: Any,
    ):
        super().__init__(
            partial(MambaMlpBlock, scan=scan, expand=1),
            LayerNorm,
            scan,
            global_pool=global_pool,
            class_token=class_token,
            **kwargs,
        )
        self.init_weights(needs_reset=False)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: IsotropicMamba) -> dict[str, Tensor]:
    """Fit a published checkpoint, or one of ours, to `model`.

    A position embedding with another number of rows than the model's is taken for a square grid and resized. A
    classifier loads into a backbone: without its head and class token, and, if the backbone has LayerNorms and the
    classifier RMSNorms (as the published segmentation does), with biases of zero.
    """
    if isinstance(model, ShuffleMambaBackbone):
        state_dict = _without_classifier(state_dict, model)
    has_bias, wants_bias = ('layers.0.norm.bias' in keys for keys in (state_dict, model.state_dict()))
    if 'layers.0.norm.weight' in state_dict and has_bias != wants_bias:
        name = 'layernorm' if has_bias else 'rmsnorm'
        raise ValueError(f'The checkpoint is of a model with norm_layer={name!r}: create the model with that.')
    if not isinstance(getattr(model, 'neck', None), nn.Linear):  # registers that are not pooled have none
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith(('neck.', 'norm_neck.'))}
    if 'pos_embed' in state_dict:
        state_dict = {**state_dict, 'pos_embed': fit_pos_embed(state_dict['pos_embed'], model)}
    return state_dict


def _without_classifier(state_dict: dict[str, Tensor], model: ShuffleMambaBackbone) -> dict[str, Tensor]:
    state_dict = fit_pyramid(state_dict, model)
    if 'cls_token' in state_dict and model.cls_token is None:
        del state_dict['cls_token']
        state_dict['pos_embed'] = state_dict['pos_embed'][:, 1:]
    missing = {
        key: torch.zeros_like(value)
        for key, value in model.state_dict().items()
        if key.endswith(('.norm.bias', 'norm_f.bias')) and key not in state_dict
    }
    if missing:
        _logger.warning('The checkpoint has RMSNorms, the model LayerNorms: their biases are zero.')
    return state_dict | missing


_cfg = partial(
    isotropic_cfg,
    paper_name='Stochastic Layer-Wise Shuffle for Improving Vision Mamba Training',
    paper_ids='arXiv:2408.17081',
    origin_url='https://github.com/huangzizheng01/ShuffleMamba',
)
_fixed_cfg = partial(_cfg, fixed_input_size=True)
_seg_cfg = partial(_cfg, num_classes=0, input_size=(3, 512, 512), classifier=None)


def _reg_cfg(file: str = '') -> dict[str, Any]:
    url = f'https://huggingface.co/Wangf3014/Mamba-Reg/resolve/main/{file}' if file else ''
    description = "Mamba-Reg's own weights, to which the published code points; trained without the shuffle."
    return _fixed_cfg(url=url, crop_pct=1.0, description=description if url else None)


default_cfgs = generate_default_cfgs(
    {
        'shufflemamba_tiny.untrained': _cfg(),
        'shufflemamba_small.untrained': _cfg(),
        'shufflemamba_middle.untrained': _cfg(),
        'shufflemamba_base.untrained': _cfg(),
        'shufflemamba_large_40.untrained': _cfg(),
        'shufflemamba_large.untrained': _cfg(),
        'shufflemamba_reg_tiny.untrained': _reg_cfg(),
        'shufflemamba_reg_small.mambar_in1k': _reg_cfg('mambar_small_patch16_224.pth'),
        'shufflemamba_reg_base.mambar_in1k': _reg_cfg('mambar_base_patch16_224.pth'),
        'shufflemamba_reg_large.mambar_in1k': _reg_cfg('mambar_large_patch16_224.pth'),
        'shufflemamba_base_seg.untrained': _seg_cfg(),
        'shufflemamba_large_seg.untrained': _seg_cfg(),
        'mambamlp_base.untrained': _fixed_cfg(),
        'mambamlp_large.untrained': _fixed_cfg(),
        'mambamlp_huge.untrained': _fixed_cfg(),
    }
)


def _create(
    variant: str, pretrained: bool = False, model_cls: type[IsotropicMamba] = ShuffleMamba, **kwargs: Any
) -> IsotropicMamba:
    return build_isotropic(model_cls, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def shufflemamba_tiny(pretrained: bool = False, **kwargs: Any) -> ShuffleMamba:
    """ShuffleMamba-T: 7.1M params."""
    model_args = {'embed_dim': 192}
    return _create('shufflemamba_tiny', pretrained, **dict(model_args, **kwargs))


@register_model
def shufflemamba_small(pretrained: bool = False, **kwargs: Any) -> ShuffleMamba:
    """ShuffleMamba-S: 25.8M params."""
    model_args = {'embed_dim': 384}
    return _create('shufflemamba_small', pretrained, **dict(model_args, **kwargs))


@register_model
def shufflemamba_middle(pretrained: bool = False, **kwargs: Any) -> ShuffleMamba:
    """ShuffleMamba-M, with LayerNorm: 74.2M params."""
    model_args = {'embed_dim': 576, 'depth': 32, 'norm_layer': 'layernorm'}
    return _create('shufflemamba_middle', pretrained, **dict(model_args, **kwargs))


@register_model
def shufflemamba_base(pretrained: bool = False, **kwargs: Any) -> ShuffleMamba:
    """ShuffleMamba-B: 97.6M params, 82.6 top-1."""
    model_args = {'embed_dim': 768}
    return _create('shufflemamba_base', pretrained, **dict(model_args, **kwargs))


@register_model
def shufflemamba_large_40(pretrained: bool = False, **kwargs: Any) -> ShuffleMamba:
    """ShuffleMamba-L1: 283.7M params."""
    model_args = {'embed_dim': 1024, 'depth': 40}
    return _create('shufflemamba_large_40', pretrained, **dict(model_args, **kwargs))


@register_model
def shufflemamba_large(pretrained: bool = False, **kwargs: Any) -> ShuffleMamba:
    """ShuffleMamba-L: 340.0M params."""
    model_args = {'embed_dim': 1024, 'depth': 48}
    return _create('shufflemamba_large', pretrained, **dict(model_args, **kwargs))


@register_model
def shufflemamba_reg_tiny(pretrained: bool = False, **kwargs: Any) -> MambaReg:
    """ShuffleMamba-Reg-T: 9.3M params."""
    model_args = {'embed_dim': 192}
    return _create('shufflemamba_reg_tiny', pretrained, MambaReg, **dict(model_args, **kwargs))


@register_model
def shufflemamba_reg_small(pretrained: bool = False, **kwargs: Any) -> MambaReg:
    """ShuffleMamba-Reg-S: 27.8M params."""
    model_args = {'embed_dim': 384, 'reduction': 2}
    return _create('shufflemamba_reg_small', pretrained, MambaReg, **dict(model_args, **kwargs))


@register_model
def shufflemamba_reg_base(pretrained: bool = False, **kwargs: Any) -> MambaReg:
    """ShuffleMamba-Reg-B: 99.3M params, 83.1 top-1."""
    model_args = {'embed_dim': 768, 'reduction': 4}
    return _create('shufflemamba_reg_base', pretrained, MambaReg, **dict(model_args, **kwargs))


@register_model
def shufflemamba_reg_large(pretrained: bool = False, **kwargs: Any) -> MambaReg:
    """ShuffleMamba-Reg-L2: 341.2M params, 83.6 top-1."""
    model_args = {'embed_dim': 1024, 'depth': 48, 'num_registers': 16, 'reduction': 8}
    return _create('shufflemamba_reg_large', pretrained, MambaReg, **dict(model_args, **kwargs))


@register_model
def shufflemamba_base_seg(pretrained: bool = False, **kwargs: Any) -> ShuffleMambaBackbone:
    """ShuffleMamba-B as ADE20K's segmentation backbone, with LayerNorm."""
    model_args = {'embed_dim': 768, 'norm_layer': 'layernorm'}
    return _create('shufflemamba_base_seg', pretrained, ShuffleMambaBackbone, **dict(model_args, **kwargs))


@register_model
def shufflemamba_large_seg(pretrained: bool = False, **kwargs: Any) -> ShuffleMambaBackbone:
    """ShuffleMamba-L as ADE20K's segmentation backbone."""
    model_args = {'embed_dim': 1024, 'depth': 48, 'block_indices': (11, 23, 35, 47)}
    return _create('shufflemamba_large_seg', pretrained, ShuffleMambaBackbone, **dict(model_args, **kwargs))


@register_model
def mambamlp_base(pretrained: bool = False, **kwargs: Any) -> MambaMlp:
    """MambaMLP-B: 85.0M params."""
    model_args = {'embed_dim': 768, 'depth': 12}
    return _create('mambamlp_base', pretrained, MambaMlp, **dict(model_args, **kwargs))


@register_model
def mambamlp_large(pretrained: bool = False, **kwargs: Any) -> MambaMlp:
    """MambaMLP-L: 297.0M params."""
    model_args = {'embed_dim': 1024, 'depth': 24}
    return _create('mambamlp_large', pretrained, MambaMlp, **dict(model_args, **kwargs))


@register_model
def mambamlp_huge(pretrained: bool = False, **kwargs: Any) -> MambaMlp:
    """MambaMLP-H: 662.7M params."""
    model_args = {'embed_dim': 1536, 'depth': 24}
    return _create('mambamlp_huge', pretrained, MambaMlp, **dict(model_args, **kwargs))
