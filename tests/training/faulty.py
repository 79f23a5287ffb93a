"""launch/train.py with a fault: VLMDS_TEST_FAULT is JSON {kind, rank, call}.

The fault occurs on that rank at forward pass number `call` (from 1) of training, or for "stuck" at
sample number `call` that the rank reads; the machine's monotonic clock is then written to the file
"note". "load": the rank cannot load its language model. "full": a disk is. "wait" stands for
a wait for a GPU that never ends; with "alone" all other ranks are killed then. "lock" (Python's
own, held in C) and "stop" (SIGSTOP) are over after "seconds".
"""

import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from vlmds.cli import main
from vlmds.data.loader import SampleReader
from vlmds.errors import InputError
from vlmds.models import assemble
from vlmds.models.captioner import Captioner

FAULT = json.loads(os.environ["VLMDS_TEST_FAULT"])
MINE = int(os.environ.get("RANK", 0)) == FAULT["rank"]
calls = {"forward": 0, "load": 0}
forward, load = Captioner.forward, SampleReader.load


def strike():
    if "note" in FAULT:
        Path(FAULT["note"]).write_text(str(time.monotonic()))


def faulty_forward(self, *inputs):
    loss = forward(self, *inputs)
    if self.training and MINE:
        calls["forward"] += 1
        kind = FAULT["kind"]
        if kind == "nan" and calls["forward"] in FAULT["calls"]:
            strike()
            return loss * float("nan")
        if kind == "infinite" and calls["forward"] in FAULT["calls"]:  # its gradient is finite
            strike()
            return loss + float("inf")
        if kind != "stuck" and calls["forward"] == FAULT.get("call"):
            strike()
            if kind == "exception":
                raise RuntimeError("injected failure")
            if kind == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/disk")
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "signal":
                os.kill(os.getpid(), getattr(signal, FAULT["name"]))
            if kind in ("wait", "alone"):
                time.sleep(3600)
            if kind == "lock":
                ctypes.PyDLL(None).sleep(FAULT["seconds"])
            if kind == "stop":
                subprocess.Popen(["sh", "-c", f"sleep {FAULT['seconds']}; kill -CONT {os.getpid()}"])
                os.kill(os.getpid(), signal.SIGSTOP)
            if kind == "truncate":
                os.truncate(FAULT["path"], 1000)
            if kind == "delete":
                os.unlink(FAULT["path"])
    elif self.training and FAULT["kind"] == "alone":
        calls["forward"] += 1
        if calls["forward"] == FAULT["call"]:
            os.kill(os.getpid(), signal.SIGKILL)
    return loss


def faulty_load(self, position):
    calls["load"] += 1
    if MINE and FAULT["kind"] == "stuck" and calls["load"] == FAULT["call"]:
        strike()
        time.sleep(3600)
    return load(self, position)


def faulty_load_language_model(*_):
    raise InputError("llm.model: injected failure")


Captioner.forward, SampleReader.load = faulty_forward, faulty_load
if FAULT["kind"] == "load" and MINE:
    assemble.load_language_model = faulty_load_language_model

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
