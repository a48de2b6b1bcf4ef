"""Finding configs, and completing them from the model, the data and the command line.

A config may be of any library of the mm family, in the old style or the new; what `complete` fills in of the model is
for the configs of classification, whose model is a `VMZooClassifier`.
"""

import ast
import copy
import inspect
import os
from pathlib import Path

import timm
import torch
from mmengine.config import Config, ConfigDict
from mmengine.runner import FlexibleRunner, Runner
from timm.data import resolve_data_config

from .datasets import class_folders
from .inheritance import config_folder, find_base
from .names import check_model_name, suggestion


def loaders(cfg: Config) -> list[ConfigDict]:
    """The data loaders of a config; not every config has a test set."""
    names = ('train_dataloader', 'val_dataloader', 'test_dataloader')
    return [cfg[name] for name in names if cfg.get(name)]


def type_name(cfg: dict) -> str:
    """Name of the class that a config builds; configs in the new style hold the class itself."""
    kind = cfg.get('type', '')
    return kind if isinstance(kind, str) else kind.__name__


def is_classifier(cfg: Config) -> bool:
    """Whether the config trains a `VMZooClassifier`."""
    return type_name(cfg.model) == 'VMZooClassifier'


def add_hook(cfg: Config, **hook) -> None:
    """Add a hook that the config does not have yet."""
    hooks = cfg.get('custom_hooks') or []
    if hook['type'] not in map(type_name, hooks):
        cfg.custom_hooks = [*hooks, hook]


def add_training_parts(cfg: Config) -> None:
    """Give every config what any training needs: reproducible steps, a stop at NaN, progress, logs for TensorBoard."""
    for hook in ('StepSeedHook', 'NonFiniteLossHook', 'ProgressHook'):
        add_hook(cfg, type=hook)
    cfg.default_hooks = cfg.get('default_hooks') or {}
    cfg.randomness = dict(cfg.get('randomness') or {})
    if cfg.randomness.get('seed') is None:  # a random one could not be resumed
        cfg.randomness.seed = 0
    cfg.env_cfg = cfg.get('env_cfg') or dict(dist_cfg=dict(backend='nccl'))
    cfg.visualizer = cfg.get('visualizer') or dict(type='Visualizer')
    backends = cfg.visualizer.get('vis_backends') or [dict(type='LocalVisBackend')]
    if 'TensorboardVisBackend' not in map(type_name, backends):
        backends = [*backends, dict(type='TensorboardVisBackend')]
    cfg.visualizer.vis_backends = backends
    for loader in loaders(cfg):
        loader.num_workers = min(loader.get('num_workers', 0), os.cpu_count())
        loader.persistent_workers = bool(loader.num_workers and loader.get('persistent_workers', False))
        loader.pin_memory = loader.get('pin_memory', torch.cuda.is_available())
    if type_name(cfg.get('strategy') or {}) == 'DeepSpeedStrategy':  # which only its own checkpoints can resume
        cfg.custom_hooks = [hook for hook in cfg.custom_hooks if type_name(hook) != 'BestAndLastHook']
        cfg.default_hooks.checkpoint = cfg.default_hooks.get('checkpoint') or dict(type='CheckpointHook')
        cfg.optim_wrapper.update(type='DeepSpeedOptimWrapper')
        clip_grad = cfg.optim_wrapper.pop('clip_grad', None) or {}
        if clip_grad.get('max_norm'):
            cfg.strategy.setdefault('gradient_clipping', clip_grad['max_norm'])


PICTURE_HOOKS = {'mmseg': 'SegVisualizationHook', 'mmdet': 'DetVisualizationHook', 'mmpretrain': 'VisualizationHook'}


def draw_predictions(cfg: Config) -> None:
    """Draw predictions while validating and testing, with the library's own hook, for the work folder and TensorBoard.

    Raises:
        ValueError: The config is of no library that has such a hook.
    """
    scope = cfg.get('default_scope')
    if scope not in PICTURE_HOOKS:
        raise ValueError(f'--pictures goes with configs of {", ".join(PICTURE_HOOKS)}; this one is of {scope}')
    hook = cfg.default_hooks.get('visualization') or dict(type=PICTURE_HOOKS[scope], interval=50)
    flag = 'enable' if scope == 'mmpretrain' else 'draw'
    cfg.default_hooks.visualization = dict(hook, **{flag: True})


def move_data(cfg: Config, root: str) -> None:
    """Read the data of a config from another folder: every path that begins with its datasets' `data_root` moves.

    Raises:
        ValueError: The datasets have no data_root, or several.
    """

    def roots(value) -> set[str]:
        if isinstance(value, dict):
            own = {value['data_root'].rstrip('/')} if value.get('data_root') else set()
            return own.union(*map(roots, value.values()))
        return set().union(*map(roots, value)) if isinstance(value, (list, tuple)) else set()

    found = roots(loaders(cfg))
    if len(found) != 1:
        raise ValueError(f'--data replaces the data_root of the datasets, of which this config has {len(found)}')
    old = found.pop()

    def moved(value):
        if isinstance(value, dict):
            for key in value:
                value[key] = moved(value[key])
        elif isinstance(value, (list, tuple)):
            return type(value)(map(moved, value))
        elif isinstance(value, str) and f'{value}/'.startswith(f'{old}/'):
            return root + value[len(old) :]
        return value

    moved(cfg._cfg_dict)


