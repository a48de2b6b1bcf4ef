"""Time operators and models against baselines in the same run, and print the ratios.

    python tools/benchmark.py ops                       # SS2D core and 1-D scan, against what they replace
    python tools/benchmark.py ops --sweep --csv sweep.csv --plot sweep.png
    python tools/benchmark.py models --models convnext_tiny vmamba_tiny_s1l8 --batch-size 128 --train --compile
    python tools/benchmark.py zoo --csv zoo.csv         # every family, against timm's models and unfused scans
    python tools/benchmark.py zoo --families vmamba vim --sizes 224 --budget 10
    python tools/benchmark.py configs mmdet::_base_/models/mask-rcnn_r50_fpn.py --img-size 800 1280 --train \
        --backbones swin_tiny_patch4_window7_224 vmamba_tiny_s1l8   # whole segmentors and detectors, random images
    python tools/benchmark.py plot sweep.csv sweep.png  # draw again, without a GPU

Every figure is the median of repeated runs after a warm-up, whose first call is printed apart: it holds compilation,
unless an earlier run left its result on the disk. Figures of different runs are not comparable: quote the ratios.
VMZOO_SCAN_BACKEND chooses the scan of the models and of the unfused pipeline.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from benchmarks.ops import benchmark_scan, benchmark_ss2d, benchmark_sweeps, linearity
from benchmarks.report import Table, draw, read_csv, write_csv
from benchmarks.timing import Row, Setting

from vmzoo_kernels import available_backends
from vmzoo_kernels.backends import resolve_backend

DTYPES = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}


def shape(text: str) -> tuple[int, ...]:
    """Four sizes, as '128,96,56,1'."""
    sizes = tuple(int(size) for size in text.split(','))
    if len(sizes) != 4 or min(sizes) < 1:
        raise ValueError
    return sizes


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    ops = commands.add_parser('ops', help='the scan operators')
    models = commands.add_parser('models', help='whole models, the first of which is the baseline')
    zoo = commands.add_parser('zoo', help='the smallest standard model of every family')
    configs = commands.add_parser('configs', help='models of mm configs, the first of which is the baseline')
    plot = commands.add_parser('plot', help='draw the sweeps of a CSV file')

    for command in (ops, models, zoo, configs):
        command.add_argument('--device', type=torch.device, default='cuda' if torch.cuda.is_available() else 'cpu')
        command.add_argument('--dtype', choices=DTYPES, help='default: float16 on a GPU, float32 on a CPU')
        command.add_argument('--seconds', type=float, default=1.0, help='time spent on each figure')
        command.add_argument('--csv', type=Path, help='write the figures here')
    ops.add_argument('--backend', nargs='+', default=['auto'], help='ours; the baseline takes the automatic choice')
    ops.add_argument('--shapes', nargs='*', type=shape, metavar='B,C,HW,N', help='SS2D: batch, channels, side, d_state')
    ops.add_argument(
        '--scan-shapes', nargs='*', type=shape, metavar='B,C,L,N', help='1-D: batch, channels, length, d_state'
    )
    ops.add_argument('--sweep', action='store_true', help='instead, vary the size of the map and the batch')
    ops.add_argument('--sides', nargs='+', type=int, help='of the sweep')
    ops.add_argument('--batches', nargs='+', type=int, help='of the sweep')
    ops.add_argument('--plot', type=Path, help='draw the sweep here')
    models.add_argument('--models', nargs='+', default=['convnext_tiny', 'vmamba_tiny_s1l8'])
    models.add_argument('--batch-size', type=int, default=1)
    models.add_argument('--img-size', type=int, default=224)
    models.add_argument('--train', action='store_true', help='time forward and backward pass too, and their memory')
    models.add_argument('--compile', action='store_true', help='under torch.compile too')
    chosen = zoo.add_mutually_exclusive_group()
    chosen.add_argument('--families', nargs='+', metavar='NAME', help='only these (default: all)')
    chosen.add_argument('--models', nargs='+', metavar='NAME', help='instead, these models')
    zoo.add_argument('--baselines', nargs='*', metavar='NAME', help="default: timm's Swin-T and ConvNeXt-T")
    zoo.add_argument('--sizes', nargs='+', type=int, default=[224, 512], metavar='PIXELS', help='sides of the images')
    zoo.add_argument(
        '--batch-size', type=int, help='of 224x224; larger images in smaller batches (default: 64 on a GPU, 1 on a CPU)'
    )
    zoo.add_argument('--budget', type=float, default=30.0, help='seconds for a model at a size, in all')
    configs.add_argument('configs', nargs='+', help="files, names of shipped configs, or 'mmseg::PATH', 'mmdet::PATH'")
    configs.add_argument('--backbones', nargs='+', default=[], metavar='NAME', help="in place of the config's")
    configs.add_argument('--img-size', nargs=2, type=int, default=(512, 512), metavar=('H', 'W'))
    configs.add_argument('--batch-size', type=int, default=2)
    configs.add_argument('--train', action='store_true', help='time forward and backward pass too, and their memory')
    configs.add_argument('--torchvision-ops', action='store_true', help="RoIAlign and NMS of torchvision, not mmcv's")
    plot.add_argument('csv', type=Path)
    plot.add_argument('image', type=Path)
    return parser


def figures(args: argparse.Namespace, setting: Setting, backends: list[str]) -> Iterator[Row]:
    """What was asked for, row by row."""
    if args.command == 'models':
        from benchmarks.models import benchmark_models

        modes = ('eager', 'compile')[: 1 + args.compile]
        yield from benchmark_models(setting, args.models, modes, args.batch_size, args.img_size, args.train)
    elif args.command == 'zoo':
        from benchmarks.zoo import BASELINES, benchmark_zoo

        baselines = BASELINES if args.baselines is None else args.baselines
        batch_size = args.batch_size or (64 if setting.on_gpu else 1)
        yield from benchmark_zoo(setting, args.models, baselines, args.sizes, batch_size, args.budget)
    elif args.command == 'configs':
        from benchmarks.configs import benchmark_configs

        yield from benchmark_configs(
            *(setting, args.configs, args.backbones, tuple(args.img_size), args.batch_size, args.train),
            torchvision_ops=args.torchvision_ops,
        )
    elif args.sweep:
        yield from benchmark_sweeps(setting, backends, args.sides, args.batches)
    else:
        yield from benchmark_ss2d(setting, backends, args.shapes)
        yield from benchmark_scan(setting, backends, args.scan_shapes)


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command == 'plot':
        try:
            draw(read_csv(args.csv), args.image)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        return 0

    on_gpu = args.device.type == 'cuda'
    setting = Setting(args.device, DTYPES[args.dtype or ('float16' if on_gpu else 'float32')], args.seconds)
    backends = getattr(args, 'backend', ())
    reasons = {'auto': None, **available_backends(setting.device)}
    for name in backends:
        if reason := reasons.get(name, f'choose from {", ".join(reasons)}'):
            parser.error(f'no scan backend {name!r}: {reason}')
    drawing = getattr(args, 'plot', None)
    if drawing and not args.sweep:
        parser.error('--plot draws the sweeps: add --sweep')

    if args.command == 'zoo' and not args.models:
        from benchmarks.zoo import standard_models

        try:
            args.models = standard_models(args.families)
        except ValueError as error:
            parser.error(str(error))

    context = setting.describe('mamba-ssm' if args.command == 'ops' else 'timm')
    context['automatic backend'] = resolve_backend('auto', setting.device, setting.dtype)
    print('{device}, {versions}, {dtype}, automatic backend {automatic backend}'.format_map(context))
    rows, table = [], Table()
    for row in figures(args, setting, backends):
        table.add(row)
        rows.append(row | context)
        if args.csv:  # after every row: a run that is cut short has written what it knows
            write_csv(rows, args.csv)
    for line in linearity(rows):
        print(f'\n{line}')
    if drawing:
        draw(rows, drawing)
    return 0


if __name__ == '__main__':
    sys.exit(main())
