"""launch/train.py that waits to be killed once it has saved the second stage's first checkpoint:
tiny models could be through with the stage before anybody sees that checkpoint."""

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
