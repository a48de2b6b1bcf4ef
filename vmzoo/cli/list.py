"""`vmzoo list`: the registered models."""

import argparse
import fnmatch
import json

from vmzoo.models._registry import ModelSummary, default_cfgs_of, list_architectures, summary_of

from .output import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    summaries = [summary_of(name) for name in list_architectures()]
    parser.epilog = "examples: vmzoo list 'vim_*' | vmzoo list --family vmamba --max-params 40 --pretrained"
    parser.add_argument('pattern', nargs='?', default='*', help="names to show, as 'vim_*' (default: all)")
    parser.add_argument('--family', choices=sorted({s.family for s in summaries}), help='only this family')
    parser.add_argument('--task', choices=sorted({s.task for s in summaries}), help='only models for this task')
    parser.add_argument(
        '--min-params', type=float, default=0.0, metavar='M', help='at least this many million parameters'
    )
    parser.add_argument('--max-params', type=float, default=float('inf'), metavar='M', help='at most this many million')
    parser.add_argument('--pretrained', action='store_true', help='only models with published weights')
    parser.add_argument('--json', action='store_true', help='print JSON')


def run(args: argparse.Namespace) -> int:
    """Prints a table, or JSON.

    Raises:
        ValueError: No model matches.
    """
    rows = [(summary, _tags(summary.name)) for summary in map(summary_of, list_architectures(args.family))]
    rows = [(summary, tags) for summary, tags in rows if _matches(summary, tags, args)]
    if not rows:
        raise ValueError('no model matches; `vmzoo list` shows all')
    if args.json:
        print(json.dumps([{**_record(summary), 'weights': tags} for summary, tags in rows], indent=2))
        return 0
    print_table(
        ['model', 'family', 'task', 'params (M)', 'GMACs', 'input', 'weights'],
        [
            (
                s.name,
                s.family,
                s.task,
                f'{s.params / 1e6:.1f}',
                f'{s.gmacs:.3g}',
                'x'.join(map(str, s.input_size)),
                ', '.join(tags) or '-',
            )
            for s, tags in rows
        ],
        right=['params (M)', 'GMACs'],
    )
    return 0


def _tags(name: str) -> list[str]:
    return [tag for tag, cfg in default_cfgs_of(name).items() if cfg.has_weights]


def _matches(summary: ModelSummary, tags: list[str], args: argparse.Namespace) -> bool:
    return (
        fnmatch.fnmatchcase(summary.name, args.pattern)
        and args.task in (None, summary.task)
        and args.min_params <= summary.params / 1e6 <= args.max_params
        and (bool(tags) or not args.pretrained)
    )


def _record(summary: ModelSummary) -> dict[str, object]:
    return {key: getattr(summary, key) for key in ('name', 'family', 'task', 'params', 'gmacs', 'input_size')}
