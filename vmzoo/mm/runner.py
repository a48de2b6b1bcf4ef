"""mmengine's Runners with a quiet terminal, safe and strict resuming, and distributed training on CPUs."""

import copy
import importlib.util
import itertools
import logging
import os
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.model import MMDistributedDataParallel, is_model_wrapper, revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import RUNNERS
from mmengine.runner import FlexibleRunner, Runner

from vmzoo.weights import load_checkpoint
from vmzoo.weights.convert import differences

from .checkpoint import load_weights, read_resumable, save_atomically
from .config import is_classifier, type_name
from .hooks import by_iteration
from .operators import complete_operators

_numbers = itertools.count()
TRAINING_HOOKS = ('BestAndLastHook', 'EMAHook', 'StepSeedHook', 'NonFiniteLossHook')


class SafeRunner:
    """What both of vmzoo's runners do in their own way: checkpoints, random augmentation, the terminal.

    `states` is the part of a runner that has the states of model, optimizer and schedulers.
    """

    @cached_property
    def config_text(self) -> str:
        """The config for checkpoints; mmengine takes a second to format it."""
        return self.cfg.pretty_text

    def build_logger(self, *args, **kwargs) -> logging.Logger:
        return quiet(super().build_logger(*args, **kwargs))

    def build_visualizer(self, visualizer=None):
        """As mmengine's, under this runner's own name: by one name, runners of a process share a folder."""
        if isinstance(visualizer, dict):
            visualizer = dict(visualizer, name=self.experiment_name)
        return super().build_visualizer(visualizer)

    def build_train_loop(self, loop):
        """As mmengine's, with augmentation that neither workers nor interruptions change (see `vmzoo.mm.seeding`)."""
        if isinstance(self._train_dataloader, dict):
            loader = copy.deepcopy(self._train_dataloader)
            loader['dataset'] = dict(type='SeededDataset', dataset=loader['dataset'])
            loader['sampler'] = dict(type='SeededSampler', sampler=loader['sampler'])
            self._train_dataloader = loader
        return super().build_train_loop(loop)

    def save_checkpoint(
        self,
        out_dir: str,
        filename: str,
        file_client_args: dict | None = None,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        meta: dict | None = None,
        by_epoch: bool = True,
        backend_args: dict | None = None,
    ) -> None:
        """What mmengine's CheckpointHook calls, at the end of an epoch or iteration that is not yet counted."""
        meta = dict(meta or {})
        epoch = meta.pop('epoch', self.epoch + 1 if by_epoch else self.epoch)
        iteration = meta.pop('iter', self.iter if by_epoch else self.iter + 1)
        if '://' in str(out_dir) or file_client_args or backend_args:
            meta.update(epoch=epoch, iter=iteration)
            super().save_checkpoint(
                *(
                    out_dir,
                    filename,
                    file_client_args,
                    save_optimizer,
                    save_param_scheduler,
                    meta,
                    by_epoch,
                    backend_args,
                )
            )
        else:
            self.save_resumable(Path(out_dir) / filename, epoch, iteration, meta, save_optimizer)

    def save_resumable(
        self, path: Path, epoch: int, iteration: int, meta: dict | None = None, save_optimizer: bool = True
    ) -> None:
        """Save everything that a training goes on from, in one step; every process has to call it.

        Args:
            path: A file on this machine.
            epoch: Number of completed epochs.
            iteration: Number of completed iterations.
            meta: Further plain values.
            save_optimizer: False makes the file smaller, but no training can go on from it.
        """
        checkpoint = dict(state_dict=self.states.model_state_dict())
        if save_optimizer:
            checkpoint['optimizer'] = self.states.optim_state_dict()
            checkpoint['param_schedulers'] = self.states.scheduler_state_dict() if self.param_schedulers else []
        if not is_main_process():
            return
        # Without the history of values: it is in the log files, and here it would need unsafe unpickling.
        info = self.message_hub.state_dict()['runtime_info']
        checkpoint['message_hub'] = dict(log_scalars={}, runtime_info=info, resumed_keys=dict.fromkeys(info, True))
        dataset_meta = getattr(self.train_dataloader.dataset, 'metainfo', None)
        checkpoint['meta'] = dict(
            epoch=epoch,
            iter=iteration,
            seed=self.seed,
            cfg=self.config_text,
            dataset_meta=dataset_meta and dict(dataset_meta),
            **(meta or {}),
        )
        self.call_hook('before_save_checkpoint', checkpoint=checkpoint)
        save_atomically(checkpoint, path)

    def resume(self, filename: str, **_) -> None:
        """Go on with the training that wrote a file: every key must fit, and nothing in the file is executed.

        mmengine's own takes what fits and falls back to unpickling arbitrary objects.

        Raises:
            ValueError: The file is damaged, or of another model or another length of training.
        """
        checkpoint = read_resumable(filename)
        unit, length = ('iters', self.max_iters) if by_iteration(self) else ('epochs', self.max_epochs)
        planned = checkpoint['message_hub']['runtime_info'][f'max_{unit}']
        if planned != length:
            raise ValueError(
                f'{filename} is of a training of {planned} {unit}, not {length}; its schedule cannot change: '
                'resume with the same number, or start from its weights: --pretrained best.pth --work-dir NEW'
            )
        if checkpoint['meta']['seed'] != self.seed:
            raise ValueError(f'{filename} was started with --seed {checkpoint["meta"]["seed"]}, not {self.seed}')
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        try:
            self.states.load_model_state_dict(checkpoint['state_dict'], strict=True)
        except RuntimeError as error:
            raise ValueError(
                f'{filename} belongs to another model: {error}. '
                'Use the config and options that it was trained with, or another --work-dir'
            ) from error
        self.states.load_optim_state_dict(checkpoint['optimizer'])
        if self.param_schedulers:
            self.states.load_scheduler_state_dict(checkpoint['param_schedulers'])
        self.train_loop._epoch = checkpoint['meta']['epoch']
        self.train_loop._iter = checkpoint['meta']['iter']
        self.optim_wrapper.initialize_count_status(self.model, self.iter, self.max_iters)
        self.message_hub.load_state_dict(checkpoint['message_hub'])
        self._has_loaded = True
        self.logger.info(f'resumed {filename}')

    def train(self) -> torch.nn.Module:
        """Train, and give the terminal back whatever happens."""
        try:
            return super().train()
        finally:
            for hook in self.hooks:
                if hasattr(hook, 'close'):
                    hook.close()


