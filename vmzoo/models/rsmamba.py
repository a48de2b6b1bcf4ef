"""RSMamba

Paper: `RSMamba: Remote Sensing Image Classification with State Space Model`
    - https://arxiv.org/abs/2403.19654
Reference: https://github.com/KyanChen/RSMamba (Apache-2.0).

An isotropic model of overlapping patches, without a class token. One mixer a block runs over the tokens forward, in
reverse and in random order; a gate that looks at the means of the three results weighs them for each image.

Written from the paper; checkpoints in the published layout (mmpretrain's) are converted. What differs:
* the random order of a block is drawn anew while training only; in evaluation it is fixed, so that an image always has
  the same result (the reference draws in evaluation too, and its results vary a little from call to call);
* what does not depend on the order of the tokens is computed once for all paths;
* the position embedding can be resized, and A, D and the step biases have no weight decay.
"""

from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers.linear import Linear
from ..layers.mamba import MambaMixer, TokenPaths, make_paths
from ..layers.norm import LayerNorm
from ..layers.shuffle import fixed_order, random_order
from ..layers.tokens import ClassToken
from ._isotropic import IsotropicMamba, build_isotropic, fit_pos_embed, isotropic_cfg

__all__ = ['RSMamba']

Paths = Literal['forward', 'forward_reverse', 'forward_reverse_shuffle']

# Classes in the order of the published heads.
_UC = """
harbor parkinglot buildings mediumresidential sparseresidential forest agricultural overpass golfcourse freeway
baseballdiamond beach intersection runway mobilehomepark chaparral airplane river storagetanks tenniscourt
denseresidential
"""
_AID = """
Port Square River Pond Playground Mountain Park Airport SparseResidential Stadium Industrial Church
DenseResidential Parking Farmland Desert Viaduct Forest StorageTanks Center Meadow MediumResidential School
BareLand Commercial BaseballField RailwayStation Resort Bridge Beach
"""
_NWPU = """
river terrace snowberg stadium parking_lot thermal_power_station rectangular_farmland cloud intersection meadow
palace ground_track_field commercial_area beach church baseball_diamond ship industrial_area bridge freeway
medium_residential circular_farmland mobile_home_park railway forest sparse_residential harbor wetland mountain
airport golf_course overpass dense_residential chaparral basketball_court airplane tennis_court runway
storage_tank island railway_station lake sea_ice desert roundabout
"""

# Mean and standard deviation of the channels in 0..255, and classes.
_DATASETS = {
    'nwpu': ((93.847266, 97.20128819, 87.66547902), (37.10216765, 34.61650149, 33.70191772), _NWPU),
    'aid': ((101.02608706, 103.9996994, 93.50157708), (40.36728927, 37.11132278, 35.90649976), _AID),
    'uc': ((123.770241, 125.41281689, 115.35737613), (44.17314347, 41.63589266, 39.5737929), _UC),
}


class MultiPathMixer(MambaMixer):
    """Mamba-1 token mixer that runs with the same parameters over several paths, and mixes their results.

    Args:
        dim: Token channels D.
        num_paths: Number K of paths.
        gate: Weigh the paths of each sample by a softmax over K, of a linear layer on the means of their tokens;
            otherwise take their mean.
        mixer_args: Arguments of :class:`..layers.mamba.MambaMixer`.
    """

    def __init__(self, dim: int, num_paths: int = 3, gate: bool = True, device=None, dtype=None, **mixer_args: Any):
        dd = {'device': device, 'dtype': dtype}
        super().__init__(dim, scan='forward', **mixer_args, **dd)
        self.suffixes = self.suffixes * num_paths
        self.gate = Linear(num_paths * dim, num_paths, bias=False, **dd) if gate and num_paths > 1 else None

    def reset_parameters(self) -> None:
        """Initialise as published: the step projection as an ordinary Linear."""
        super().reset_parameters()
        self.dt_proj.reset_parameters()

    def forward(self, x: Tensor, paths: TokenPaths) -> Tensor:
        """Tokens [B, L, D] -> [B, L, D]."""
        x, z = self.in_proj(x).chunk(2, dim=-1)  # [B, L, d] each
        y = self.scan_paths(x, paths, merge=False) * F.silu(z).unsqueeze(2)  # [B, L, K, d]
        if self.gate is None:
            return self.out_proj(y.mean(dim=2))
        # the projection is linear: means and sums over tokens and paths are as well taken before it
        means = self.out_proj(y.mean(dim=1)).flatten(1)  # [B, K D]
        weights = self.gate(means).softmax(dim=-1)
        return self.out_proj((y * weights[:, None, :, None]).sum(dim=2))


