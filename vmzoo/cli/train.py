"""`vmzoo train`: train a classifier from a config. Also runs under torchrun, as tools/train.py."""

import argparse
from contextlib import contextmanager
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = 'Train a classifier from a config: a file, or a shipped one by its name.'
    parser.epilog = (
        'examples: vmzoo train vmamba_nano_digits | '
        'vmzoo train image_folder --model vmamba_tiny_s1l8 --data data --pretrained --amp | '
        'torchrun --nproc_per_node 8 tools/train.py image_folder --model vim_tiny_patch16_224 --data data '
        '--launcher pytorch'
    )
    parser.add_argument('config', help='vmamba_nano_digits, image_folder, or the path of a config file')
    parser.add_argument('--model', metavar='NAME', help='any name of `vmzoo list` or timm.list_models()')
    parser.add_argument('--data', metavar='DIR', help='data folder with train/<class>/*.jpg and val/<class>/*.jpg')
    parser.add_argument(
        '--pretrained',
        nargs='?',
        const=True,
        metavar='FILE',
        help='start from the published weights, or from a checkpoint file',
    )
    parser.add_argument(
        '--epochs', type=int, metavar='N', help='length of the training; the schedule is stretched to it'
    )
    parser.add_argument('--work-dir', metavar='DIR', help='where checkpoints and logs go (default: work_dirs/<config>)')
    parser.add_argument('--resume', action='store_true', help="go on from the work folder's last.pth, if there is one")
    parser.add_argument(
        '--amp',
        nargs='?',
        const='auto',
        choices=['auto', 'bfloat16', 'float16'],
        help='mixed precision; auto is bfloat16 where the device has it',
    )
    parser.add_argument('--ema', action='store_true', help='evaluate and keep a moving average of the weights')
    parser.add_argument('--seed', type=int, help="random seed (default: the config's)")
    parser.add_argument(
        '--skip-broken', action='store_true', help='leave out unreadable image files instead of stopping'
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm'], default='none', help='how processes start')
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='K=V', help='other changes, e.g. train_dataloader.batch_size=32'
    )


def load_config(args: argparse.Namespace):
    """The config that the arguments describe, complete; also used by tools/test.py."""
    from mmengine.config import Config

    from vmzoo.mm.config import complete, find_config, loaders, parse_options, set_epochs

    path = find_config(args.config)
    cfg = Config.fromfile(str(path))
    missing = [key for key in ('model', 'train_cfg', 'train_dataloader', 'optim_wrapper') if not cfg.get(key)]
    if missing:
        raise ValueError(f'{path} is no training config: it lacks {", ".join(missing)}')
    datasets = [loader.dataset for loader in loaders(cfg)]
    if args.model:
        cfg.model.model_name = args.model
    if (args.data or args.skip_broken) and 'root' not in datasets[0]:
        raise ValueError(f'{path.name} has its own data: --data and --skip-broken go with image_folder')
    for dataset in datasets:
        if args.data:
            dataset.root = args.data
        if args.skip_broken:
            dataset.skip_broken = True
    if args.pretrained:
        if args.pretrained is not True and not Path(args.pretrained).is_file():
            raise FileNotFoundError(f'--pretrained: there is no file {args.pretrained}')
        cfg.model.pretrained = args.pretrained
    if args.epochs is not None:
        set_epochs(cfg, args.epochs)
    if args.seed is not None:
        cfg.randomness.seed = args.seed
    if args.amp:
        cfg.optim_wrapper.update(type='AutocastOptimWrapper', dtype=args.amp)
    if args.ema and not any(hook.type == 'EMAHook' for hook in cfg.custom_hooks):
        # The average follows the weights closely at first, then over about 500 steps.
        cfg.custom_hooks.append(dict(type='EMAHook', ema_type='MomentumAnnealingEMA', momentum=0.002, gamma=10))
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or f'work_dirs/{path.stem}'
    cfg.merge_from_dict(parse_options(args.cfg_options, cfg))
    return complete(cfg)


@contextmanager
def explained_options():
    """Tell a wrong setting in a config, which Python or a registry found out, from an error in the program.

    Raises:
        ValueError: An option, or the type of a part, is unknown.
    """
    try:
        yield
    except (KeyError, TypeError) as error:
        message = str(error.args[0]) if error.args else ''
        if 'unexpected keyword argument' not in message and 'is not in the' not in message:
            raise
        raise ValueError(f'the config does not fit: {message}') from error


@explained_options()
def run(args: argparse.Namespace) -> int:
    """Train, then measure the best checkpoint on the test set.

    Raises:
        FileExistsError: The work folder holds a training that this one would overwrite.
        FloatingPointError: The loss became NaN or Inf.
        ImportError: The training extra is not installed.
        FileNotFoundError, ValueError: See `vmzoo.mm.config.complete` and the datasets.
    """
    import torch

    import vmzoo.mm  # noqa: F401  says what to install, before mmengine's own import fails

    cfg = load_config(args)
    from mmengine.dist import barrier, is_main_process
    from rich.console import Console
    from rich.markup import escape

    from vmzoo.mm.runner import VMZooRunner, evaluate

    work_dir = Path(cfg.work_dir)
    last, best = work_dir / 'last.pth', work_dir / 'best.pth'
    if last.exists():
        if not args.resume:
            raise FileExistsError(
                f'{work_dir} holds a training: add --resume to go on with it, or give another --work-dir'
            )
        cfg.resume, cfg.load_from = True, str(last)
    runner = VMZooRunner.from_cfg(cfg)
    console = Console(quiet=not is_main_process())
    parameters = sum(p.numel() for p in runner.model.parameters())
    console.print(
        f'[bold]{cfg.model.model_name}[/] ({parameters / 1e6:.2f} M parameters), '
        f'{len(runner.train_dataloader.dataset)} training images, {cfg.train_cfg.max_epochs} epochs, '
        f'seed {runner.seed}, log in {escape(str(work_dir))}' + (', [yellow]resuming[/]' if last.exists() else ''),
        highlight=False,
        soft_wrap=True,
    )
    runner.train()
    barrier()  # the main process may still be writing best.pth
    if cfg.get('test_dataloader'):
        values = [f'{key} {value:.2f} %' for key, value in evaluate(cfg, best).items() if isinstance(value, float)]
        console.print(
            f'[bold green]test: {", ".join(values)}[/] with {escape(str(best))} '
            f'(epoch {runner.message_hub.get_info("best_epoch")} of {runner.epoch})',
            highlight=False,
            soft_wrap=True,
        )
    if runner.distributed:  # a process that leaves while another still talks to it is aborted
        barrier()
        torch.distributed.destroy_process_group()
    return 0
