"""What the tests of configs share: small forms of models, and building of optimiser and schedule."""

import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS
from models.exemptions import SMALL

from vmzoo.models._registry import family_of

TIMM_SMALL = {
    'mambaout': {'depths': (1, 1, 1, 1), 'dims': (8, 16, 24, 32)},
    'efficientvim': {'depths': (1, 1, 1), 'embed_dim': (16, 24, 32), 'state_dim': (4, 4, 4)},
}


def small_arguments(model_name: str) -> dict:
    """Arguments that make a model small."""
    model_name = model_name.partition('.')[0]
    family = family_of(model_name)
    return {**TIMM_SMALL.get(family, {}), **SMALL.get(family, {}), **SMALL.get(model_name, {})}


def build_optimisation(cfg: Config, model: torch.nn.Module) -> OptimWrapper:
    """Build optimiser and schedule; the schedule ends with the training, or shortly before."""
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    for scheduler in cfg.param_scheduler:
        PARAM_SCHEDULERS.build(dict(scheduler), default_args=dict(optimizer=wrapper, epoch_length=10))
    if cfg.param_scheduler:
        length = cfg.train_cfg.get('max_iters', cfg.train_cfg.get('max_epochs'))
        last = cfg.param_scheduler[-1]
        end = last.get('end') or last.begin + last.get('T_max', length - last.begin)
        assert 0.95 * length < end <= length
    return wrapper
