"""`vmzoo verify`: do published weights load, and compute what they did before?"""

import argparse
from pathlib import Path

import timm
import torch

from vmzoo.models._registry import summary_of
from vmzoo.weights import CheckpointError, cache_folder, download_file
from vmzoo.weights.manifest import Digest
from vmzoo.weights.outputs import compare_outputs, sample_outputs

from .names import find_weight
from .output import print_fields


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = 'example: vmzoo verify vmamba_tiny_s1l8'
    parser.add_argument('name', metavar='NAME[.TAG]', help='a model of `vmzoo list --pretrained`')
    parser.add_argument('--cache-dir', type=Path, help='folder to keep files in (default: see `vmzoo cache`)')


def run(args: argparse.Namespace) -> int:
    """Loads the weights strictly, and compares parameters and outputs with what is known.

    Raises:
        ValueError: Unknown model or tag.
        CheckpointError: There are no weights, they do not load, or they compute something else than before.
    """
    weight = find_weight(args.name)
    name = weight.name.partition('.')[0]
    torch.manual_seed(0)  # a model of which the file has only the encoder starts with random weights elsewhere
    model = timm.create_model(weight.name, pretrained=True, cache_dir=args.cache_dir)
    digest = None
    if not weight.hub_id:
        digest = Digest.of_file(download_file(weight.url, args.cache_dir)).sha256
    count = sum(parameter.numel() for parameter in model.parameters())
    if count != summary_of(name).params:
        raise CheckpointError(f'{weight.name} has {count} parameters instead of {summary_of(name).params}')
    if bad := [key for key, value in model.state_dict().items() if not value.isfinite().all()]:
        raise CheckpointError(f'{weight.name} has weights that are not finite: {", ".join(bad[:5])}')
    folder = cache_folder(args.cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / f'{weight.name}.outputs.json'
    difference = compare_outputs(sample_outputs(model, model.pretrained_cfg['input_size']), note, digest)
    fields = [
        ('parameters', f'{count / 1e6:.2f} M, as they should be, all finite'),
        ('SHA-256', f'{digest} ({"recorded" if weight.sha256 else "none is recorded"})' if digest else 'by the hub'),
        ('outputs', f'noted in {note}' if difference is None else f'as noted, to {difference:.0e} of the largest'),
    ]
    print_fields(weight.name, fields)
    return 0
