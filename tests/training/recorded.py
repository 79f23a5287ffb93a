"""launch/train.py, which at its end prints each phase that rank 0 announced as a line
`phase {"what": …, "done": …, "total": …}`, in the order in which they began."""

import json
import os
import sys

from vlmds.cli import main
from vlmds.console import progress

announced = []


class Recorded(progress.Phase):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        announced.append(self)


progress.Phase = Recorded

if __name__ == "__main__":
    code = main(["train", *sys.argv[1:]])
    if os.environ.get("RANK", "0") == "0":
        for phase in announced:
            print("phase", json.dumps({n: getattr(phase, n) for n in ("what", "done", "total")}))
    sys.exit(code)
