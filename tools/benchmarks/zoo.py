"""One table of all families: throughput against timm's models, and against the same model with unfused scans."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

import timm
import torch

from vmzoo.models._registry import default_cfgs_of, list_architectures, summary_of

from .models import make_passes, peak_memory
from .timing import NAN, Row, Setting
from .unfused import unfused_operators

BASELINES = ('swin_tiny_patch4_window7_224', 'convnext_tiny')
FULL_SIZE = 224  # of the images that a batch size is meant for
SMALLEST_SIZE = 192  # of the images that a standard model is made for
# Where a family's smallest published model is not the one that stands for it.
STANDARD = {'vmamba': 'vmamba_tiny_s1l8'}
PHASES = ('infer', 'train')


def standard_models(families: Sequence[str] | None = None) -> list[str]:
    """The smallest standard model of each family: a classifier before a dense model, a published before another one.

    Raises:
        ValueError: Unknown family.
    """
    known = sorted({summary_of(name).family for name in list_architectures()})
    if unknown := set(families or ()) - set(known):
        raise ValueError(f'no family {", ".join(sorted(unknown))}: choose from {", ".join(known)}')
    return [STANDARD.get(family) or min(list_architectures(family), key=_rank) for family in families or known]


def _rank(name: str) -> tuple:
    summary = summary_of(name)
    published = any(cfg.has_weights for cfg in default_cfgs_of(name).values())
    return summary.input_size[1] < SMALLEST_SIZE, summary.task != 'classification', not published, summary.params


def benchmark_zoo(
    setting: Setting,
    names: Sequence[str],
    baselines: Sequence[str],
    sizes: Sequence[int],
    batch_size: int,
    budget: float,
) -> Iterator[Row]:
    """One row an image size and model, baselines first.

    Args:
        batch_size: Of images up to 224x224; of larger ones there are as many as have no more pixels.
        budget: Seconds for all figures of a row. What has not begun by then is left out.
    """
    for size in sizes:
        batch = max(1, batch_size * FULL_SIZE**2 // max(FULL_SIZE, size) ** 2)
        measured = {name: time_model(setting, name, batch, size, budget) for name in baselines}
        for name in (*baselines, *(name for name in names if name not in measured)):
            figures, problems = measured.get(name) or time_model(setting, name, batch, size, budget)
            row = {'model': name, 'size': size, 'batch': batch}
            for phase in PHASES:
                ms = figures[phase]
                row[f'{phase} img/s'] = 1e3 * batch / ms
                for baseline in baselines:
                    row[f'{phase} speed / {baseline.partition("_patch")[0]}'] = measured[baseline][0][phase] / ms
                row[f'{phase} speed / unfused'] = figures[f'{phase} unfused'] / ms
            yield {**row, 'train peak GiB': figures['peak'], 'problems': '; '.join(problems)}


def time_model(setting: Setting, name: str, batch: int, size: int, budget: float) -> tuple[dict[str, float], list[str]]:
    """Milliseconds of both phases with either scan, gigabytes of a training step, and what kept any from being known.

    A figure that is not known is NaN: too little memory, too little time, an error, or no scan in the model.
    """
    figures = dict.fromkeys((*PHASES, *(f'{phase} unfused' for phase in PHASES), 'peak'), NAN)
    problems, deadline = [], time.perf_counter() + budget
    try:
        model, x = _build(setting, name, batch, size)
        passes = dict(zip(PHASES, make_passes(setting, model, model, x)))
        for suffix, scans in (('', nullcontext), (' unfused', unfused_operators)):
            for phase, call in passes.items():
                model.train(phase == 'train')
                key = f'{phase}{suffix}'
                figures[key], problem = _time(setting, call, scans(), deadline)
                if problem:
                    problems.append(f'{key}: {problem}')
                elif key == 'train' and setting.on_gpu:
                    figures['peak'] = peak_memory(setting, call) / 2**30
    except Exception as error:  # whatever is wrong with one model, the others are measured
        problems.append(_describe(error))
    return figures, problems


def _build(setting: Setting, name: str, batch: int, size: int) -> tuple[torch.nn.Module, torch.Tensor]:
    cfg = timm.get_pretrained_cfg(name)
    kwargs = {'img_size': size} if cfg and cfg.fixed_input_size else {}
    model = timm.create_model(name, **kwargs).to(setting.device)
    channels = cfg.input_size[0] if cfg else 3
    return model, torch.randn(batch, channels, size, size, device=setting.device)


def _time(
    setting: Setting,
    call: Callable[[], object],
    scans: AbstractContextManager[SimpleNamespace | None],
    deadline: float,
) -> tuple[float, str]:
    """Median milliseconds, or NaN and the reason; no reason for a model that has no scan to replace."""
    if time.perf_counter() > deadline:
        return NAN, 'no time left'
    try:
        setting.release_memory()
        with scans as replaced:
            if replaced:
                call()
                if not replaced.calls:
                    return NAN, ''
            ms = setting.measure(call, deadline)[1]
    except torch.OutOfMemoryError:
        return NAN, 'out of memory'
    except Exception as error:
        return NAN, _describe(error)
    return ms, 'out of memory' if math.isnan(ms) else ''


def _describe(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f'{type(error).__name__}: {lines[0]}' if lines else type(error).__name__
