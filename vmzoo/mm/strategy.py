"""Fully sharded training: mmengine's FSDP strategy, with today's torch, on CPUs too, and checkpoints in one file."""

import os
from functools import partial

import torch
from mmengine._strategy import FSDPStrategy
from mmengine.registry import STRATEGIES
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy


def blocks_of(model: nn.Module) -> set[nn.Module]:
    """The blocks of a backbone: what its innermost lists called `blocks` or `layers` hold.

    Each is a unit to shard, which its call makes whole. Other units would not do: of a stage, parts are called; of a
    scan, the weights of its projections are taken without any call.
    """
    backbone = getattr(model, 'backbone', model)
    named = {name: list(m) for name, m in backbone.named_modules() if name.rpartition('.')[2] in ('blocks', 'layers')}
    inner = {name for name in named if not any(other.startswith(f'{name}.') for other in named)}
    return {block for name in inner for block in named[name]}


@STRATEGIES.register_module()
class VMZooFSDPStrategy(FSDPStrategy):
    """Shard parameters, gradients and optimizer state over all processes.

    Checkpoints hold the whole model: one file, which any number of processes, or a training without FSDP, can load.

    Args:
        **kwargs: Arguments of mmengine's `FSDPStrategy`. Without an `auto_wrap_policy` in `model_wrapper`, the units
            are the backbone's blocks (see `blocks_of`).
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(state_dict_cfg='full', **kwargs)
        if not torch.cuda.is_available():  # what is copied to where it is already would be freed
            self.state_dict_config.offload_to_cpu = self.optim_state_dict_config.offload_to_cpu = False

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        gpu = torch.cuda.is_available()
        self.model_wrapper = dict(
            dict(
                type='MMFullyShardedDataParallel',
                auto_wrap_policy=partial(lambda_auto_wrap_policy, lambda_fn=blocks_of(model).__contains__),
                sync_module_states=gpu,
                device_id=int(os.environ['LOCAL_RANK']) if gpu else torch.device('cpu'),
            ),
            **(self.model_wrapper or {}),
        )
        return super()._wrap_model(model)

    def build_optim_wrapper(self, optim_wrapper, model: nn.Module | None = None):
        with FSDP.summon_full_params(model, writeback=False):  # parameters are grouped by their shapes
            return super().build_optim_wrapper(optim_wrapper, model)

    def optim_state_dict(self) -> dict:
        return FSDP.optim_state_dict(self.model, self.optim_wrapper.optimizer)

    def load_optim_state_dict(self, state_dict: dict) -> None:
        optimizer = self.optim_wrapper.optimizer
        optimizer.load_state_dict(FSDP.optim_state_dict_to_load(self.model, optimizer, state_dict))
