"""Train from a config; the same as `vmzoo train`, as a script for torchrun."""

import sys

from vmzoo.cli.main import main

if __name__ == '__main__':
    sys.exit(main(['train', *sys.argv[1:]]))