def quiet(logger: logging.Logger) -> logging.Logger:
    """Leave the terminal to `ProgressHook`; the log file gets everything."""
    for handler in logger.handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(max(handler.level, logging.WARNING))
    return logger


def join_processes_without_gpu(distributed: bool) -> None:
    """mmengine would ask each process for its GPU; without one they talk through gloo."""
    if distributed and not torch.cuda.is_available() and not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')


@RUNNERS.register_module()
class VMZooRunner(SafeRunner, Runner):
    """A Runner whose log goes to the file, not to the terminal, where `ProgressHook` writes."""

    def __init__(self, *args, experiment_name: str | None = None, **kwargs) -> None:
        # mmengine keeps logs and scores by this name; runners of one process must not share them.
        super().__init__(*args, experiment_name=f'{experiment_name or "run"}_{next(_numbers)}', **kwargs)

    def setup_env(self, env_cfg: dict) -> None:
        """As mmengine's; `num_threads` limits torch's threads."""
        if 'num_threads' in env_cfg:
            torch.set_num_threads(env_cfg['num_threads'])
        join_processes_without_gpu(self.distributed)
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: torch.nn.Module) -> torch.nn.Module:
        """As mmengine's, which passes a GPU's number and leaves SyncBN even where there is no GPU."""
        if not torch.cuda.is_available():
            model = revert_sync_batchnorm(model)
        if self.distributed and not torch.cuda.is_available() and model_wrapper_cfg is None:
            return MMDistributedDataParallel(
                module=model,
                broadcast_buffers=False,
                find_unused_parameters=self.cfg.get('find_unused_parameters', False),
            )
        return super().wrap_model(model_wrapper_cfg, model)

    def load_checkpoint(self, filename: str, map_location: str = 'cpu', strict: bool = False, **_) -> None:
        """Start from the weights of a file (see `load_weights`)."""
        load_weights(self.bare_model, filename, strict)
        self._has_loaded = True
        self.logger.info(f'loaded {filename}')

    @property
    def states(self) -> 'VMZooRunner':
        return self

    @property
    def bare_model(self) -> torch.nn.Module:
        return self.model.module if is_model_wrapper(self.model) else self.model

    def model_state_dict(self) -> dict:
        return self.bare_model.state_dict()

    def load_model_state_dict(self, state_dict: dict, strict: bool = True) -> None:
        if problems := differences(state_dict, self.bare_model.state_dict()):
            raise RuntimeError('; '.join(problems))
        self.bare_model.load_state_dict(state_dict)

    def optim_state_dict(self) -> dict:
        if not isinstance(self.optim_wrapper, OptimWrapper):
            raise TypeError('a training with several optimizers cannot be resumed: use one optim_wrapper')
        return self.optim_wrapper.state_dict()

    def load_optim_state_dict(self, state_dict: dict) -> None:
        self.optim_wrapper.load_state_dict(state_dict)

    def scheduler_state_dict(self) -> list[dict]:
        return [scheduler.state_dict() for scheduler in self.param_schedulers]

    def load_scheduler_state_dict(self, states: list[dict]) -> None:
        for scheduler, state in zip(self.param_schedulers, states):
            scheduler.load_state_dict(state)


