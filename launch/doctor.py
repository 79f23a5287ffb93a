"""`vlmds doctor` under a launcher: put it where launch/train.py would stand."""

import os
import sys

from vlmds.cli import main

if __name__ == "__main__":
    code = main(["doctor", *sys.argv[1:]])
    sys.stdout.flush()
    sys.stderr.flush()
    # Python's own end takes connections down, and aborts where the other side is gone.
    os._exit(code)
