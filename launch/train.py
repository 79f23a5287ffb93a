"""The target of `deepspeed launch/train.py --exp e7.yaml`: `vlmds train` under a launcher."""

import sys

from vlmds.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
