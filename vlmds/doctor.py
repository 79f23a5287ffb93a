"""`vlmds doctor`: is this machine, or this cluster, ready to train?

As a plain process it looks at one machine; in the place of launch/train.py, under any launcher, at
all of them and at what lies between them. Each check says ok, warning or FAILED, and the mend.
None can hang: local checks run in a thread that is left behind at its deadline, and collectives
have the process group's timeout.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from vlmds.config import Experiment
from vlmds.data.index import CACHED_SHARDS
from vlmds.data.loader import SampleReader, open_dataset, read_batches
from vlmds.errors import InputError, SampleError
from vlmds.files import sync_folder
from vlmds.models.pretrained import published_or_loaded_config
from vlmds.models.vision import vision_half
from vlmds.network import check_clocks, check_network
from vlmds.plan import shapes
from vlmds.report import FAILED, OK, WARNING, Finding, Node, Printer
from vlmds.training.ranks import gather, init_distributed, is_main
from vlmds.training.run import git_commit, versions
from vlmds.training.watch import doing

GIB = 2**30


@dataclass(frozen=True)
class Context:
    """What the checks know. seconds: how long a check may take. wanted: samples per second over
    all ranks that the training is to reach, if anybody said so."""

    experiment: Experiment
    output: Path
    seconds: float
    samples: int
    wanted: float | None
    node: Node
