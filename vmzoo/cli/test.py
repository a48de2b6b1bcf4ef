"""`vmzoo test`: measure a checkpoint on a config's test set. Also runs under torchrun, as tools/test.py."""

import argparse
import json

from .train import add_config_arguments, explained_options, finish_config, read_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Measure a checkpoint on a config's test set; the last line of the output is JSON."
    parser.epilog = 'example: vmzoo test vmamba_nano_digits work_dirs/vmamba_nano_digits/best.pth'
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='file with the weights, e.g. best.pth')


def load_config(args: argparse.Namespace):
    """The config that the arguments of `vmzoo test` describe, complete."""
    return finish_config(read_config(args), args)


@explained_options()
def run(args: argparse.Namespace) -> int:
    """Measure and print.

    Raises:
        CheckpointError, FileNotFoundError, ImportError, ValueError: See `vmzoo.mm.runner.evaluate`.
    """
    import torch

    import vmzoo.mm  # noqa: F401  says what to install, before mmengine's own import fails

    cfg = load_config(args)
    from mmengine.dist import barrier, is_main_process

    from vmzoo.mm.runner import evaluate

    metrics = evaluate(cfg, args.checkpoint)
    if is_main_process():
        print(json.dumps(metrics))
    if torch.distributed.is_initialized():
        barrier()
        torch.distributed.destroy_process_group()
    return 0
