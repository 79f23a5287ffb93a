"""No rank hangs in silence: each says what it is about to do, and somebody is always there to tell.

Before whatever may take long or fail, a rank calls :func:`doing`, which notes it here and in the
job's key-value store, where the other ranks can read it also when this one is dead. If a rank stays
with one thing for longer than the job's timeout, a thread of its own says so and ends the process;
launchers then end the others. Long before that, from ``logging.stall_seconds`` on, it tells what it
is waiting for. If an exception ends a rank, :func:`last_words` tells what it and the
others were doing. No clock is compared between machines.
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

from vlmds.progress import tell
from vlmds.training import lost

STORE_SECONDS = 5.0  # an answer of the store that takes longer will not come
MOST_RANKS = 16  # that one rank quotes
NO_ANSWER = "vlmds:   the other ranks cannot be asked: rank 0's host does not answer"

_activity = "starting"
_since = time.monotonic()
_explain: Callable[[], str] | None = None
_store: dist.Store | None = None


def start_watch(timeout_minutes: float, stall_seconds: float) -> None:
    """Watch this rank from now on; the process group must be there."""
    global _store
    if dist.get_world_size() > 1:
        _store = dist.PrefixStore("vlmds", dist.distributed_c10d._get_default_store())
        lost.note_process(_store)
    doing("starting")  # first: this module may have been imported long ago
    threading.Thread(target=_watch, args=(timeout_minutes * 60, stall_seconds), daemon=True).start()


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
        except RuntimeError:  # the store's host is gone; the next collective will tell
            pass


def last_words(problem: str) -> None:
    """Print on stderr what this rank was doing when ``problem`` came, and what others were."""
    rank = os.environ.get("RANK", "0")
    lines = [f"vlmds: rank {rank}: {problem}",
             f"vlmds: rank {rank}: it was {_described()}"]
    # Another thread asks the store: where its host cannot be reached, no answer ever comes.
    others: list[str] = []
    asking = threading.Thread(target=_ask, args=(others,), daemon=True)
    asking.start()
    asking.join(STORE_SECONDS)
    if asking.is_alive():
        others.append(NO_ANSWER)
    tell("\n".join(lines + list(others)), sys.stderr)


def note_failure() -> None:
    """Let the others know that this rank ends by an error that it reports itself."""
    if _store is not None:
        with suppress(RuntimeError):
            lost.note_failure(_store)


def lost_words() -> None:
    """Print on stderr which other rank is gone, where that ends this one."""
    lost.report_loss(_store)


def end_job(problem: str) -> NoReturn:
    """End this process, and with it the job, from any thread, after its :func:`last_words`."""
    last_words(f"{problem}, ending the job")
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


def _watch(timeout: float, stall: float) -> None:
    told, due = 0.0, stall
    while True:
        since = _since
        if since != told:
            told, due = since, stall
        waited = time.monotonic() - since
        if waited >= timeout:
            end_job(f"no progress for {timeout:.0f} s (training.timeout_minutes)")
        if waited >= due and _explain is not None:
            tell(f"vlmds: rank {os.environ.get('RANK', '0')}: still {_described()}", sys.stderr)
            due *= 2
        time.sleep(min(max(timeout - waited, 0) + 0.05, 1.0))
