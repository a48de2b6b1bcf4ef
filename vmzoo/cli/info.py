"""`vmzoo info NAME`: one model in full."""

import argparse
import json

from vmzoo.models._registry import summary_of
from vmzoo.weights import published_weights

from .names import find_model
from .output import print_fields


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = 'examples: vmzoo info vmamba_tiny_s1l8 | vmzoo info vmamba_v0_base.dp05_in1k'
    parser.add_argument('name', help='a name from `vmzoo list`, with or without a tag')
    parser.add_argument('--json', action='store_true', help='print JSON')


def run(args: argparse.Namespace) -> int:
    """Prints the facts.

    Raises:
        ValueError: Unknown model or tag.
    """
    name, cfg = find_model(args.name)
    summary = summary_of(name)
    weights = [weight for weight in published_weights() if weight.name.partition('.')[0] == name]
    if args.json:
        facts = {
            **vars(summary),
            'num_classes': cfg.num_classes,
            'mean': cfg.mean,
            'std': cfg.std,
            'interpolation': cfg.interpolation,
            'crop_pct': cfg.crop_pct,
            'license': cfg.license,
            'paper': cfg.paper_ids,
            'source': cfg.origin_url,
            'weights': [vars(weight) for weight in weights],
        }
        print(json.dumps(facts, indent=2))
        return 0

    fields = [
        ('family', summary.family),
        ('task', summary.task),
        ('parameters', f'{summary.params / 1e6:.2f} M'),
        ('cost', f'{summary.gmacs:.3g} G multiply-accumulates at {"x".join(map(str, summary.input_size))}'),
        ('input', f'{"x".join(map(str, cfg.input_size))}' + (' (fixed)' if cfg.fixed_input_size else ' (any size)')),
        (
            'preprocessing',
            f'{cfg.interpolation}, crop {cfg.crop_pct}, mean {_numbers(cfg.mean)}, std {_numbers(cfg.std)}',
        ),
        ('classes', str(cfg.num_classes) if cfg.num_classes else 'none: it returns features'),
    ]
    if summary.channels:
        maps = ', '.join(f'{c} (1/{r})' for c, r in zip(summary.channels, summary.reductions, strict=True))
        fields.append(('features', f'{maps}: channels and scale of features_only=True'))
    fields += [
        ('paper', f'{cfg.paper_name} ({cfg.paper_ids})'),
        ('source', cfg.origin_url),
        ('licence', ' '.join(filter(None, (cfg.license, cfg.description)))),
    ]
    for weight in weights:
        top1 = weight.metrics.get('imagenet1k_top1')
        accuracy = f'ImageNet-1k top-1 {top1} %, as published; ' if top1 else ''
        checked = f'SHA-256 {weight.sha256}' if weight.sha256 else 'no digest recorded'
        copy = f'; pretrained=True takes the copy hf-hub:{weight.hub_id}' if weight.hub_id else ''
        fields.append((f'weights {weight.name.partition(".")[2]}', f'{weight.url} ({accuracy}{checked}{copy})'))
    if not weights:
        fields.append(('weights', 'none published'))
    print_fields(name, fields)
    return 0


def _numbers(values: tuple[float, ...]) -> str:
    return '/'.join(f'{value:g}' for value in values)
