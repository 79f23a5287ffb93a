"""launch/train.py that stops after the second stage's first checkpoint and waits to be killed: tiny
models could finish the stage before the checkpoint is noticed."""

import sys
import time
from pathlib import Path

from vlmds.cli import main
from vlmds.training import checkpoint

publish = checkpoint.publish


def publish_and_wait(temporary: Path, folder: Path, *more) -> None:
    publish(temporary, folder, *more)
    if folder.name.startswith("finetune-"):
        time.sleep(600)  # training waits for this thread before it saves again, or ends


checkpoint.publish = publish_and_wait

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
