"""How many CPU cores a process may keep busy."""

from __future__ import annotations

import os


def cores_of_rank() -> int:
    """For this rank to read and decode with, at least 1: the cores that its process may run on,
    shared with the other ranks of its node."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    return max(1, len(os.sched_getaffinity(0)) // int(ranks))
