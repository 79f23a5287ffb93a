"""launch/train.py, or faulty.py if VLMDS_TEST_FAULT is set, in which CLIP runs one micro-batch ahead as on a GPU.

Rank 0 adds to the file VLMDS_TEST_AHEAD a letter for each time that CLIP works on a micro-batch
of training, and for each forward pass: c, f.
"""

import os
import sys
from pathlib import Path

from vlmds.cli import main
from vlmds.models.assemble import Model
from vlmds.models.captioner import Captioner
from vlmds.training import overlap

NOTE = Path(os.environ["VLMDS_TEST_AHEAD"]) if os.environ.get("RANK", "0") == "0" else None
features, forward = Model.features, Captioner.forward


def note(letter):
    if NOTE is not None:
        with NOTE.open("a") as file:
            file.write(letter)


def noted_features(self, batch):
    if self.captioner.training:
        note("c")
    return features(self, batch)


def noted_forward(self, *inputs):
    if self.training:
        note("f")
    return forward(self, *inputs)


overlap.runs_ahead = lambda device: True
Model.features, Captioner.forward = noted_features, noted_forward

if "VLMDS_TEST_FAULT" in os.environ:
    from tests.training import faulty  # noqa: F401

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
