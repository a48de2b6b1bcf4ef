"""Entry point of the `vmzoo` command. A subcommand's module is imported only when it is asked for."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import vmzoo

COMMANDS = {
    'list': 'list the models, by family, task or size',
    'info': 'show everything known about one model',
    'download': 'fetch published weights, for machines without internet',
    'verify': 'check that published weights load and compute what they did',
    'cache': 'list or remove downloaded files',
    'predict': 'classify images',
    'segment': 'segment medical images and volumes',
    'train': 'train a classifier, segmentor or detector',
    'test': 'measure a checkpoint on the test set of a config',
    'doctor': 'show versions, devices and the scan backend in use',
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand.

    Returns:
        0 on success, 1 if the command failed with an explained error, 130 after Ctrl-C. A wrong usage exits with 2.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog='vmzoo', description='Vision backbones built on 2D selective scans.')
    parser.add_argument('--version', action='version', version=f'vmzoo {vmzoo.__version__}')
    subparsers = parser.add_subparsers(dest='command', metavar='command', required=True)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=f'{summary.capitalize()}.')
        if name in argv[:1]:
            module = import_module(f'.{name}', __package__)
            module.add_arguments(subparser)
            subparser.add_argument('--debug', action='store_true', help='on an error, show where it arose')
    args = parser.parse_args(argv)

    from vmzoo.weights import CheckpointError

    try:
        return module.run(args)
    except KeyboardInterrupt:
        print('vmzoo: interrupted', file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the output (`| head`) has gone; nothing may be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CheckpointError, OSError, ValueError, ImportError, FloatingPointError) as error:
        if args.debug:
            raise
        print(f'vmzoo {args.command}: error: {error}', file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main())
