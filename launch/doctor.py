"""`vlmds doctor` under a launcher: put it where launch/train.py would stand."""

import sys

from vlmds.cli import main

if __name__ == "__main__":
    sys.exit(main(["doctor", *sys.argv[1:]]))
