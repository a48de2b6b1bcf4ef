"""Fits a checkpoint to a model, strictly: every key and shape must agree, except where a report says so."""

import logging
import os
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import adapt_input_conv, get_pretrained_cfg, model_entrypoint
from torch import Tensor, nn

from vmzoo.models._registry import family_module, list_architectures

from .errors import CheckpointMismatch
from .read import read_checkpoint

_logger = logging.getLogger(__name__)

# Where publishers put the weights. `model` comes first: it is what the stated accuracies were measured with; files that
# hold only averaged weights have them under one of the last names. A family whose files hold both, and whose accuracies
# are those of another one, names it in its file as PREFERRED_WRAPPER.
WRAPPERS = (
    'model',
    'state_dict',
    'model_state_dict',
    'model_ema',
    'state_dict_ema',
    'ema_state_dict',
    'net',
    'network_weights',  # nnU-Net's
)
# Modules that training wraps around the backbone: DDP, torch.compile, trainers, segmentors and detectors.
PREFIXES = ('module.', '_orig_mod.', 'model.', 'backbone.')
MMPRETRAIN_HEAD = 'head.fc.'  # its classifier stands beside the backbone
SHOWN = 5


@dataclass(frozen=True)
class LoadReport:
    """What was not loaded as it stood.

    Attributes:
        source: Path of wrappers under which the weights were found, `model` or `state_dict.backbone`; empty if bare.
        head: The classifier, if the class counts differ: `classifier.head: 1000 → 10 classes, kept as initialised`.
        stem: The first convolution, if the input channels differ: `patch_embed.0: 3 → 1 channels, adapted`.
        ignored: Keys beside the backbone (decode heads, a classifier that the model does not have).
    """

    source: str = ''
    head: str = ''
    stem: str = ''
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        ignored = f'{len(self.ignored)} keys not used ({_some(self.ignored)})' if self.ignored else ''
        return '; '.join(filter(None, (self.head, self.stem, ignored))) or 'every key loaded'


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> LoadReport:
    """Reads a published or own checkpoint and loads it strictly.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is not readable.
        CheckpointMismatch: Its weights are of another architecture.
    """
    try:
        state_dict, report = convert(read_checkpoint(path), model)
    except CheckpointMismatch as error:
        raise CheckpointMismatch(f'{path}: {error}') from None
    model.load_state_dict(state_dict)
    return report


def convert_state_dict(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Turns a checkpoint of the model's family, in any published form, into one that `model` loads strictly.

    It is taken out of its wrapper (`model` before `state_dict` before `model_ema`, unless the family's stated
    accuracies are those of its averaged weights) and prefixes (`module.`, `backbone.`), and its keys are mapped to
    ours. Two parts may differ, and a warning names them: a classifier for another number of classes keeps the model's
    own weights, a stem for other input channels is adapted as timm does.

    Args:
        state_dict: What `read_checkpoint` or `torch.load` returned.
        model: The model that is to load it.

    Returns:
        A state dict for `model.load_state_dict(...)`.

    Raises:
        CheckpointMismatch: Keys are missing or left over, or shapes differ; the message lists them.
    """
    return convert(state_dict, model)[0]


def convert(
    state_dict: Mapping[str, Any], model: nn.Module, optional: Collection[str] = ()
) -> tuple[dict[str, Tensor], LoadReport]:
    """Does what `convert_state_dict` does, and returns the report beside the weights.

    Args:
        state_dict: What `read_checkpoint` or `torch.load` returned.
        model: The model that it is for.
        optional: Keys of the model that the checkpoint may lack; those it lacks are not in the result.
    """
    target = model.state_dict()
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    classifiers = _names(cfg.get('classifier'))
    wrappers = (*_of_family(model, 'PREFERRED_WRAPPER'), *WRAPPERS)
    weights, source, ignored = _unwrap(state_dict, target, wrappers, classifiers)
    if not weights:
        raise CheckpointMismatch(f'no weights in it (its keys: {_some(map(str, state_dict))})')
    weights = _map_keys(weights, model)

    head, dropped = _match_head(weights, target, classifiers)
    stem = _match_stem(weights, target, _names(cfg.get('first_conv')))
    wanted = {key: value for key, value in target.items() if key in weights or key not in optional}
    _check(weights, wanted, model)
    report = LoadReport(source, head, stem, ignored + dropped)
    for message in filter(None, (head, stem)):
        _logger.warning('Checkpoint and model differ in %s', message)
    if report.ignored:
        _logger.info('Keys not used: %s', ', '.join(report.ignored))
    return weights, report


def _of_family(model: nn.Module, name: str) -> list[Any]:
    """What the files of the model's family (or timm's, for other models) call `name`, the class's own file first."""
    defining = dict.fromkeys(cls.__module__ for cls in type(model).__mro__)
    files = (family_module(module) or sys.modules.get(module) for module in defining)
    return [getattr(file, name) for file in files if hasattr(file, name)]


def _unwrap(
    state_dict: Mapping[str, Any], target: dict[str, Tensor], wrappers: Sequence[str], classifiers: Sequence[str]
) -> tuple[dict[str, Tensor], str, tuple[str, ...]]:
    path = []
    while name := next((w for w in wrappers if isinstance(state_dict.get(w), Mapping) and state_dict[w]), None):
        state_dict = state_dict[name]
        path.append(name)
    weights = {str(key): value for key, value in state_dict.items() if isinstance(value, Tensor)}
    ignored: list[str] = []
    stripping = True
    while stripping:
        stripping = False
        for prefix in PREFIXES:
            inside = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
            if inside and not any(key.startswith(prefix) for key in target):
                beside = {key: value for key, value in weights.items() if not key.startswith(prefix)}
                names = {key: _own_head(key, classifiers) for key in beside}
                own = {names[key]: value for key, value in beside.items() if names[key] in target}
                ignored += [key for key in beside if names[key] not in target]
                weights, stripping = own | inside, True
                path.append(prefix.rstrip('.'))
    return weights, '.'.join(path), tuple(ignored)


