"""Hooks: a progress bar, checkpoints that survive a kill, reproducible epochs, and where a NaN came from."""

import os
import random
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import get_rank, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.utils import apply_to
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    return model.module if is_model_wrapper(model) else model


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Seed every generator from (seed, epoch, rank), so that a resumed epoch repeats the interrupted one exactly."""

    priority = 'VERY_HIGH'

    def before_train_epoch(self, runner) -> None:
        seed = (runner.seed + 1_000_003 * runner.epoch + 7_919 * get_rank()) % 2**32
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


def first_nonfinite(model: torch.nn.Module, args: tuple, kwargs: dict) -> str:
    """Run a forward pass again and say where a NaN or Inf first appears: batch, parameter, or module's output."""
    inputs = kwargs.get('inputs', args[0] if args else None)
    if isinstance(inputs, torch.Tensor) and not inputs.isfinite().all():
        bad = (~inputs.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        paths = kwargs.get('paths')
        return f'in the input images ({", ".join(str(paths[i] if paths else i) for i in bad[:5])})'
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f'in the parameter {name}, which an earlier step made non-finite'

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
            losses = {key: value for key, value in output.items() if 'loss' in key and isinstance(value, torch.Tensor)}
            if all(value.isfinite().all() for value in losses.values()):
                return
            with torch.random.fork_rng():
                torch.set_rng_state(state['rng'][0])
                if state['rng'][1] is not None:
                    torch.cuda.set_rng_state(state['rng'][1])
                where = first_nonfinite(module, args, kwargs)
            values = ', '.join(f'{key} = {value.mean().item()}' for key, value in losses.items())
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


def save_atomically(obj: dict, path: Path) -> None:
    """Write a checkpoint so that a kill at any moment leaves either the old file or the new one, never half of one."""
    # NumPy's scalars (sizes, scores) would need unsafe unpickling.
    obj = apply_to(obj, lambda value: isinstance(value, np.generic), lambda value: value.item())
    temporary = path.with_name(f'.{path.name}.tmp')
    with open(temporary, 'wb') as file:
        torch.save(obj, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@HOOKS.register_module()
class BestAndLastHook(Hook):
    """Keep two checkpoints in the work folder: last.pth to resume from, best.pth to use.

    mmengine's CheckpointHook deletes the old best file before it writes the new one and saves before validation, so a
    kill in between loses the best epoch. Here an epoch is saved when the next one begins, with all that validation
    found out, best.pth is written before last.pth, and each file replaces its predecessor in one step.

    best.pth holds tensors and plain values only: the backbone's `state_dict` (averaged, if training averages), what
    `timm.create_model` needs to rebuild it, the preprocessing and the class names.

    Args:
        metric: The validation metric of which the greatest value is the best.
        interval: Save last.pth every so many epochs; it is always saved at the end.
    """

    priority = 'VERY_LOW'  # after the hooks that change what is saved

    def __init__(self, metric: str = 'top1', interval: int = 1) -> None:
        self.metric = metric
        self.interval = interval
        self.saved_epoch = 0

    def before_train(self, runner) -> None:
        self.saved_epoch = runner.epoch  # what was just resumed needs no saving

    def before_train_epoch(self, runner) -> None:
        if runner.epoch - self.saved_epoch >= self.interval:
            self._save_last(runner)

    def after_train(self, runner) -> None:
        if runner.epoch > self.saved_epoch:
            self._save_last(runner)

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        best = runner.message_hub.runtime_info.get('best_score')
        if is_main_process() and (best is None or metrics[self.metric] >= best):
            self._save_best(runner, metrics)
        if best is None or metrics[self.metric] >= best:
            runner.message_hub.update_info('best_score', float(metrics[self.metric]))
            runner.message_hub.update_info('best_epoch', runner.epoch)

    def _save_last(self, runner) -> None:
        self.saved_epoch = runner.epoch
        if not is_main_process():
            return
        # Without the history of values: it is in the log files, and here it would need unsafe unpickling.
        info = runner.message_hub.state_dict()['runtime_info']
        hub = dict(log_scalars={}, runtime_info=info, resumed_keys=dict.fromkeys(info, True))
        checkpoint = dict(
            meta=dict(
                epoch=runner.epoch,
                iter=runner.iter,
                seed=runner.seed,
                cfg=runner.cfg.pretty_text,
                dataset_meta=runner.train_dataloader.dataset.metainfo,
            ),
            state_dict=unwrapped(runner.model).state_dict(),
            optimizer=runner.optim_wrapper.state_dict(),
            param_schedulers=[scheduler.state_dict() for scheduler in runner.param_schedulers or []],
            message_hub=hub,
        )
        runner.call_hook('before_save_checkpoint', checkpoint=checkpoint)
        save_atomically(checkpoint, Path(runner.work_dir) / 'last.pth')

    def _save_best(self, runner, metrics: dict) -> None:
        model = unwrapped(runner.model)
        checkpoint = dict(state_dict=model.state_dict())
        runner.call_hook('before_save_checkpoint', checkpoint=checkpoint)  # EMAHook puts its average there
        prefix = 'backbone.'
        weights = {k.removeprefix(prefix): v for k, v in checkpoint['state_dict'].items() if k.startswith(prefix)}
        dataset = runner.val_dataloader.dataset
        meta = dict(
            model_name=model.model_name,
            model_kwargs=model.model_kwargs,
            num_classes=model.backbone.num_classes,
            in_chans=model.in_chans,
            classes=list(dataset.metainfo['classes']),
            data=dict(
                input_size=tuple(dataset.input_size),
                interpolation=dataset.interpolation,
                crop_pct=dataset.crop_pct,
                mean=(model.data_preprocessor.mean / 255).flatten().tolist(),
                std=(model.data_preprocessor.std / 255).flatten().tolist(),
            ),
            epoch=runner.epoch,
            metrics={key: float(value) for key, value in metrics.items() if isinstance(value, (int, float))},
        )
        save_atomically(dict(state_dict=weights, meta=meta), Path(runner.work_dir) / 'best.pth')


@HOOKS.register_module()
class ProgressHook(Hook):
    """A progress bar over the whole training, and a line for each validation."""

    priority = 'LOWEST'  # after BestAndLastHook has updated the best score

    def __init__(self) -> None:
        self.progress: Progress | None = None

    def before_train(self, runner) -> None:
        if not is_main_process() or runner.iter >= runner.max_iters:
            return
        self.progress = Progress(
            TextColumn('[bold]{task.description}'),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn('loss {task.fields[loss]}'),
            TimeElapsedColumn(),
            TextColumn('left'),
            TimeRemainingColumn(),
            console=Console(),
        )
        self.task = self.progress.add_task('training', total=runner.max_iters, completed=runner.iter, loss='...')
        self.progress.start()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if self.progress is not None:
            self.progress.update(
                self.task,
                completed=runner.iter + 1,
                loss=f'{runner.message_hub.get_scalar("train/loss").mean(20):.3f}',
                description=f'epoch {runner.epoch + 1}/{runner.max_epochs}',
            )

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        if self.progress is None:
            return
        values = '  '.join(f'{key} {value:6.2f}' for key, value in metrics.items() if isinstance(value, float))
        best = runner.message_hub.get_info('best_epoch') == runner.epoch
        loss = runner.message_hub.get_scalar('train/loss').mean(len(runner.train_dataloader))
        line = f'epoch {runner.epoch:3d}/{runner.max_epochs}  loss {loss:.3f}  {values}'
        self.progress.console.print(line + ('  [green]best[/]' if best else ''), highlight=False)

    def after_train(self, runner) -> None:
        self.close()

    def close(self) -> None:
        """Restore the terminal; called after errors too."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