class RSMambaBlock(nn.Module):
    """Residual block around a :class:`MultiPathMixer` (extra arguments are its own); all blocks share one norm."""

    def __init__(self, dim: int, drop_path: float = 0.0, device=None, dtype=None, **mixer_args: Any):
        super().__init__()
        self.mixer = MultiPathMixer(dim, **mixer_args, device=device, dtype=dtype)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, paths: TokenPaths, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """Stream [B, L, D] -> the stream after the block, and the mixer's output alone."""
        mixed = self.mixer(norm(x), paths)
        return x + self.drop_path(mixed), mixed


class PathOrder(nn.Module):
    """The order of the third path in each block: drawn anew while training, fixed in evaluation.

    Attributes:
        generator: Where orders are drawn from; None for torch's default generator of the tokens' device.
    """

    def __init__(self):
        super().__init__()
        self.generator: torch.Generator | None = None

    def forward(self, layer: int, length: int, device: torch.device) -> Tensor:
        """The order of the layer's tokens, int64 [L]."""
        return random_order(length, device, self.generator) if self.training else fixed_order(length, layer, device)


class RSMamba(IsotropicMamba):
    """RSMamba.

    Args:
        paths: Orders in which a mixer runs over the tokens.
        gate: Weigh the paths by a gate; otherwise take their mean.
        global_pool: 'avg' classifies the normed mean of the patches, 'token' the class token, '' returns all tokens.
        class_token: Where a class token stands.
        stride: Step between patches.
        kwargs: Arguments of :class:`._isotropic.IsotropicMamba`.

    Raises:
        ValueError: Unknown `paths`, and what :class:`._isotropic.IsotropicMamba` refuses.
    """

    def __init__(
        self,
        paths: Paths = 'forward_reverse_shuffle',
        gate: bool = True,
        global_pool: Literal['token', 'avg', ''] = 'avg',
        class_token: ClassToken = 'none',
        stride: int | None = 8,
        embed_dim: int = 192,
        device=None,
        dtype=None,
        **kwargs: Any,
    ):
        if paths not in get_args(Paths):
            raise ValueError(f'paths must be one of {", ".join(get_args(Paths))}, got {paths!r}.')
        dd = {'device': device, 'dtype': dtype}
        super().__init__(
            partial(RSMambaBlock, num_paths=1 + paths.count('_'), gate=gate),
            partial(LayerNorm, eps=1e-6),
            'forward',
            global_pool=global_pool,
            class_token=class_token,
            stride=stride,
            embed_dim=embed_dim,
            pad_patches=True,
            patch_bias=False,
            **kwargs,
            **dd,
        )
        self.paths = paths
        self.path_order = PathOrder()
        self.pre_norm = LayerNorm(embed_dim, eps=1e-6, **dd)
        self.init_weights(needs_reset=False)

    def _build_head(self, num_classes: int, device=None, dtype=None) -> nn.Module:
        dd = {'device': device, 'dtype': dtype}
        if self.global_pool != 'avg':
            self.fc_norm = nn.Identity()
        elif not isinstance(getattr(self, 'fc_norm', None), LayerNorm):
            self.fc_norm = LayerNorm(self.embed_dim, eps=1e-6, **dd)
        self.fc_norm.train(self.training)
        return super()._build_head(num_classes, **dd)

    @staticmethod
    def _init_head(head: nn.Linear) -> None:
        head.reset_parameters()

    def _init_block(self, block: nn.Module) -> None:
        block.mixer.out_proj.reset_parameters()

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as published."""
        super().init_weights(needs_reset)
        nn.init.kaiming_normal_(self.patch_embed.proj.weight, mode='fan_in', nonlinearity='linear')
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)

    def _block_inputs(self, i: int, x: Tensor, context: TokenPaths) -> tuple[Tensor, TokenPaths, nn.Module]:
        length, device = x.shape[1], x.device
        if self.paths == 'forward_reverse':
            context = make_paths((None,), (0, 0), (False, True), length, device)
        elif self.paths == 'forward_reverse_shuffle':
            order = self.path_order(i, length, device)
            context = make_paths((None, order), (0, 0, 1), (False, True, False), length, device)
        return *super()._block_inputs(i, x, context), self.pre_norm

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens [B, L, D] -> [B, D] by `pool_type`, or by the model's own pooling."""
        pooled = super().pool(x, pool_type)
        pool_type = self.global_pool if pool_type is None else pool_type
        return self.fc_norm(pooled) if pool_type == 'avg' else pooled


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: RSMamba) -> dict[str, Tensor]:
    """Fit a published checkpoint, or one of ours, to `model`.

    A position embedding with another number of rows than the model's is taken for a square grid and resized.
    """
    if 'patch_embed.projection.weight' in state_dict:
        state_dict = {_our_key(key): value for key, value in state_dict.items()}
    if not isinstance(model.fc_norm, LayerNorm):
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith('fc_norm.')}
    if 'pos_embed' in state_dict:
        state_dict = {**state_dict, 'pos_embed': fit_pos_embed(state_dict['pos_embed'], model)}
    return state_dict


