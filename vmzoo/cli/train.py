"""`vmzoo train`: train from a config of any task. Also runs under torchrun, as tools/train.py."""

import argparse
from contextlib import contextmanager
from pathlib import Path


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """What `vmzoo train` and `vmzoo test` share."""
    parser.add_argument('config', help='path of a config file of any mm library, or the name of a shipped one')
    parser.add_argument('--model', metavar='NAME', help='any name of `vmzoo list` or timm.list_models()')
    parser.add_argument(
        '--data',
        metavar='DIR',
        help="data folder: train/<class>/*.jpg and val/<class>/*.jpg, or what replaces the config's data_root",
    )
    parser.add_argument('--work-dir', metavar='DIR', help='where checkpoints and logs go (default: work_dirs/<config>)')
    parser.add_argument('--seed', type=int, help="random seed (default: the config's, or 0)")
    parser.add_argument(
        '--skip-broken', action='store_true', help='leave out unreadable image files instead of stopping'
    )
    parser.add_argument(
        '--pictures', action='store_true', help='draw predictions while validating and testing (mmseg, mmdet)'
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm'], default='none', help='how processes start')
    parser.add_argument('--local-rank', type=int, help=argparse.SUPPRESS)  # torch.distributed.launch passes it
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='K=V', help='other changes, e.g. train_dataloader.batch_size=32'
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Train a classifier, segmentor or detector from a config: a file, or a shipped one by its name.'
    )
    parser.epilog = (
        'examples: vmzoo train vmamba_nano_digits | '
        'vmzoo train image_folder --model vmamba_tiny_s1l8 --data data --pretrained --amp | '
        'torchrun --nproc_per_node 8 tools/train.py image_folder --model vim_tiny_patch16_224 --data data '
        '--launcher pytorch'
    )
    add_config_arguments(parser)
    parser.add_argument(
        '--pretrained',
        nargs='?',
        const=True,
        metavar='FILE',
        help="start from the backbone's published weights, or from a checkpoint file of it",
    )
    parser.add_argument(
        '--load-from', metavar='FILE', help='start from the weights of a whole model, e.g. a detector for other classes'
    )
    parser.add_argument(
        '--epochs', type=int, metavar='N', help='length of the training; the schedule is stretched to it'
    )
    parser.add_argument(
        '--resume', action='store_true', help="go on from the work folder's latest checkpoint, if there is one"
    )
    parser.add_argument(
        '--amp',
        nargs='?',
        const='auto',
        choices=['auto', 'bfloat16', 'float16'],
        help='mixed precision; auto is bfloat16 where the device has it',
    )
    parser.add_argument('--ema', action='store_true', help='evaluate and keep a moving average of the weights')


def read_config(args: argparse.Namespace):
    """The config that the arguments of `add_config_arguments` describe, not yet complete."""
    from mmengine.config import Config

    from vmzoo.mm.config import find_config, is_classifier, loaders, move_data

    path = find_config(args.config)
    cfg = Config.fromfile(str(path))
    missing = [key for key in ('model', 'train_cfg', 'train_dataloader', 'optim_wrapper') if not cfg.get(key)]
    if missing:
        raise ValueError(f'{path} is no training config: it lacks {", ".join(missing)}')
    datasets = [loader.dataset for loader in loaders(cfg)]
    folder = is_classifier(cfg) and 'root' in datasets[0]
    if (args.skip_broken and not folder) or (args.data and is_classifier(cfg) and not folder):
        raise ValueError(f'{path.name} has its own data: --data and --skip-broken go with image_folder')
    if args.model:
        backbone_of(cfg, '--model').model_name = args.model
    if args.data and not folder:
        move_data(cfg, args.data)
    for dataset in datasets if folder else ():
        if args.data:
            dataset.root = args.data
        if args.skip_broken:
            dataset.skip_broken = True
    if args.seed is not None:
        cfg.randomness = dict(cfg.get('randomness') or {}, seed=args.seed)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{path.stem}'
    return cfg


