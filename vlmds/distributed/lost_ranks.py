"""Reports of a lost rank: which one it is, and what to do.

The surviving ranks notice it by an error of the collective that they wait in, whose traceback says
nothing about the cause. A rank that ends by an exception first notes that in the job's store; a process
that is gone without such a note was killed. Only ranks on its own machine can see that: they note it for
ranks on other machines.
"""

from __future__ import annotations

import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from vlmds.console.progress import log_line
from vlmds.distributed.deadline import finishes_within
from vlmds.files import machine

SETTLE_SECONDS = 3.0  # until a process has ended and notes have arrived
STORE_SECONDS = 5.0  # a store that takes longer to answer is taken to be gone
AGAIN = "run the same command again to continue"
_LOST = re.compile(
    r"connection (was likely )?closed|connection reset|broken pipe|socket closed|"
    r"got 0 bytes|remote process exited",
    re.IGNORECASE,
)
_FAILED, _SURVIVED = "failed", "survived"


def connection_lost(error: BaseException) -> bool:
    """Whether this is the error of a collective, or of the store, when the process at the other end is gone."""
    of_ranks = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))
    return of_ranks and _LOST.search(str(error)) is not None


def reports_for_machine() -> bool:
    """Whether this rank reports what every rank of its machine notices: true for the first rank of each
    machine, and for rank 1, because rank 0 may be the lost one."""
    return os.environ.get("LOCAL_RANK", "0") == "0" or os.environ.get("RANK") == "1"


def note_process(store: dist.Store) -> None:
    """Record this rank's process for the other ranks; called when the ranks have joined."""
    store.set(f"process-{dist.get_rank()}", f"{machine()} {os.getpid()}")


def note_failure(store: dist.Store) -> None:
    """Record that this rank ends by an error of its own, which it reports."""
    store.set(f"end-{dist.get_rank()}", _FAILED)


def report_loss(store: dist.Store | None) -> None:
    """Print on stderr, once on each machine, which rank died, what it was doing and what to do.

    Args:
        store: that of :func:`note_process`; None if the ranks had not joined yet.
    """
    found: list[str] = []
    if store is not None:
        finishes_within(SETTLE_SECONDS + STORE_SECONDS, lambda: _find_cause(store, found))
    if not found and reports_for_machine():
        found.append(
            "the connection to rank 0 is lost; the first line of another rank names the "
            f"cause, unless rank 0's machine or the network failed; {AGAIN}"
        )
    rank = os.environ.get("RANK", "0")
    if found and found[0]:
        log_line(f"vlmds: rank {rank}: {found[0]}", sys.stderr)
    if rank == "0" and store is not None:  # the store is in this process, and other ranks still use it
        time.sleep(SETTLE_SECONDS)


def _find_cause(store: dist.Store, found: list[str]) -> None:
    """Append the line to `found`, or an empty one if another rank of this machine prints it."""
    with suppress(RuntimeError):  # the store's host is gone: nothing is found
        mine, world = dist.get_rank(), dist.get_world_size()
        store.set(f"end-{mine}", _SURVIVED)
        end = time.monotonic() + SETTLE_SECONDS
        while True:
            ended = {rank: _get(store, f"end-{rank}") for rank in range(world)}
            dead = [rank for rank, how in ended.items() if how is None and _gone(store, rank)]
            failed = [rank for rank, how in ended.items() if how == _FAILED]
            if dead or failed or time.monotonic() > end:
                break
            time.sleep(0.1)
        if dead:
            store.set("died", _names(dead))
        if store.add(f"reported-{machine()}", 1) > 1:
            found.append("")
            return
        found.append(_line(store, dead, failed))


def _line(store: dist.Store, dead: list[int], failed: list[int]) -> str:
    if dead:
        doing = _get(store, str(dead[0]))
        was = f" while it was {doing}" if doing and len(dead) == 1 else ""
        return f"{_names(dead)} died{was}; {AGAIN}"
    if failed:
        return f"{_names(failed)} failed first; its message names the cause"
    if died := _get(store, "died"):
        return f"{died} died; {AGAIN}"
    return f"the connection to another rank is lost: a process, a machine or the network failed; {AGAIN}"


def _names(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _get(store: dist.Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


def _gone(store: dist.Store, rank: int) -> bool:
    """Whether the rank's process was on this machine and has ended."""
    where, _, pid = (_get(store, f"process-{rank}") or "").partition(" ")
    if where != machine():
        return False
    try:
        # The state follows the name, which is in brackets; a zombie has ended and waits for its launcher.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except FileNotFoundError:
        return Path("/proc/self/stat").is_file()