def _own_head(key: str, classifiers: Sequence[str]) -> str:
    """The model's name for a key beside its backbone."""
    if len(classifiers) == 1 and key.startswith(MMPRETRAIN_HEAD):
        return f'{classifiers[0]}.{key.removeprefix(MMPRETRAIN_HEAD)}'
    return key


def _map_keys(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Applies the `checkpoint_filter_fn` of the model's family."""
    filter_fn = next(iter(_of_family(model, 'checkpoint_filter_fn')), None)
    if filter_fn is None:
        return weights
    try:
        return dict(filter_fn(weights, model))
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        # Filters assume their own family's keys and shapes; on another's they stumble in ways of their own.
        raise CheckpointMismatch(
            f'the keys are not those of {_describe(model)}: {_some(weights)} ({type(error).__name__}: {error})'
        ) from error


def _names(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _match_head(
    weights: dict[str, Tensor], target: dict[str, Tensor], classifiers: tuple[str, ...]
) -> tuple[str, tuple[str, ...]]:
    notes, dropped = [], []
    for name in classifiers:
        keys = [f'{name}.{kind}' for kind in ('weight', 'bias') if f'{name}.{kind}' in weights]
        if not any(f'{name}.{kind}' in target for kind in ('weight', 'bias')):
            dropped += keys
            for key in keys:
                del weights[key]
        elif all(key in target for key in keys) and any(
            weights[key].shape[0] != target[key].shape[0] and weights[key].shape[1:] == target[key].shape[1:]
            for key in keys
        ):
            notes.append(
                f'{name}: {len(weights[keys[0]])} → {len(target[keys[0]])} classes, kept as initialised in the model'
            )
            weights.update((key, target[key]) for key in keys)
    return ', '.join(notes), tuple(dropped)


def _match_stem(weights: dict[str, Tensor], target: dict[str, Tensor], stems: tuple[str, ...]) -> str:
    notes = []
    for name in stems:
        key = f'{name}.weight'
        if key not in weights or key not in target or not weights[key].ndim == target[key].ndim in (4, 5):
            continue
        (out, given, *kernel), (wanted_out, wanted, *wanted_kernel) = weights[key].shape, target[key].shape
        if given != wanted and (out, kernel) == (wanted_out, wanted_kernel):
            flat = weights[key].flatten(2).unsqueeze(-1)  # of volumes too
            weights[key] = adapt_input_conv(wanted, flat, base_chans=given).reshape(target[key].shape)
            notes.append(f'{name}: {given} → {wanted} input channels, adapted')
    return ', '.join(notes)


def differences(weights: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    """Says which keys of a model's state dict are missing, unexpected or of another shape; nothing if all fit."""
    shapes = [
        f'{key}: {tuple(weights[key].shape)} in the checkpoint, {tuple(target[key].shape)} in the model'
        for key in target
        if key in weights and weights[key].shape != target[key].shape
    ]
    return [
        f'{title} ({len(keys)}): {_some(keys, separator)}'
        for title, keys, separator in (
            ('missing keys', [key for key in target if key not in weights], ', '),
            ('unexpected keys', [key for key in weights if key not in target], ', '),
            ('shapes differ', shapes, '; '),
        )
        if keys
    ]


def _check(weights: dict[str, Tensor], target: dict[str, Tensor], model: nn.Module) -> None:
    problems = differences(weights, target)
    if not problems:
        return
    lines = [f'the checkpoint does not fit {_describe(model)}', *(f'  {problem}' for problem in problems)]
    # Looked for among relatives only: each candidate has to be built, if without memory.
    related = 2 * len(target.keys() & weights.keys()) >= min(len(target), len(weights))
    if related and (fitting := _fitting_architecture(weights, model)):
        lines.append(f'  It fits {fitting}: create that model instead.')
    raise CheckpointMismatch('\n'.join(lines))


def _fitting_architecture(weights: dict[str, Tensor], model: nn.Module) -> str | None:
    """Finds a registered architecture of the same family whose keys and shapes agree exactly, heads aside."""
    for name in list_architectures(type(model).__module__.rpartition('.')[2]):
        cfg = get_pretrained_cfg(name)
        heads = tuple(f'{classifier}.' for classifier in _names(cfg and cfg.classifier))
        with torch.device('meta'):
            candidate = model_entrypoint(name)().state_dict()
        if _shapes(weights, heads) == _shapes(candidate, heads):
            return name
    return None


def _shapes(state: Mapping[str, Tensor], without: tuple[str, ...]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items() if not key.startswith(without)}


def _describe(model: nn.Module) -> str:
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    architecture = cfg.get('architecture')
    return f'{architecture} ({type(model).__name__})' if architecture else type(model).__name__


def _some(keys: Iterable[str], separator: str = ', ') -> str:
    keys = list(keys)
    more = f'{separator}… and {len(keys) - SHOWN} more' if len(keys) > SHOWN else ''
    return separator.join(keys[:SHOWN]) + more
