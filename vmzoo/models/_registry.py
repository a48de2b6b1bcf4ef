"""Which of timm's registered models are the zoo's, and what is known of each without building it.

A family is a file in `vmzoo.models`. Most register their models; those that timm itself has list timm's models in
`timm_cfgs`, by name and tag, each with the entries that timm's cfg lacks. Registering them again would replace timm's.
"""

import functools
import json
import sys
from dataclasses import asdict, dataclass, replace
from importlib import resources
from types import ModuleType
from typing import Any

import torch
from timm.models import create_model, get_pretrained_cfg, is_model, list_models, model_entrypoint
from timm.models._pretrained import PretrainedCfg

from ._macs import count_macs


@dataclass(frozen=True)
class ModelSummary:
    """Facts about an architecture as registered.

    Attributes:
        task: `classification`, `backbone` (feature maps only), or what the model class states as its `task`.
        params: Number of parameters, classifier included.
        gmacs: Billions of multiply-accumulates for one image of `input_size`, as `count_macs` counts them.
        input_size: (C, H, W) of the default cfg.
        channels: Width of each feature map of `features_only=True`; empty for a model that has none.
        reductions: By how much each of them is smaller than the image.
    """

    name: str
    family: str
    task: str
    params: int
    gmacs: float
    input_size: tuple[int, int, int]
    channels: tuple[int, ...]
    reductions: tuple[int, ...]


def list_architectures(family: str | None = None) -> list[str]:
    """Returns the registered names, without tags, of one family (`vmamba`) or of all, in timm's order."""
    return [name for name in list_models() if (own := family_of(name)) and family in (None, own)]


def family_of(name: str) -> str | None:
    """Returns the family of a registered name, which is the name of its file in `vmzoo.models`; None if it has none."""
    if not is_model(name):
        return None
    module = family_module(model_entrypoint(name).__module__)
    if module is None or name not in {tagged.partition('.')[0] for tagged in _timm_cfgs(module) or (name,)}:
        return None
    return module.__name__.rpartition('.')[2]


def family_module(defining: str) -> ModuleType | None:
    """Returns the family's file for the name of a module that defines models: the same, or timm's of the same name."""
    package, _, family = defining.rpartition('.')
    module = sys.modules.get(f'{__package__}.{family}')
    return module if package == __package__ or (package == 'timm.models' and _timm_cfgs(module)) else None


def _timm_cfgs(module: ModuleType | None) -> dict[str, dict[str, Any]]:
    return getattr(module, 'timm_cfgs', {})


def default_cfgs_of(name: str) -> dict[str, PretrainedCfg]:
    """Returns `tag -> PretrainedCfg` of an architecture, the default first; `''` is the tag of an untagged cfg."""
    tags = [tagged.partition('.')[2] for tagged in list_models(f'{name}.*', include_tags=True)]
    default = get_pretrained_cfg(name)
    cfgs = {tag: get_pretrained_cfg(f'{name}.{tag}') for tag in tags} or {'': default}
    more = _timm_cfgs(family_module(model_entrypoint(name).__module__))
    cfgs = {tag: replace(cfg, **more.get(f'{name}.{tag}', {})) for tag, cfg in cfgs.items()}
    return dict(sorted(cfgs.items(), key=lambda item: item[1].tag != default.tag))


def summarize(name: str) -> ModelSummary:
    """Builds the model on the meta device and looks at it."""
    model = create_model(name, device='meta').eval()
    cfg = get_pretrained_cfg(name)
    task = getattr(model, 'task', None) or ('classification' if cfg.num_classes else 'backbone')
    channels, reductions = (), ()
    if getattr(model, 'feature_info', None):
        info = create_model(name, features_only=True, device='meta').feature_info
        channels, reductions = tuple(info.channels()), tuple(info.reduction())
    params = sum(parameter.numel() for parameter in model.parameters())
    gmacs = round(count_macs(model, torch.empty(1, *cfg.input_size, device='meta')) / 1e9, 4)
    return ModelSummary(name, family_of(name), task, params, gmacs, tuple(cfg.input_size), channels, reductions)


@functools.cache
def _recorded() -> dict[str, dict[str, Any]]:
    """`summaries.json`, written by tools/make_model_cards.py, so that listing builds no model."""
    return json.loads(resources.files(__package__).joinpath('summaries.json').read_text(encoding='utf-8'))


def summary_of(name: str) -> ModelSummary:
    """Returns the recorded summary, or a fresh one for a model that was registered since."""
    recorded = _recorded().get(name)
    if recorded is None:
        return summarize(name)
    return ModelSummary(**{key: tuple(value) if isinstance(value, list) else value for key, value in recorded.items()})


def as_record(summary: ModelSummary) -> dict[str, Any]:
    """Returns what `summaries.json` holds of a summary."""
    return asdict(summary)
