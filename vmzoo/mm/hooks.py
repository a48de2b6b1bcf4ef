"""Hooks: a progress bar, checkpoints that survive a kill, reproducible epochs, and where a NaN came from."""

import random
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import get_rank, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.distributed.fsdp import FullyShardedDataParallel

from .checkpoint import save_atomically


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    return model.module if is_model_wrapper(model) else model


def by_iteration(runner) -> bool:
    """Whether a training counts iterations, as segmentation does, and not epochs."""
    return isinstance(runner.train_loop, IterBasedTrainLoop)


@HOOKS.register_module()
class StepSeedHook(Hook):
    """Seed every generator from (seed, iteration, rank), so that a resumed training repeats an uninterrupted one."""

    priority = 'VERY_HIGH'

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        seed = (runner.seed + 1_000_003 * runner.iter + 7_919 * get_rank()) % 2**32
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


def first_nonfinite(model: torch.nn.Module, args: tuple, kwargs: dict) -> str:
    """Run a forward pass again and say where a NaN or Inf first appears: batch, parameter, or module's output."""
    inputs = kwargs.get('inputs', args[0] if args else None)
    if isinstance(inputs, torch.Tensor) and not inputs.isfinite().all():
        bad = (~inputs.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        paths = kwargs.get('paths') or [sample.img_path for sample in kwargs.get('data_samples') or ()]
        return f'in the input images ({", ".join(str(paths[i] if paths else i) for i in bad[:5])})'
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f'in the parameter {name}, which an earlier step made non-finite'

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return 'in a sharded module'  # running it again would wait for processes that have no NaN

    found = []

    def check(name, module):
        def hook(_, __, output):
            tensors = output if isinstance(output, (list, tuple)) else [output]
            if not found and any(isinstance(t, torch.Tensor) and not t.isfinite().all() for t in tensors):
                found.append(f'in the output of {name} ({type(module).__name__})')

        return hook

    # A module's hook runs before its parent's, so the first report names the innermost module.
    handles = [module.register_forward_hook(check(name, module)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model.forward(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else 'in the loss itself: every module gives finite values'


@HOOKS.register_module()
class NonFiniteLossHook(Hook):
    """Stop when the loss is NaN or Inf, before it reaches the parameters, and name the module where it began.

    Works for every mmengine model, whose forward pass in mode 'loss' returns a dict of losses.
    """

    def before_train(self, runner) -> None:
        model = unwrapped(runner.model)
        state = {}

        def remember(module, args, kwargs):  # the second pass must draw the same dropout masks
            state['rng'] = torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None

        def check(module, args, kwargs, output):
            if kwargs.get('mode') != 'loss':
                return
            # Detectors return a list of losses, one of each level of their pyramid.
            lists = {key: value if isinstance(value, (list, tuple)) else [value] for key, value in output.items()}
            losses = {
                key: sum(value.mean() for value in values) for key, values in lists.items() if 'loss' in key and values
            }
            if all(value.isfinite() for value in losses.values()):
                return
            with torch.random.fork_rng():
                torch.set_rng_state(state['rng'][0])
                if state['rng'][1] is not None:
                    torch.cuda.set_rng_state(state['rng'][1])
                where = first_nonfinite(module, args, kwargs)
            values = ', '.join(f'{key} = {value.item()}' for key, value in losses.items())
            raise FloatingPointError(
                f'{values} at epoch {runner.epoch + 1}, iteration {runner.iter + 1}: it first appears {where}. '
                'Common remedies: a lower learning rate, gradient clipping '
                '(--cfg-options optim_wrapper.clip_grad.max_norm=1), training without --amp'
            )

        self.handles = [
            model.register_forward_pre_hook(remember, with_kwargs=True),
            model.register_forward_hook(check, with_kwargs=True),
        ]

    def after_train(self, runner) -> None:
        for handle in self.handles:
            handle.remove()


@HOOKS.register_module()
class BestAndLastHook(Hook):
    """Keep two checkpoints in the work folder: last.pth to resume from, best.pth to use.

    mmengine's CheckpointHook deletes the old best file before it writes the new one and saves before validation, so a
    kill in between loses the best weights. Here an epoch is saved when the next one begins, with all that validation
    found out, best.pth is written before last.pth, and each file replaces its predecessor in one step.

    best.pth holds tensors and plain values only: the weights (averaged, if training averages) of the whole model with
    its config and classes, as mmseg's and mmdet's inference functions take them, or what the model's own
    `published(state_dict, dataset)` returns.

    Args:
        metric: The validation metric of which the greatest value is the best, e.g. 'mIoU' or 'coco/bbox_mAP'.
        interval: Save last.pth every so many epochs, or iterations where the training counts those; it is always saved
            at the end.
    """

    priority = 'VERY_LOW'  # after the hooks that change what is saved

    def __init__(self, metric: str = 'top1', interval: int = 1) -> None:
        self.metric = metric
        self.interval = interval
        self.saved = 0

    @staticmethod
    def _step(runner) -> int:
        return runner.iter if by_iteration(runner) else runner.epoch

    def before_train(self, runner) -> None:
        self.saved = self._step(runner)  # what was just resumed needs no saving

    def before_train_epoch(self, runner) -> None:
        if not by_iteration(runner):
            self._save_last_if_due(runner)

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if by_iteration(runner):
            self._save_last_if_due(runner)

    def after_train(self, runner) -> None:
        if self._step(runner) > self.saved:
            self._save_last(runner)

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        if self.metric not in metrics:
            raise ValueError(
                f'BestAndLastHook cannot choose by {self.metric}: validation gives {", ".join(metrics) or "no metric"}'
            )
        best = runner.message_hub.runtime_info.get('best_score')
        if best is None or metrics[self.metric] >= best:
            self._save_best(runner, metrics)
            runner.message_hub.update_info('best_score', float(metrics[self.metric]))
            runner.message_hub.update_info('best_epoch', runner.epoch)
            runner.message_hub.update_info('best_iter', runner.iter)

    def _save_last_if_due(self, runner) -> None:
        if self._step(runner) - self.saved >= self.interval:
            self._save_last(runner)

    def _save_last(self, runner) -> None:
        self.saved = self._step(runner)
        runner.save_resumable(Path(runner.work_dir) / 'last.pth', runner.epoch, runner.iter)

    def _save_best(self, runner, metrics: dict) -> None:
        checkpoint = dict(state_dict=runner.states.model_state_dict())  # every process takes part where it is sharded
        if not is_main_process():
            return
        runner.call_hook('before_save_checkpoint', checkpoint=checkpoint)  # EMAHook puts its average there
        state_dict, dataset = checkpoint['state_dict'], runner.val_dataloader.dataset
        model = unwrapped(runner.model)
        if hasattr(model, 'published'):
            weights, meta = model.published(state_dict, dataset)
        else:
            weights, meta = state_dict, dict(cfg=runner.config_text, dataset_meta=dict(dataset.metainfo))
        values = {key: float(value) for key, value in metrics.items() if isinstance(value, Real)}
        meta.update(epoch=runner.epoch, iter=runner.iter, metrics=values)
        save_atomically(dict(state_dict=weights, meta=meta), Path(runner.work_dir) / 'best.pth')


@HOOKS.register_module()
class ProgressHook(Hook):
    """A title, a progress bar over the whole training, and a line for each validation."""

    priority = 'LOWEST'  # after BestAndLastHook has updated the best score

    def __init__(self) -> None:
        self.progress: Progress | None = None

    def before_train(self, runner) -> None:
        if not is_main_process():
            return
        console = Console()
        console.print(self._title(runner), highlight=False, soft_wrap=True)
        if runner.iter >= runner.max_iters:
            return
        self.progress = Progress(
            TextColumn('[bold]{task.description}'),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn('loss {task.fields[loss]}'),
            TimeElapsedColumn(),
            TextColumn('left'),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.progress.add_task('training', total=runner.max_iters, completed=runner.iter, loss='...')
        self.progress.start()

    @staticmethod
    def _title(runner) -> str:
        model = unwrapped(runner.model)
        backbone = getattr(model, 'backbone', None)
        names = (getattr(model, 'model_name', None), type(model).__name__, getattr(backbone, 'model_name', None))
        name = names[0] or ' with '.join(filter(None, names[1:]))
        sharded = any(isinstance(module, FullyShardedDataParallel) for module in runner.model.modules())
        size = '' if sharded else f' ({sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters)'
        length = f'{runner.max_iters} iterations' if by_iteration(runner) else f'{runner.max_epochs} epochs'
        done = runner.iter if by_iteration(runner) else runner.epoch
        return (
            f'[bold]{name}[/]{size}, {len(runner.train_dataloader.dataset)} training images, {length}, '
            f'seed {runner.seed}, log in {escape(runner.work_dir)}'
            + (f', [yellow]resuming after {done}[/]' if done else '')
        )

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if self.progress is not None:
            self.progress.update(
                self.task,
                completed=runner.iter + 1,
                loss=f'{runner.message_hub.get_scalar("train/loss").mean(20):.3f}',
                description='training' if by_iteration(runner) else f'epoch {runner.epoch + 1}/{runner.max_epochs}',
            )

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        if self.progress is None:
            return
        # COCO's metrics are -1 for sizes that no object has.
        values = '  '.join(
            f'{key.rpartition("/")[2]} {value:.4g}'
            for key, value in metrics.items()
            if isinstance(value, Real) and value >= 0
        )
        best = runner.message_hub.runtime_info.get('best_iter') == runner.iter
        if by_iteration(runner):
            done, window = f'iteration {runner.iter}/{runner.max_iters}', runner.val_interval
        else:
            done, window = f'epoch {runner.epoch:3d}/{runner.max_epochs}', len(runner.train_dataloader)
        loss = runner.message_hub.get_scalar('train/loss').mean(window)
        self.progress.console.print(
            f'{done}  loss {loss:.3f}  {values}' + ('  [green]best[/]' if best else ''), highlight=False
        )

    def after_train(self, runner) -> None:
        self.close()

    def close(self) -> None:
        """Restore the terminal; called after errors too."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
