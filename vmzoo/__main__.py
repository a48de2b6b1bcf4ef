"""`python -m vmzoo` is the `vmzoo` command."""

import sys

from vmzoo.cli.main import main

sys.exit(main())
