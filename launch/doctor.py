"""`vlmds doctor` under a launcher: use it instead of launch/train.py in the same command."""

import os
import sys

from vlmds.cli import main

if __name__ == "__main__":
    code = main(["doctor", *sys.argv[1:]])
    sys.stdout.flush()
    sys.stderr.flush()
    # Python's normal exit closes connections, and aborts if the other side is gone.
    os._exit(code)
