"""When another rank is gone: which one, and what to do. The survivors find out by an error of the
collective that they wait in, whose traceback says nothing about the cause.

A rank that ends by an exception notes that in the job's store first; so one whose process is gone
without a note was killed. That can be seen on its own machine alone: there a survivor notes it for
those on other machines.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from vlmds.console.progress import tell
from vlmds.files import machine

SETTLE_SECONDS = 3.0  # for a process to be gone, and for notes to arrive
STORE_SECONDS = 5.0  # an answer of the store that takes longer will not come
AGAIN = "run the same command again to continue from the last checkpoint"
_LOST = re.compile(
    r"connection (was likely )?closed|connection reset|broken pipe|socket closed|"
    r"got 0 bytes|remote process exited",
    re.IGNORECASE,
)
_FAILED, _SURVIVED = b"failed", b"survived"


def connection_lost(error: BaseException) -> bool:
    """Whether a collective or the store failed because a process at the other end is gone."""
    of_ranks = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))
    return of_ranks and _LOST.search(str(error)) is not None


def speaks() -> bool:
    """Whether this rank reports what every rank of its machine finds: the first one of a machine,
    and rank 1, because it may be rank 0 that is gone."""
    return os.environ.get("LOCAL_RANK", "0") == "0" or os.environ.get("RANK") == "1"


def answered(ask: Callable[[], None], seconds: float) -> bool:
    """Call ``ask``, which asks the store, in another thread: where the store's host cannot be
    reached, no answer ever comes. Returns whether it was over in time."""
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return not asking.is_alive()


def note_process(store: dist.Store) -> None:
    """Let the others find this rank's process; called when the ranks have joined."""
    store.set(f"process-{dist.get_rank()}", f"{machine()} {os.getpid()}")


def note_failure(store: dist.Store) -> None:
    """This rank ends by an error of its own, which it reports."""
    store.set(f"end-{dist.get_rank()}", _FAILED)


def report_loss(store: dist.Store | None) -> None:
    """Print on stderr, once on each machine, which rank died, what it was doing and what to do.

    Args:
        store: of :func:`note_process`; None if the ranks were still joining.
    """
    found: list[str] = []
    if store is not None:
        answered(lambda: _ask(store, found), SETTLE_SECONDS + STORE_SECONDS)
    if not found:
        found.append(
            f"the connection to rank 0 is lost; the first line of another rank names the "
            f"cause, unless rank 0's machine or the network failed; {AGAIN}"
            if speaks()
            else ""
        )
    rank = os.environ.get("RANK", "0")
    if found[0]:
        tell(f"vlmds: rank {rank}: {found[0]}", sys.stderr)
    if rank == "0" and store is not None:  # this process holds it, and the others still ask it
        time.sleep(SETTLE_SECONDS)


def _ask(store: dist.Store, found: list[str]) -> None:
    """Put the line into `found`, an empty one if another rank of this machine prints it."""
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
        was = f" while it was {doing.decode()}" if doing and len(dead) == 1 else ""
        return f"{_names(dead)} died{was}; {AGAIN}"
    if failed:
        return f"{_names(failed)} failed first; its message names the cause"
    died = _get(store, "died")
    if died:
        return f"{died.decode()} died; {AGAIN}"
    return f"the connection to another rank is lost: a process, a machine or the network failed; {AGAIN}"


def _names(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _get(store: dist.Store, key: str) -> bytes | None:
    return store.get(key) if store.check([key]) else None


def _gone(store: dist.Store, rank: int) -> bool:
    """Whether the rank's process was on this machine and is there no more."""
    where, _, pid = (_get(store, f"process-{rank}") or b"").decode().partition(" ")
    if where != machine():
        return False
    try:
        # After the name, in brackets, comes the state; a zombie waits for its launcher.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except FileNotFoundError:
        return Path("/proc/self/stat").is_file()
