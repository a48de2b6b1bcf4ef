"""Optimisers whose parameters are grouped as timm groups them, and mixed precision on any device."""

import logging
from collections.abc import Iterable, Iterator, Sequence

import torch
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from timm.optim import create_optimizer_v2
from torch import nn

from .layer_depth import layer_depths


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class VMZooOptimWrapperConstructor:
    """Groups the parameters of any mm model by learning rate and weight decay, and builds the optimiser.

    One-dimensional parameters (norms, biases) and those that a backbone lists in `no_weight_decay()` (A_log, D, dt
    bias, position embeddings) are not decayed. `optimizer.type` is a class of the mm registries ('AdamW', 'SGD') or one
    of timm's names ('adamw', 'lamb', 'muon'), with that library's defaults.

    Args:
        optim_wrapper_cfg: Config of the wrapper with the optimiser's config under `optimizer`.
        paramwise_cfg: May hold

            * `layer_decay_rate`: the learning rate of a backbone's layer is this factor times that of the next; the
              last one's is this factor times that of the heads. Layers are those of the timm model's `group_matcher`.
            * `custom_keys`: `{part of a parameter's name: dict(lr_mult=..., decay_mult=...)}`; the longest key counts.
              A `decay_mult` also holds for parameters that are not decayed otherwise.

    Raises:
        ValueError: A setting that does not exist, no learning rate, or a `layer_decay_rate` for a model without a
            backbone that states its layers.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        self.wrapper = dict(optim_wrapper_cfg)
        self.optimizer = dict(self.wrapper.pop('optimizer'))
        if self.optimizer.get('lr') is None:
            raise ValueError(f'the optimizer needs a learning rate: {self.optimizer} has no lr')
        self.optimizer.setdefault('weight_decay', 0.0)
        paramwise_cfg = dict(paramwise_cfg or {})
        self.layer_decay_rate = paramwise_cfg.pop('layer_decay_rate', None)
        self.custom_keys = dict(paramwise_cfg.pop('custom_keys', {}))
        _check_settings('paramwise_cfg', paramwise_cfg, ('layer_decay_rate', 'custom_keys'))
        for key, settings in self.custom_keys.items():
            unknown = {name: value for name, value in settings.items() if name not in ('lr_mult', 'decay_mult')}
            _check_settings(f'custom_keys[{key!r}]', unknown, ('lr_mult', 'decay_mult'))

    def __call__(self, model: nn.Module) -> OptimWrapper:
        groups = self.param_groups(model.module if is_model_wrapper(model) else model)
        kind, options = self.optimizer['type'], {k: v for k, v in self.optimizer.items() if k != 'type'}
        with OPTIMIZERS.switch_scope_and_registry(None) as registry:  # that of the config's default_scope
            if isinstance(kind, str) and registry.get(kind) is None:
                optimizer = create_optimizer_v2(groups, opt=kind, **options)
            else:
                optimizer = registry.build(dict(self.optimizer, params=groups))
        self.wrapper.setdefault('type', 'OptimWrapper')
        return OPTIM_WRAPPERS.build(self.wrapper, default_args=dict(optimizer=optimizer))

    def param_groups(self, model: nn.Module) -> list[dict]:
        """Groups of the trained parameters, one for each pair of learning rate and weight decay."""
        custom = self._custom_settings([name for name, _ in model.named_parameters()])
        lr_scales, no_decay = self._backbone_settings(model)
        groups = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            default_decay = 0.0 if parameter.ndim <= 1 or name in no_decay else 1.0
            settings = custom.get(name, {})
            lr = self.optimizer['lr'] * lr_scales.get(name, 1.0) * settings.get('lr_mult', 1.0)
            weight_decay = self.optimizer['weight_decay'] * settings.get('decay_mult', default_decay)
            group = groups.setdefault((lr, weight_decay), dict(params=[], lr=lr, weight_decay=weight_decay))
            group['params'].append(parameter)
        return list(groups.values())

    def _custom_settings(self, names: list[str]) -> dict[str, dict]:
        found = {}
        for key in sorted(self.custom_keys, key=len):
            matched = [name for name in names if key in name]
            if not matched:
                print_log(f'custom_keys: no parameter has {key!r} in its name', 'current', logging.WARNING)
            found.update(dict.fromkeys(matched, self.custom_keys[key]))
        return found

    def _backbone_settings(self, model: nn.Module) -> tuple[dict[str, float], set[str]]:
        """Factors of the learning rate, and names of the parameters that are not decayed, of all timm models in it."""
        lr_scales, no_decay = {}, set()
        for prefix, backbone in _timm_models(model):
            if hasattr(backbone, 'no_weight_decay'):
                no_decay |= {f'{prefix}{name}' for name in backbone.no_weight_decay()}
            depths, num_layers = layer_depths(backbone)
            for name, depth in depths.items():
                lr_scales[f'{prefix}{name}'] = (self.layer_decay_rate or 1.0) ** (num_layers - depth)
        if self.layer_decay_rate is not None and not lr_scales:
            raise ValueError(
                f'layer_decay_rate needs a backbone that states its layers, a VMZooBackbone; {type(model).__name__} '
                'has none'
            )
        return lr_scales, no_decay


def _timm_models(module: nn.Module, prefix: str = '') -> Iterator[tuple[str, nn.Module]]:
    """The outermost timm models in a module, each with what stands before the names of its parameters."""
    if hasattr(module, 'group_matcher'):
        yield prefix, module
        return
    for name, child in module.named_children():
        yield from _timm_models(child, f'{prefix}{name}.')


def _check_settings(where: str, unknown: Iterable[str], known: Sequence[str]) -> None:
    for name in unknown:
        raise ValueError(f'{where} has no {name}; there are {" and ".join(known)}')


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(AmpOptimWrapper):
    """`AmpOptimWrapper` that also runs on a CPU, and scales the loss only where float16 needs it.

    Args:
        dtype: 'bfloat16', 'float16', or 'auto': bfloat16 on every device that has it, else float16.
        **kwargs: Arguments of `OptimWrapper`.
    """

    def __init__(self, dtype: str = 'auto', **kwargs) -> None:
        OptimWrapper.__init__(self, **kwargs)  # AmpOptimWrapper's own refuses a CPU
        device = get_device()
        if dtype == 'auto':
            has_bfloat16 = device != 'cuda' or torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = 'bfloat16' if has_bfloat16 else 'float16'
        if device == 'cpu' and dtype != 'bfloat16':
            raise ValueError(f'mixed precision on a CPU is bfloat16, not {dtype}')
        self.cast_dtype = getattr(torch, dtype)
        self.loss_scaler = torch.amp.GradScaler(device, enabled=dtype == 'float16')
        self._scale_update_param = None