def find_config(name: str) -> Path:
    """The file of a config given by its path, by its name if it is shipped, or as `library::path`.

    Raises:
        FileNotFoundError: There is none; the message lists the shipped names.
        ImportError: The library is not installed.
    """
    if '::' in name:
        return Path(find_base(name, 'command line')[0])
    if Path(name).is_file():
        return Path(name)
    shipped = {p.stem: p for p in sorted(config_folder().rglob('*.py')) if '_base_' not in p.parts}
    if Path(name).stem in shipped and Path(name).parent == Path():
        return shipped[Path(name).stem]
    raise FileNotFoundError(f'there is no config {name}; give a file, or one of: {", ".join(shipped)}')


def parse_options(pairs: list[str], cfg: Config) -> dict:
    """Read `key.subkey=value` pairs; values are Python literals, or else strings.

    Raises:
        ValueError: A pair has no equals sign, or changes what neither the config nor mmengine's Runner knows.
    """
    runners = {*inspect.signature(Runner).parameters, *inspect.signature(FlexibleRunner).parameters}
    known = {*cfg, *runners, 'find_unused_parameters', 'model_wrapper_cfg'}
    options = {}
    for pair in pairs:
        key, sign, value = pair.partition('=')
        if not (key and sign):
            raise ValueError(f'--cfg-options takes key=value pairs, not {pair!r}')
        top = key.partition('.')[0]
        if top not in known:
            hint = suggestion(top, known, f'there are {", ".join(sorted(cfg))}')
            raise ValueError(f'--cfg-options {pair}: the config has no {top}; {hint}')
        try:
            options[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            options[key] = value
    return options


def set_epochs(cfg: Config, epochs: int) -> None:
    """Change the length of a training and stretch its learning rate schedule to it; a warm-up by iterations stays.

    Raises:
        ValueError: `epochs` is not positive, or the training counts iterations.
    """
    if epochs < 1:
        raise ValueError(f'--epochs must be at least 1, not {epochs}')
    if not cfg.train_cfg.get('max_epochs'):
        raise ValueError('this training counts iterations: --cfg-options train_cfg.max_iters=N, and its schedule')
    ratio = epochs / cfg.train_cfg.max_epochs
    schedulers = cfg.get('param_scheduler') or []
    schedulers = [schedulers] if isinstance(schedulers, dict) else schedulers

    def stretched(value: int) -> int:
        return max(1, round(value * ratio)) if value else value

    for scheduler in schedulers:
        if scheduler.get('by_epoch', True):
            scheduler.update({key: stretched(scheduler[key]) for key in ('begin', 'end', 'T_max') if key in scheduler})
            if 'milestones' in scheduler:
                scheduler.milestones = [stretched(value) for value in scheduler.milestones]
    # A single epoch is all warm-up.
    cfg.param_scheduler = [s for s in schedulers if not s.get('by_epoch', True) or s.get('begin', 0) < epochs]
    cfg.train_cfg.max_epochs = epochs


def complete(cfg: Config) -> Config:
    """Fill in what a config leaves open, so that the config saved in the work folder says all.

    Returns:
        A completed copy.

    Raises:
        FileNotFoundError: The data folder or its class folders are missing.
        ValueError: The model is unknown, or the data folder isn't given.
    """
    cfg = copy.deepcopy(cfg)
    add_training_parts(cfg)
    if is_classifier(cfg):
        complete_classifier(cfg)
    return cfg


def complete_classifier(cfg: Config) -> None:
    """Fill in number of classes, input size, normalisation, interpolation and crop where the config has None.

    The classes come from the data folder, the rest from the model's `pretrained_cfg`: one config serves every model
    and folder.
    """
    model = cfg.model
    if not model.model_name:
        raise ValueError('name the model to train: --model NAME (vmzoo list shows the names)')
    check_model_name(model.model_name)
    pretrained_cfg = timm.get_pretrained_cfg(model.model_name)
    in_chans = model.setdefault('in_chans', 3)
    data = resolve_data_config(dict(in_chans=in_chans), pretrained_cfg.to_dict() if pretrained_cfg else {})
    for key in ('mean', 'std'):
        if model.data_preprocessor.get(key) is None:
            values = data[key]
            average = (sum(values) / len(values),)
            model.data_preprocessor[key] = values if len(values) == in_chans else average * in_chans
    for loader in loaders(cfg):
        dataset = loader.dataset
        if 'root' in dataset and not dataset.root:
            raise ValueError('name the data folder: --data DIR, which holds train/<class>/*.jpg and val/<class>/*.jpg')
        if dataset.get('input_size') is None:
            dataset.input_size = (in_chans, *data['input_size'][1:])
        if 'root' in dataset:
            dataset.setdefault('interpolation', data['interpolation'])
            dataset.setdefault('crop_pct', data['crop_pct'])
    if model.get('num_classes') is None:
        model.num_classes = len(class_folders(cfg.train_dataloader.dataset.root))
