"""The watchdog: no rank hangs without a message that says where.

Before whatever may take long or fail, a rank calls :func:`doing`, which notes it here and in the
job's key-value store, where the other ranks can read it even when this one is dead. If a rank stays
with one thing for longer than the job's timeout, a thread of its own reports that and ends the
process; launchers then end the others. Long before that, from ``logging.stall_seconds`` on, it
reports what it is waiting for. If an exception ends a rank, :func:`report_failure` prints what it
and the others were doing. No clock is compared between machines.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn

import torch.distributed as dist

from vlmds.console.progress import tell
from vlmds.distributed import lost_ranks

MOST_RANKS = 16  # that one rank quotes
NO_ANSWER = "vlmds:   the other ranks cannot be asked: rank 0's host does not answer"

_activity = "starting"
_since = time.monotonic()
_explain: Callable[[], str] | None = None
_store: dist.Store | None = None
_over = threading.Event()  # the watchdog of this process has nothing to watch any more


def start_watch(timeout_minutes: float, stall_seconds: float) -> None:
    """Watch this rank from now on; the process group must be there."""
    global _store, _over
    stop()
    if dist.get_world_size() > 1:
        _store = dist.PrefixStore("vlmds", dist.distributed_c10d._get_default_store())
        lost_ranks.note_process(_store)
    doing("starting")  # first: this module may have been imported long ago
    _over = threading.Event()
    threading.Thread(target=_watch, args=(timeout_minutes * 60, stall_seconds, _over), daemon=True).start()


def stop() -> None:
    """End the watch: the ranks have left each other, and this process may go on with other things,
    as in a notebook."""
    global _store
    _over.set()
    _store = None


def doing(what: str, keys: Sequence[str] = (), explain: Callable[[], str] | None = None) -> None:
    """Say what this rank does next, and with which samples.

    Args:
        explain: asked for more when it takes long; called from another thread.
    """
    global _activity, _since, _explain
    _activity = f"{what} ({', '.join(keys)})" if keys else what
    _since, _explain = time.monotonic(), explain
    if _store is not None:
        try:
            _store.set(str(dist.get_rank()), _activity)
        except RuntimeError:  # the store's host is gone; the next collective fails
            pass


def report_failure(problem: str) -> None:
    """Print on stderr what this rank was doing when ``problem`` came, and what others were."""
    rank = os.environ.get("RANK", "0")
    lines = [f"vlmds: rank {rank}: {problem}", f"vlmds: rank {rank}: it was {_described()}"]
    others: list[str] = []
    if not lost_ranks.answered(lambda: _ask(others), lost_ranks.STORE_SECONDS):
        others.append(NO_ANSWER)
    tell("\n".join(lines + list(others)), sys.stderr)


def note_failure() -> None:
    """Let the others know that this rank ends by an error that it reports itself."""
    if _store is not None:
        with suppress(RuntimeError):
            lost_ranks.note_failure(_store)


def report_lost_rank() -> None:
    """Print on stderr which other rank is gone, where that ends this one."""
    lost_ranks.report_loss(_store)


def end_job(problem: str, report: bool = True) -> NoReturn:
    """End this process, and with it the job, from any thread, after :func:`report_failure`.

    Args:
        report: False where another rank reports the same.
    """
    if report:
        report_failure(f"{problem}, ending the job")
    else:
        lost_ranks.answered(note_failure, lost_ranks.STORE_SECONDS)
    os._exit(1)


def idle_seconds() -> float:
    """For how long this rank has been with one thing."""
    return time.monotonic() - _since


def _ask(lines: list[str]) -> None:
    if _store is None:
        return
    note_failure()
    mine = dist.get_rank()
    for rank in range(dist.get_world_size()):
        try:
            if rank == mine or not _store.check([str(rank)]):
                continue
            activity = _store.get(str(rank)).decode()
        except RuntimeError:
            lines.append(NO_ANSWER)
            return
        if activity != _activity:
            lines.append(f"vlmds:   rank {rank} was last {activity}")
        if len(lines) == MOST_RANKS:
            return


def _described() -> str:
    """What this rank is doing, for how long, and what holds it up."""
    activity, since, explain = _activity, _since, _explain
    text = f"{activity}, for {time.monotonic() - since:.0f} s"
    try:
        more = explain() if explain is not None else ""
    except Exception as error:  # the index may be what fails
        more = f"no more is known: {error}"
    return f"{text}; {more}" if more else text


def _watch(timeout: float, stall: float, over: threading.Event) -> None:
    seen, due, wait = 0.0, stall, 0.0
    while not over.wait(wait):
        since = _since
        if since != seen:
            seen, due = since, stall
        waited = time.monotonic() - since
        if waited >= timeout:
            end_job(f"no progress for {timeout:.0f} s (training.timeout_minutes)")
        if waited >= due and _explain is not None:
            tell(f"vlmds: rank {os.environ.get('RANK', '0')}: still {_described()}", sys.stderr)
            due *= 2
        wait = min(max(timeout - waited, 0) + 0.05, 1.0)
