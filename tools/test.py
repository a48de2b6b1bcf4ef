"""Measure a checkpoint on a config's test set, e.g.

python tools/test.py vmamba_nano_digits work_dirs/vmamba_nano_digits/best.pth
"""

import argparse
import json

from vmzoo.cli import train


def main() -> None:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    parser.description = __doc__
    parser.epilog = None
    parser.add_argument('checkpoint', help='file with the weights, e.g. best.pth')
    args = parser.parse_args()

    from vmzoo.mm.runner import evaluate

    print(json.dumps(evaluate(train.load_config(args), args.checkpoint)))


if __name__ == '__main__':
    main()
