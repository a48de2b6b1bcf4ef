"""Measure a checkpoint on a config's test set; the same as `vmzoo test`, as a script for torchrun."""

import sys

from vmzoo.cli.main import main

if __name__ == '__main__':
    sys.exit(main(['test', *sys.argv[1:]]))
