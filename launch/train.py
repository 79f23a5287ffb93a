"""The target of `deepspeed launch/train.py --exp e7.yaml`; see vlmds/training/main.py."""

import sys

from vlmds.training.main import main

if __name__ == "__main__":
    sys.exit(main())
