"""Checkpoints of a training: written in one step, read without running what is in them, loaded strictly."""

import logging
import os
import pickle
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import print_log
from mmengine.utils import apply_to

from vmzoo.weights import read_checkpoint
from vmzoo.weights.convert import differences


def save_atomically(obj: dict, path: str | os.PathLike) -> None:
    """Write a checkpoint so that a kill at any moment leaves either the old file or the new one, never half of one."""
    path = Path(path)
    # NumPy's values (sizes, scores, palettes) would need unsafe unpickling.
    obj = apply_to(obj, lambda value: isinstance(value, (np.generic, np.ndarray)), lambda value: value.tolist())
    temporary = path.with_name(f'.{path.name}.tmp')
    with open(temporary, 'wb') as file:
        torch.save(obj, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def latest_checkpoint(work_dir: str | os.PathLike) -> Path | None:
    """What a training in this folder goes on from: last.pth, or the newest file of mmengine's CheckpointHook."""
    last, pointer = Path(work_dir) / 'last.pth', Path(work_dir) / 'last_checkpoint'
    if last.exists():
        return last
    if pointer.is_file():
        named = Path(pointer.read_text().strip())
        # The folder may have been moved since.
        return next((path for path in (named, pointer.with_name(named.name)) if path.exists()), None)
    return None


def read_resumable(filename: str | os.PathLike, map_location: str | torch.device = 'cpu') -> dict:
    """Read a file that a training of vmzoo wrote; nothing in it is executed.

    Raises:
        ValueError: The file is damaged, or another program's.
    """
    try:
        checkpoint = torch.load(filename, map_location=map_location, weights_only=True)
        if not {'state_dict', 'optimizer', 'message_hub', 'meta'} <= checkpoint.keys():
            raise ValueError('it holds no optimizer state')
    except (pickle.UnpicklingError, EOFError, RuntimeError, AttributeError, ValueError) as error:
        raise ValueError(
            f'{filename} is not a checkpoint written by vmzoo that a training can go on from: {error}. '
            'To start from its weights: --load-from'
        ) from error
    return checkpoint


def load_weights(model: torch.nn.Module, filename: str | os.PathLike, strict: bool = True) -> None:
    """Load a whole model (backbone, neck and heads) from a published file or one of vmzoo's.

    Args:
        model: The model, not wrapped.
        filename: Checkpoint of this model's config; it is read as data.
        strict: False lets two things differ, and names them: tensors of another shape (heads for other classes) and
            submodules that only one side has (an auxiliary head); both stay as initialised.

    Raises:
        CheckpointError, FileNotFoundError: The file is damaged or missing.
        ValueError: The file belongs to another model.
    """
    checkpoint = read_checkpoint(filename)
    weights, target = checkpoint.get('state_dict', checkpoint), model.state_dict()
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f'{filename} holds no state_dict of a whole model')
    weights = {key.removeprefix('module.'): value for key, value in weights.items()}
    for name, module in model.named_modules():  # a backbone maps published names to its own
        for hook in module._load_state_dict_pre_hooks.values():
            hook(weights, f'{name}.' if name else '', {}, True, [], [], [])
    if not strict:
        weights, notes = _only_what_fits(weights, target)
        if notes:
            print_log(f'not taken from {filename}: {", ".join(notes)}', 'current', logging.WARNING)
    if problems := differences(weights, target):
        raise ValueError(f'{filename} belongs to another model: {"; ".join(problems)}')
    model.load_state_dict(weights)


def _only_what_fits(
    weights: dict[str, torch.Tensor], target: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Replace reshaped tensors and absent submodules by the model's own, and say which; the rest has to fit."""

    def submodules(state: dict) -> set[str]:
        return {key.partition('.')[0] for key in state}

    reshaped = [key for key, value in weights.items() if key in target and value.shape != target[key].shape]
    shared = submodules(weights) & submodules(target)
    taken = {k: v for k, v in weights.items() if k.partition('.')[0] in shared and k not in reshaped}
    own = {k: v for k, v in target.items() if k.partition('.')[0] not in shared or k in reshaped}
    if not taken:
        return weights, []
    return taken | own, reshaped + sorted(submodules(weights) ^ submodules(target))
