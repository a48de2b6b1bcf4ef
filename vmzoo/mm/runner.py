"""mmengine's Runner with a quiet terminal, safe and strict resuming, and distributed training on CPUs."""

import copy
import itertools
import logging
import os
import pickle

import torch
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from vmzoo.weights import load_checkpoint
from vmzoo.weights.convert import differences

_numbers = itertools.count()


@RUNNERS.register_module()
class VMZooRunner(Runner):
    """A Runner whose log goes to the file, not to the terminal, where `ProgressHook` writes."""

    def __init__(self, *args, experiment_name: str | None = None, **kwargs) -> None:
        # mmengine keeps logs and scores by this name; runners of one process must not share them.
        super().__init__(*args, experiment_name=f'{experiment_name or "run"}_{next(_numbers)}', **kwargs)

    def setup_env(self, env_cfg: dict) -> None:
        """As mmengine's; `num_threads` limits torch's threads, and without a GPU the processes talk through gloo."""
        if 'num_threads' in env_cfg:
            torch.set_num_threads(env_cfg['num_threads'])
        if self.distributed and not torch.cuda.is_available() and not torch.distributed.is_initialized():
            torch.distributed.init_process_group('gloo')
        super().setup_env(env_cfg)

    def build_logger(self, *args, **kwargs) -> logging.Logger:
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setLevel(max(handler.level, logging.WARNING))
        return logger

    def wrap_model(self, model_wrapper_cfg: dict | None, model: torch.nn.Module) -> torch.nn.Module:
        """As mmengine's, which passes a GPU's number even where there is no GPU."""
        if self.distributed and not torch.cuda.is_available() and model_wrapper_cfg is None:
            return MMDistributedDataParallel(module=model, broadcast_buffers=False)
        return super().wrap_model(model_wrapper_cfg, model)

    def load_checkpoint(self, filename: str, map_location: str = 'cpu', **_) -> dict:
        """Load a file that `BestAndLastHook` wrote: every key must fit, and nothing in the file is executed.

        mmengine's own loader takes what fits and falls back to unpickling arbitrary objects.
        """
        try:
            checkpoint = torch.load(filename, map_location=map_location, weights_only=True)
        except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
            raise ValueError(f'{filename} is not a checkpoint written by vmzoo: {error}') from error
        model = self.model.module if self.distributed else self.model
        if problems := differences(checkpoint['state_dict'], model.state_dict()):
            raise ValueError(
                f'{filename} belongs to another model: {"; ".join(problems)}. '
                'Use the config and options that it was trained with, or another --work-dir'
            )
        planned = checkpoint['message_hub']['runtime_info']['max_epochs']
        if planned != self.max_epochs:
            raise ValueError(
                f'{filename} is of a training of {planned} epochs, not {self.max_epochs}; its schedule cannot change: '
                'resume with the same number, or start from its weights: --pretrained best.pth --work-dir NEW'
            )
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        model.load_state_dict(checkpoint['state_dict'])
        self._has_loaded = True
        self.logger.info(f'loaded {filename}')
        return checkpoint

    def train(self) -> torch.nn.Module:
        """Train, and give the terminal back whatever happens."""
        try:
            return super().train()
        finally:
            for hook in self.hooks:
                if hasattr(hook, 'close'):
                    hook.close()


def evaluate(cfg: Config, checkpoint: str | os.PathLike) -> dict:
    """Measure a checkpoint on the config's test set.

    Args:
        cfg: A completed config (see `vmzoo.mm.config.complete`).
        checkpoint: A file that holds the weights of the config's model, e.g. best.pth.

    Returns:
        The test metrics.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError, ValueError: The file is damaged, or belongs to another model.
    """
    cfg = copy.deepcopy(cfg)
    for key in ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'val_dataloader', 'val_cfg'):
        cfg[key] = None
    cfg.update(val_evaluator=None, custom_hooks=[], default_hooks=dict(checkpoint=None), resume=False, load_from=None)
    cfg.model.pretrained = False
    runner = VMZooRunner.from_cfg(cfg)
    backbone = (runner.model.module if runner.distributed else runner.model).backbone
    report = load_checkpoint(backbone, checkpoint)
    if report.head or report.stem:
        raise ValueError(f'{checkpoint} belongs to another model: {report.head or report.stem}')
    return runner.test()
