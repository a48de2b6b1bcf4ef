"""`vmzoo cache`: the downloaded files."""

import argparse
import fnmatch
import json
from pathlib import Path

from vmzoo.weights import cache_folder, cached_files, published_weights, remove_cached

from .output import bytes_text, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "examples: vmzoo cache | vmzoo cache --remove 'vssm*.pth'"
    parser.add_argument('--cache-dir', type=Path, help='folder to look at (default: $VMZOO_HOME, or that of torch.hub)')
    parser.add_argument(
        '--remove', nargs='+', metavar='FILE', help="files to delete with what is known of them: '*.pth'"
    )
    parser.add_argument('--json', action='store_true', help='print JSON')


def run(args: argparse.Namespace) -> int:
    """Prints a table, or JSON, of the files, or of those that were removed.

    Raises:
        ValueError: A file to remove is not in the cache.
    """
    folder = cache_folder(args.cache_dir)
    names: dict[str, str] = {}  # of the weights that are in a file: other models may start from them
    for weight in published_weights():
        if not weight.hub_id:
            names[weight.url] = ', '.join(filter(None, (names.get(weight.url), weight.name)))
    files = cached_files(folder, names)
    if args.remove:
        for pattern in args.remove:
            if not any(fnmatch.fnmatchcase(file.path.name, pattern) for file in files):
                raise ValueError(f'{folder} has no file {pattern}; `vmzoo cache` lists what it has')
        files = [file for file in files if any(fnmatch.fnmatchcase(file.path.name, name) for name in args.remove)]
        for file in files:
            remove_cached(file.path)
    if args.json:
        records = [{**vars(file), 'path': str(file.path), 'weights': names.get(file.url)} for file in files]
        print(json.dumps(records, indent=2))
        return 0
    if files:
        rows = [(file.path.name, bytes_text(file.size), file.state, names.get(file.url, file.url)) for file in files]
        print_table(['file', 'size', 'checked', 'weights'], rows, right=['size'])
    total = bytes_text(sum(file.size for file in files))
    print(f'{"removed" if args.remove else "files"}: {len(files)}, {total}, in {folder}')
    return 0
