"""`python -m vlmds.cli`: the command `vlmds`, for launchers that take a module."""

import sys

from vlmds.cli import main

sys.exit(main())
