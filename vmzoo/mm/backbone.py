"""Any backbone of the zoo as a backbone of mmseg, mmdet and mmpretrain."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import timm
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vmzoo.layers import LayerNorm
from vmzoo.models._builder import load_published
from vmzoo.models._registry import family_of
from vmzoo.models.efficientvim import CLASSIFIER_PARAMETERS
from vmzoo.weights import CheckpointMismatch, LoadReport, published_weights, read_checkpoint
from vmzoo.weights.convert import PREFIXES, convert

from .layer_depth import layer_depths
from .names import check_model_name


@MODELS.register_module()
class VMZooBackbone(BaseModule):
    """A model of `timm.create_model` that returns feature maps: every family of the zoo, and others with such features.

    It is registered in mmengine's root registry, so that the name resolves in every library's scope. What the chosen
    maps don't need is left out of the model: no parameter stays without a gradient, and distributed training needs no
    `find_unused_parameters`. The model lies in `model`; weights under the published names, without that prefix, load
    too, so that `load_from` takes the files of published detectors and segmentors.

    Args:
        model_name: A name of `vmzoo list`.
        pretrained: True for the published weights, or a checkpoint: its path, its address, or the name of a published
            one ('vmamba_tiny_s1l8.in1k'). They load at once, strictly, and the log says what was not taken.
        out_indices: Maps to return, in increasing order, counted from 0 or, if negative, from the end. They are stages,
            or blocks of a model of one resolution. None: all stages, or four blocks at equal distances.
        frozen_stages: The last stage (or block) that is not trained, counted from 1; 0 freezes the stem alone, -1
            nothing. The norms of the outputs are always trained.
        out_norms: Whether every map is normed by a LayerNorm of its own, `outnorm{i}`; None: as the family's published
            dense backbone does.
        norm_eval: Keep BatchNorms in evaluation mode while training.
        with_cp: Recompute blocks in the backward pass instead of storing activations.
        drop_path_rate: Stochastic depth; None for the model's own default.
        in_channels: Channels of the image.
        init_cfg: `dict(type='Pretrained', checkpoint=FILE)` is as `pretrained=FILE`, but loads in `init_weights()`,
            where the other parts of an mm model load.
        **kwargs: Further arguments of `timm.create_model`: `img_size`, `dynamic_img_size`, ... Models with a position
            embedding take images of every size (`dynamic_img_size=True`) unless told otherwise.

    Raises:
        ValueError: An unknown model, maps or stages that it does not have, norms that it already has, or an `init_cfg`
            other than 'Pretrained'.
        CheckpointError: The weights cannot be downloaded or read.
        CheckpointMismatch: They are of another architecture; the message lists the keys.
    """

    def __init__(
        self,
        model_name: str,
        pretrained: bool | str = False,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        out_norms: bool | None = None,
        norm_eval: bool = False,
        with_cp: bool = False,
        drop_path_rate: float | None = None,
        in_channels: int = 3,
        init_cfg: dict | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        check_model_name(model_name)
        self.checkpoint = _checkpoint_of(init_cfg)
        self.model_name = model_name
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self._create_kwargs = dict(kwargs, num_classes=0, in_chans=in_channels)
        if drop_path_rate is not None:
            self._create_kwargs['drop_path_rate'] = drop_path_rate
        if family_of(model_name) and get_pretrained_cfg(model_name).fixed_input_size:
            self._create_kwargs.setdefault('dynamic_img_size', True)
        self._build(pretrained is True, out_indices, out_norms)
        self.model.set_grad_checkpointing(with_cp)
        self._freeze()
        self.register_load_state_dict_pre_hook(_accept_published_names)
        if isinstance(pretrained, str):
            self._load(pretrained)
        elif pretrained:
            _log(self, 'published weights: loaded', self._norm_keys())

    def _create(self, **kwargs: Any) -> nn.Module:
        return timm.create_model(self.model_name, **self._create_kwargs, **kwargs)

    def _build(self, pretrained: bool, out_indices: Sequence[int] | None, out_norms: bool | None) -> None:
        chosen = {} if out_indices is None else {'out_indices': self._check_indices(out_indices)}
        features = self._create(pretrained=pretrained, features_only=True, feature_cls='getter', **chosen)
        self.model = features.model
        self.out_indices = tuple(features.out_indices)
        self.feature_info = features.feature_info
        self.out_channels = tuple(features.feature_info.channels())
        self.reductions = tuple(features.feature_info.reduction())
        out_norms = getattr(self.model, 'out_norms', False) if out_norms is None else out_norms
        self._out_norms = [f'outnorm{i}' for i in self.out_indices] if out_norms else []
        self._add_out_norms(self.model)
        for name in CLASSIFIER_PARAMETERS:
            if hasattr(self.model, name):
                getattr(self.model, name).requires_grad_(False)

    def _check_indices(self, out_indices: Sequence[int]) -> tuple[int, ...]:
        info = self._create(device='meta').feature_info
        indices = [i + len(info) if i < 0 else i for i in out_indices]
        if not indices or sorted(set(indices)) != indices or not 0 <= indices[0] <= indices[-1] < len(info):
            levels = ', '.join(
                f'{i} ({level["num_chs"]} channels, stride {level["reduction"]})' for i, level in enumerate(info)
            )
            raise ValueError(
                f'out_indices {tuple(out_indices)} of {self.model_name}: give some of its maps in increasing order. '
                f'They are {levels}.'
            )
        return tuple(indices)

    def _add_out_norms(self, model: nn.Module) -> None:
        device = next(model.parameters()).device
        for name, channels in zip(self._out_norms, self.out_channels):
            if hasattr(model, name):
                raise ValueError(f'{self.model_name} has norms on its outputs already; leave out out_norms.')
            model.add_module(name, LayerNorm(channels, device=device))

    def _norm_keys(self) -> list[str]:
        return [key for key in self.model.state_dict() if key.partition('.')[0] in self._out_norms]

    def _freeze(self) -> None:
        depths, num_layers = layer_depths(self.model, coarse=True)
        if not -1 <= self.frozen_stages < num_layers:
            raise ValueError(
                f'frozen_stages must be from -1 (nothing) to {num_layers - 1} for these maps of {self.model_name}, '
                f'not {self.frozen_stages}.'
            )
        for name, parameter in self.model.named_parameters():
            if depths[name] <= self.frozen_stages:
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> 'VMZooBackbone':
        """As `nn.Module.train`; what is frozen stays in evaluation mode."""
        super().train(mode)
        if not mode:
            return self
        for module in self.model.modules():
            parameters = list(module.parameters())
            frozen = parameters and not any(parameter.requires_grad for parameter in parameters)
            if (self.frozen_stages >= 0 and frozen) or (self.norm_eval and isinstance(module, _BatchNorm)):
                module.eval()
        return self

    def init_weights(self) -> None:
        """Load the checkpoint of `init_cfg`; timm initialised the weights, and mmengine must not do it again."""
        if self.checkpoint is not None and not self.is_init:
            self._load(self.checkpoint)
        self.is_init = True

    def _load(self, source: str) -> None:
        """Load the path, the address or the published name of a checkpoint."""
        source = {weight.name: weight.url for weight in published_weights()}.get(source, source)
        where = {'url': source} if '://' in source else {'file': os.path.expanduser(source)}
        load_published(self, where, load_file=_load_file)

    def fit(self, state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], LoadReport, tuple[str, ...]]:
        """Turn a published checkpoint, of a classifier or of a dense model, into weights of `model`.

        Returns:
            The weights, the report of their conversion, and the norms of the outputs that the checkpoint lacks, which
            keep their values.

        Raises:
            CheckpointMismatch: Keys are missing or left over, or shapes differ.
        """
        whole = self._create(device='meta')  # the checkpoint may hold what these maps do not need
        self._add_out_norms(whole)
        whole.pretrained_cfg = self.model.pretrained_cfg
        own = self.model.state_dict()
        norms = set(self._norm_keys())
        found, report = convert(state_dict, whole, optional=norms | (whole.state_dict().keys() - own.keys()))
        weights = {key: found[key] for key in own if key in found and not found[key].is_meta}
        return own | weights, report, tuple(key for key in self._norm_keys() if key not in weights)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image [B, in_channels, H, W] -> a map [B, C, h, w] for each of `out_indices`."""
        maps = self.model.forward_intermediates(
            x, indices=list(self.out_indices), stop_early=True, output_fmt='NCHW', intermediates_only=True
        )
        if self._out_norms:
            norms = [self.model.get_submodule(name) for name in self._out_norms]
            maps = [norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous() for norm, y in zip(norms, maps)]
        return tuple(maps)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter, for mmpretrain's layer-wise learning rates.

        Args:
            param_name: Its name in the whole model.
            prefix: What stands before this backbone's own names there, `backbone.`.

        Returns:
            Its depth, 0 for the stem, and the number of depths, of which the last is that of the heads.
        """
        depths, num_layers = layer_depths(self.model)
        name = param_name.removeprefix(prefix).removeprefix('model.')
        return (depths.get(name, num_layers) if param_name.startswith(prefix) else num_layers), num_layers + 1


def _checkpoint_of(init_cfg: dict | Sequence[dict] | None) -> str | None:
    cfgs = [init_cfg] if isinstance(init_cfg, Mapping) else list(init_cfg or ())
    for cfg in cfgs:
        kind = cfg.get('type')
        if getattr(kind, '__name__', kind) not in ('Pretrained', 'PretrainedInit'):
            raise ValueError(
                f"init_cfg of VMZooBackbone can be dict(type='Pretrained', checkpoint=FILE), not {cfg}: "
                'the models initialise themselves.'
            )
        prefix = cfg.get('prefix')
        if prefix and f'{prefix.rstrip(".")}.' not in PREFIXES:
            raise ValueError(
                f'init_cfg of VMZooBackbone: weights under {prefix!r} are not looked for; leave out prefix.'
            )
    return cfgs[-1]['checkpoint'] if cfgs else None


def _load_file(backbone: VMZooBackbone, path: str) -> None:
    try:
        weights, report, initial = backbone.fit(read_checkpoint(path))
    except CheckpointMismatch as error:
        raise CheckpointMismatch(f'{path}: {error}') from None
    backbone.model.load_state_dict(weights)
    _log(backbone, f'{path}: {report}', initial)


def _log(backbone: VMZooBackbone, loaded: str, initial: Sequence[str]) -> None:
    norms = f'; not among them and kept as initialised: {", ".join(initial)}' if initial else ''
    print_log(f'{backbone.model_name}: {loaded}{norms}', 'current')


def _accept_published_names(backbone: VMZooBackbone, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before loading, convert what lies beside `model`; a state dict of this class stays as it is."""
    keys = [key for key in state_dict if key.startswith(prefix)]
    if not keys or any(key.startswith(f'{prefix}model.') for key in keys):
        return
    weights, _, _ = backbone.fit({key.removeprefix(prefix): state_dict.pop(key) for key in keys})
    state_dict.update((f'{prefix}model.{key}', value) for key, value in weights.items())
