"""The number of CPU cores that a rank may use."""

from __future__ import annotations

import os


def cores_of_rank() -> int:
    """Cores of this rank, at least 1: those that its process may run on, divided by the ranks of its node."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    return max(1, len(os.sched_getaffinity(0)) // int(ranks))
