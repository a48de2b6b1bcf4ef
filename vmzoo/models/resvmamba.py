"""Res-VMamba.

Paper: `Res-VMamba: Fine-Grained Food Category Visual Classification Using Selective State Space Models with Deep
Residual Learning` - https://arxiv.org/abs/2402.15761
Weights: https://github.com/ChiShengChen/ResVMamba (no licence stated)

The first VMamba (`vmamba_v0_*`) with a residual path around each stage but the last: the stage's input, max-pooled and
projected to the channels of the next stage, is added to the stage's output. Trained on the food pictures of CNFOOD-241.

Written for timm from the paper's description of the function. In the published code the projections are no part of the
model: they are drawn at random at every call and never trained, so no checkpoint has them and its outputs differ from
call to call. Here they are ordinary trained layers by default; the `residual` option has the other readings. Odd maps
are pooled with a last row or column of their own, where the published code fails.
"""

import logging
import re
from functools import partial

import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ._builder import build_model, imagenet_cfg
from .vmamba import V0_ARGS, VMamba
from .vmamba import checkpoint_filter_fn as vmamba_filter_fn

__all__ = ['ResVMamba']

_logger = logging.getLogger(__name__)
RESIDUALS = ('proj', 'none', 'random')


class PooledProjection(nn.Module):
    """Halve a channels-last map by max pooling, then project its channels: the path around a stage.

    Args:
        dim: Channels C of the input.
        out_dim: Channels of the output.
        ceil_mode: Pool the last row or column of an odd map, rather than leave it out.
        trained: Have a projection; otherwise one is drawn anew at every call, as if it had just been initialised.
    """

    def __init__(self, dim: int, out_dim: int, ceil_mode: bool = True, trained: bool = True, device=None, dtype=None):
        super().__init__()
        self.dim = dim
        self.out_dim = out_dim
        self.ceil_mode = ceil_mode
        self.proj = nn.Conv2d(dim, out_dim, 1, device=device, dtype=dtype) if trained else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H / 2, W / 2, C']."""
        x = F.max_pool2d(x.permute(0, 3, 1, 2), 2, ceil_mode=self.ceil_mode)
        if self.proj is not None:
            return self.proj(x).permute(0, 2, 3, 1)
        bound = self.dim**-0.5
        weight = x.new_empty(self.out_dim, self.dim, 1, 1).uniform_(-bound, bound)
        bias = x.new_empty(self.out_dim).uniform_(-bound, bound)
        return F.conv2d(x, weight, bias).permute(0, 2, 3, 1)


class ResVMamba(VMamba):
    """Res-VMamba backbone and classifier: VMamba with residual paths around its stages.

    Args:
        residual: What is added to the output of a stage: 'proj', its pooled input through a trained projection, as the
            paper describes it; 'random', through a projection that is drawn anew at every call, as published; 'none',
            the mean of those draws, with which published weights give the same result every time.
        **kwargs: Options of `VMamba`.

    Raises:
        ValueError: An option outside its choices.
    """

    out_norms = True

    def __init__(self, residual: str = 'proj', device=None, dtype=None, **kwargs):
        if residual not in RESIDUALS:
            raise ValueError(f'Unknown residual {residual!r}; choose from {", ".join(RESIDUALS)}.')
        super().__init__(device=device, dtype=dtype, **kwargs)
        self.residual = residual
        if residual == 'none':
            return
        dims = [info['num_chs'] for info in self.feature_info]
        for stage, dim, out_dim in zip(self.layers, dims, dims[1:]):
            pads = stage.downsample.min_input(2) == 3
            stage.shortcut = PooledProjection(dim, out_dim, pads, residual == 'proj', device=device, dtype=dtype)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Map published names to ours.

    Published files have no residual projections, and neither have those of the first VMamba: a model that has them
    keeps its own, and a warning names them.

    Args:
        state_dict: Unwrapped weights, with the names of any VMamba release or ours.
        model: The model they are for.
    """
    state_dict = {
        re.sub(r'^residual_proj\.(\d+)\.', r'layers.\1.shortcut.proj.', name): value
        for name, value in state_dict.items()
    }
    given = {name: value for name, value in state_dict.items() if '.shortcut.' in name}
    own = {name: value for name, value in model.state_dict().items() if '.shortcut.' in name}
    weights = vmamba_filter_fn({name: value for name, value in state_dict.items() if name not in given}, model)
    if own and not given:
        _logger.warning(
            "The checkpoint has no residual projections; the model's own are kept as they are: %s. With "
            "residual='none', published weights give the same result every time.",
            ', '.join(own),
        )
        given = own
    return weights | given


_cfg = partial(
    imagenet_cfg,
    num_classes=241,
    first_conv='patch_embed.0',
    classifier='classifier.head',
    origin_url='https://github.com/ChiShengChen/ResVMamba',
    paper_name=(
        'Res-VMamba: Fine-Grained Food Category Visual Classification Using Selective State Space Models with Deep '
        'Residual Learning'
    ),
    paper_ids='arXiv:2402.15761',
)


default_cfgs = generate_default_cfgs(
    {
        'resvmamba_tiny.untrained': _cfg(),
        # trained with a head of 1000 classes, of which the first 241 occur
        'resvmamba_small.cnfood241': _cfg(
            url='https://huggingface.co/ms57rd/Res-VMamba/resolve/main/ckpt_epoch_166.pth', num_classes=1000
        ),
        'resvmamba_base.untrained': _cfg(),
    }
)

_ARGS = {**V0_ARGS, 'downsample': 'merge'}

_create_resvmamba = partial(build_model, ResVMamba, pretrained_filter_fn=checkpoint_filter_fn)


@register_model
def resvmamba_tiny(pretrained: bool = False, **kwargs) -> ResVMamba:
    """Res-VMamba-T, 22.7 M parameters for 241 classes (drop path 0.2); no weights."""
    model_args = dict(_ARGS, depths=(2, 2, 9, 2), embed_dim=96)
    return _create_resvmamba('resvmamba_tiny', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def resvmamba_small(pretrained: bool = False, **kwargs) -> ResVMamba:
    """Res-VMamba-S, 44.8 M parameters, trained on CNFOOD-241 (drop path 0.3)."""
    model_args = dict(_ARGS, depths=(2, 2, 27, 2), embed_dim=96)
    return _create_resvmamba('resvmamba_small', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def resvmamba_base(pretrained: bool = False, **kwargs) -> ResVMamba:
    """Res-VMamba-B for 241 classes (drop path 0.5); the published code cannot build it."""
    model_args = dict(_ARGS, depths=(2, 2, 27, 2), embed_dim=128)
    return _create_resvmamba('resvmamba_base', pretrained=pretrained, **dict(model_args, **kwargs))
