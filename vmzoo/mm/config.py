"""Finding configs, and completing them from the model, the data and the command line."""

import ast
import copy
import inspect
import os
from pathlib import Path

import timm
import torch
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner
from timm.data import resolve_data_config

from .datasets import class_folders
from .inheritance import config_folder
from .names import check_model_name, suggestion


def loaders(cfg: Config) -> list[ConfigDict]:
    """The data loaders of a config; not every config has a test set."""
    names = ('train_dataloader', 'val_dataloader', 'test_dataloader')
    return [cfg[name] for name in names if cfg.get(name)]


def find_config(name: str) -> Path:
    """The file of a config given by its path or, for a shipped one, by its name.

    Raises:
        FileNotFoundError: There is neither; the message lists the shipped names.
    """
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
    known = {*cfg, *inspect.signature(Runner).parameters, 'find_unused_parameters', 'model_wrapper_cfg'}
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
    """Change the length of a training and stretch its learning rate schedule to it.

    Raises:
        ValueError: `epochs` is not positive.
    """
    if epochs < 1:
        raise ValueError(f'--epochs must be at least 1, not {epochs}')
    ratio = epochs / cfg.train_cfg.max_epochs
    for scheduler in cfg.param_scheduler:
        for key in ('begin', 'end', 'T_max'):
            if scheduler.get(key):
                scheduler[key] = max(1, round(scheduler[key] * ratio))
    # A single epoch is all warm-up.
    cfg.param_scheduler = [scheduler for scheduler in cfg.param_scheduler if scheduler.get('begin', 0) < epochs]
    cfg.train_cfg.max_epochs = epochs


def complete(cfg: Config) -> Config:
    """Fill in what a config leaves as None: number of classes, input size, normalisation, interpolation, crop.

    The classes come from the data folder, the rest from the model's `pretrained_cfg`, so that one config serves every
    model and folder, and the config saved in the work folder says all.

    Returns:
        A completed copy.

    Raises:
        FileNotFoundError: The data folder or its class folders are missing.
        ValueError: The model is unknown, or the data folder isn't given.
    """
    cfg = copy.deepcopy(cfg)
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
        loader.num_workers = min(loader.get('num_workers', 0), os.cpu_count())
        loader.pin_memory = torch.cuda.is_available()
        if 'root' in dataset and not dataset.root:
            raise ValueError('name the data folder: --data DIR, which holds train/<class>/*.jpg and val/<class>/*.jpg')
        if dataset.get('input_size') is None:
            dataset.input_size = (in_chans, *data['input_size'][1:])
        if 'root' in dataset:
            dataset.setdefault('interpolation', data['interpolation'])
            dataset.setdefault('crop_pct', data['crop_pct'])
    if model.get('num_classes') is None:
        model.num_classes = len(class_folders(cfg.train_dataloader.dataset.root))
    return cfg