@RUNNERS.register_module()
class VMZooFlexibleRunner(SafeRunner, FlexibleRunner):
    """The runner of configs with a `strategy`: FSDP (`VMZooFSDPStrategy`) or DeepSpeed."""

    def build_strategy(self, strategy, launcher: str, env_cfg: dict, experiment_name: str | None, **kwargs):
        env_cfg = dict(env_cfg)
        if num_threads := env_cfg.pop('num_threads', None):
            torch.set_num_threads(num_threads)
        join_processes_without_gpu(launcher != 'none')
        built = super().build_strategy(
            strategy,
            launcher=launcher,
            env_cfg=env_cfg,
            experiment_name=f'{experiment_name or "run"}_{next(_numbers)}',
            **kwargs,
        )
        quiet(built.logger)
        return built

    @property
    def states(self):
        return self.strategy

    @property
    def saves_itself(self) -> bool:
        """DeepSpeed writes each process' part into a folder of its own format."""
        return type(self.strategy).__name__ == 'DeepSpeedStrategy'

    def save_checkpoint(self, *args, **kwargs) -> None:
        (FlexibleRunner if self.saves_itself else SafeRunner).save_checkpoint(self, *args, **kwargs)

    def resume(self, filename: str, **kwargs) -> None:
        (FlexibleRunner if self.saves_itself else SafeRunner).resume(self, filename, **kwargs)

    def load_checkpoint(self, filename: str, **kwargs) -> None:
        raise ValueError(
            'a sharded model cannot take other weights: give them to the backbone (model.backbone.pretrained=FILE)'
        )


def build_runner(cfg: Config) -> VMZooRunner | VMZooFlexibleRunner:
    """The runner for a completed config: mmengine's FlexibleRunner where the config has a `strategy`.

    Raises:
        ImportError: The strategy needs a library that is not installed.
        ValueError: The strategy needs several processes.
    """
    if cfg.get('default_scope') == 'mmdet':
        complete_operators()
    strategy = cfg.get('strategy')
    if not strategy:
        return VMZooRunner.from_cfg(cfg)
    name = type_name(strategy)
    if name == 'DeepSpeedStrategy' and importlib.util.find_spec('deepspeed') is None:
        raise ImportError('the config trains with DeepSpeed, which is not installed; run: pip install deepspeed')
    if cfg.launcher == 'none':
        raise ValueError(f'{name} shards a model over processes: start with tools/dist_train.sh or --launcher')
    return VMZooFlexibleRunner.from_cfg(cfg)


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
    if not cfg.get('test_dataloader'):
        raise ValueError('the config has no test_dataloader')
    for key in ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler'):
        cfg[key] = None
    for key in ('val_dataloader', 'val_cfg', 'val_evaluator', 'strategy'):
        cfg[key] = None
    cfg.update(resume=False, load_from=None)
    cfg.default_hooks.checkpoint = None
    cfg.custom_hooks = [hook for hook in cfg.custom_hooks if type_name(hook) not in TRAINING_HOOKS]
    model = cfg.model if is_classifier(cfg) else cfg.model.get('backbone', {})
    if 'pretrained' in model:
        model.pretrained = False
    runner = build_runner(cfg)
    if is_classifier(cfg):
        report = load_checkpoint(runner.bare_model.backbone, checkpoint)
        if report.head or report.stem:
            raise ValueError(f'{checkpoint} belongs to another model: {report.head or report.stem}')
    else:
        runner.load_checkpoint(checkpoint, strict=True)
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in runner.test().items()}
