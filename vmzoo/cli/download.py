"""`vmzoo download`: fetches published weights into the cache, for machines without internet."""

import argparse
import sys
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError
from timm.models import load_state_dict_from_hf

from vmzoo.models._registry import family_of, list_architectures
from vmzoo.weights import CheckpointError, PublishedWeight, cached_files, download_file, published_weights

from .names import find_weight
from .output import bytes_text, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = 'examples: vmzoo download vmamba_tiny_s1l8 vmamba_v0_base.dp05_in1k | vmzoo download --all-of vim'
    parser.add_argument('names', nargs='*', metavar='NAME[.TAG]', help='models, as in `vmzoo list --pretrained`')
    families = sorted({family_of(name) for name in list_architectures()})
    parser.add_argument('--all-of', choices=families, metavar='FAMILY', help='every weight of a family')
    parser.add_argument('--cache-dir', type=Path, help='folder to keep files in (default: see `vmzoo cache`)')


def run(args: argparse.Namespace) -> int:
    """Downloads what is not in the cache, and prints where each file is; one that fails does not stop the others.

    Raises:
        ValueError: No name is given, or an unknown one.
        CheckpointError: A model has no published weights.
    """
    weights = _wanted(args)
    rows, failed = [], False
    for weight in weights:
        try:
            rows.append((weight.name, *_fetch(weight, args.cache_dir)))
        except (CheckpointError, OSError, HfHubHTTPError) as error:
            failed = True
            print(f'vmzoo download: error: {weight.name}: {error}', file=sys.stderr)
    if rows:
        print_table(['weights', 'file', 'size', 'checked'], rows, right=['size'])
    return int(failed)


def _wanted(args: argparse.Namespace) -> list[PublishedWeight]:
    if bool(args.names) == bool(args.all_of):
        raise ValueError('give names of models, or --all-of FAMILY')
    if args.names:
        return [find_weight(name) for name in args.names]
    found = [weight for weight in published_weights() if family_of(weight.name.partition('.')[0]) == args.all_of]
    if not found:
        raise CheckpointError(f'no weights that can be downloaded are published for {args.all_of}')
    return found


def _fetch(weight: PublishedWeight, cache_dir: Path | None) -> tuple[str, str, str]:
    """Returns where the file is, its size, and what it was compared with."""
    if weight.hub_id:
        state_dict = load_state_dict_from_hf(weight.hub_id, cache_dir=cache_dir)
        size = sum(value.nbytes for value in state_dict.values())
        return f'hf-hub:{weight.hub_id}', bytes_text(size), 'by huggingface_hub'
    path = download_file(weight.url, cache_dir)
    file = next(file for file in cached_files(path.parent, [weight.url]) if file.path == path)
    return str(path), bytes_text(file.size), file.state