def _our_key(key: str) -> str:
    module, _, rest = key.partition('.')
    if module in ('layers', 'gate_layers'):
        layer, _, name = rest.partition('.')
        name = name if module == 'layers' else f'gate.{name.removeprefix("0.")}'
        return f'layers.{layer}.mixer.{name}'
    module = {'ln1': 'norm_f', 'ln2': 'fc_norm'}.get(module, module)
    return f'{module}.{rest}'.rstrip('.').replace('projection', 'proj')


def _cfg(dataset: str, file: str = '') -> dict[str, Any]:
    mean, std, classes = _DATASETS[dataset]
    labels = tuple(classes.split())
    return isotropic_cfg(
        url=f'https://huggingface.co/KyanChen/RSMamba/resolve/main/{file}' if file else '',
        num_classes=len(labels),
        label_names=labels,
        fixed_input_size=True,
        mean=tuple(round(value / 255, 6) for value in mean),
        std=tuple(round(value / 255, 6) for value in std),
        paper_name='RSMamba: Remote Sensing Image Classification with State Space Model',
        paper_ids='arXiv:2403.19654',
        origin_url='https://github.com/KyanChen/RSMamba',
        license='apache-2.0',
    )


default_cfgs = generate_default_cfgs(
    {
        'rsmamba_small.untrained': _cfg('nwpu'),
        **{
            f'rsmamba_{size}.{dataset}': _cfg(dataset, f'RSMamba-{size[0]}_{dataset.upper()}.pth')
            for size in ('base', 'large', 'huge')
            for dataset in _DATASETS
        },
    }
)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> RSMamba:
    return build_isotropic(RSMamba, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def rsmamba_small(pretrained: bool = False, **kwargs: Any) -> RSMamba:
    """RSMamba-S: 4.3M params; never trained by the authors."""
    model_args = {'embed_dim': 192, 'depth': 16}
    return _create('rsmamba_small', pretrained, **dict(model_args, **kwargs))


@register_model
def rsmamba_base(pretrained: bool = False, **kwargs: Any) -> RSMamba:
    """RSMamba-B: 6.4M params; F1 93.88 on UC Merced, 91.66 on AID, 94.84 on NWPU-RESISC45."""
    model_args = {'embed_dim': 192, 'depth': 24}
    return _create('rsmamba_base', pretrained, **dict(model_args, **kwargs))


@register_model
def rsmamba_large(pretrained: bool = False, **kwargs: Any) -> RSMamba:
    """RSMamba-L: 16.2M params; F1 94.74 on UC Merced, 91.90 on AID, 95.02 on NWPU-RESISC45."""
    model_args = {'embed_dim': 256, 'depth': 36}
    return _create('rsmamba_large', pretrained, **dict(model_args, **kwargs))


@register_model
def rsmamba_huge(pretrained: bool = False, **kwargs: Any) -> RSMamba:
    """RSMamba-H: 33.1M params; F1 95.25 on UC Merced, 92.63 on AID, 95.18 on NWPU-RESISC45."""
    model_args = {'embed_dim': 320, 'depth': 48}
    return _create('rsmamba_huge', pretrained, **dict(model_args, **kwargs))