def backbone_of(cfg, option: str):
    """The part of a config that names a model of timm.

    Raises:
        ValueError: There is none, so that the option cannot be followed.
    """
    from vmzoo.mm.config import is_classifier

    part = cfg.model if is_classifier(cfg) else cfg.model.get('backbone', {})
    if 'model_name' not in part:
        raise ValueError(f'{option}: the backbone of this config is no VMZooBackbone')
    return part


def finish_config(cfg, args: argparse.Namespace):
    """Apply `--cfg-options` and `--pictures`, and complete the config."""
    from vmzoo.mm.config import complete, draw_predictions, parse_options

    cfg.merge_from_dict(parse_options(args.cfg_options, cfg))
    cfg = complete(cfg)
    if args.pictures:
        draw_predictions(cfg)
    return cfg


def load_config(args: argparse.Namespace):
    """The config that the arguments of `vmzoo train` describe, complete.

    Raises:
        FileNotFoundError, ValueError: See `vmzoo.mm.config.complete` and the datasets.
    """
    from vmzoo.mm.config import add_hook, set_epochs

    cfg = read_config(args)
    for option, file in (('--pretrained', args.pretrained), ('--load-from', args.load_from)):
        if file and file is not True and not Path(file).is_file():
            raise FileNotFoundError(f'{option}: there is no file {file}')
    if args.pretrained:
        backbone_of(cfg, '--pretrained').pretrained = args.pretrained
    if args.load_from:
        cfg.load_from = args.load_from
    if args.epochs is not None:
        set_epochs(cfg, args.epochs)
    if args.amp:
        cfg.optim_wrapper.update(type='AutocastOptimWrapper', dtype=args.amp)
    if args.ema:
        # The average follows the weights closely at first, then over about 500 steps.
        add_hook(cfg, type='EMAHook', ema_type='MomentumAnnealingEMA', momentum=0.002, gamma=10)
    return finish_config(cfg, args)


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
    """Train, then measure a classifier's best checkpoint on the test set.

    Raises:
        FileExistsError: The work folder holds a training that this one would overwrite.
        FloatingPointError: The loss became NaN or Inf.
        ImportError: The training extra, or the library of the config's strategy, is not installed.
        FileNotFoundError, ValueError: See `load_config`.
    """
    import torch

    import vmzoo.mm  # noqa: F401  says what to install, before mmengine's own import fails

    cfg = load_config(args)
    from mmengine.dist import barrier, is_main_process

    from vmzoo.mm.checkpoint import latest_checkpoint
    from vmzoo.mm.runner import build_runner

    work_dir = Path(cfg.work_dir)
    if latest := latest_checkpoint(work_dir):
        if not args.resume:
            raise FileExistsError(
                f'{work_dir} holds a training: add --resume to go on with it, or give another --work-dir'
            )
        cfg.resume, cfg.load_from = True, str(latest)
    runner = build_runner(cfg)
    runner.train()
    barrier()  # the main process may still be writing best.pth
    report(cfg, runner, work_dir / 'best.pth', quiet=not is_main_process())
    if runner.distributed:  # a process that leaves while another still talks to it is aborted
        barrier()
        torch.distributed.destroy_process_group()
    return 0


def report(cfg, runner, best: Path, quiet: bool) -> None:
    """Say where the best checkpoint is and, of a classifier, measure it on the test set."""
    from rich.console import Console
    from rich.markup import escape

    from vmzoo.mm.config import is_classifier
    from vmzoo.mm.runner import evaluate

    info = runner.message_hub.runtime_info
    if 'best_epoch' not in info:
        return
    if is_classifier(cfg):
        when = f'epoch {info["best_epoch"]} of {runner.epoch}'
        if not cfg.get('test_dataloader'):
            return
        values = [f'{key} {value:.2f} %' for key, value in evaluate(cfg, best).items() if isinstance(value, float)]
        line = f'test: {", ".join(values)}[/] with {escape(str(best))} ({when})'
    else:
        line = (
            f'best: {info["best_score"]:.4g}[/] in {escape(str(best))} (iteration {info["best_iter"]} of {runner.iter})'
        )
    Console(quiet=quiet).print(f'[bold green]{line}', highlight=False, soft_wrap=True)
