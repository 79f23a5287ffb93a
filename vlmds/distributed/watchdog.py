"""The watchdog: ends a rank that makes no progress, and reports what every rank was doing.

Before anything that may take long or fail, a rank calls :func:`doing`. The activity is kept here and in
the job's key-value store, where other ranks can read it even after this one has died. If an activity
lasts longer than the job's timeout, a thread reports it and ends the process; launchers then end the
other ranks. Well before that, from ``logging.stall_seconds`` on, the thread logs what the rank is waiting
for. If an exception ends a rank, :func:`report_failure` prints what it and the other ranks were doing.
Clocks of different machines are never compared.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, NoReturn

import torch.distributed as dist

from vlmds.console.progress import log_line
from vlmds.distributed import lost_ranks
from vlmds.distributed.deadline import finishes_within

MOST_RANKS = 16  # that one report quotes
NO_ANSWER = "vlmds:   the other ranks cannot be asked: rank 0's host does not answer"


class Activity(NamedTuple):
    """What a rank is doing, since when (``time.monotonic``), and a function that says more about it."""

    what: str
    since: float
    explain: Callable[[], str] | None = None

    def described(self) -> str:
        """The activity, how long it has lasted, and why."""
        text = f"{self.what}, for {time.monotonic() - self.since:.0f} s"
        try:
            more = self.explain() if self.explain is not None else ""
        except Exception as error:  # the explanation may read the index, which may be what fails
            more = f"no more is known: {error}"
        return f"{text}; {more}" if more else text


class Watchdog:
    """The watchdog of this process. The module's functions are its methods."""

    def __init__(self) -> None:
        self.activity = Activity("starting", time.monotonic())
        self._store: dist.Store | None = None  # None: the ranks have not joined, or there is only one
        self._over = threading.Event()

    def start_watch(self, timeout_minutes: float, stall_seconds: float) -> None:
        """Watch this rank from now on. The process group must exist."""
        self.stop()
        if dist.get_world_size() > 1:
            self._store = dist.PrefixStore("vlmds", dist.distributed_c10d._get_default_store())
            lost_ranks.note_process(self._store)
        self.doing("starting")  # before the thread: the object may be hours old
        self._over = threading.Event()
        arguments = (timeout_minutes * 60, stall_seconds, self._over)
        threading.Thread(target=self._watch, args=arguments, daemon=True).start()

    def stop(self) -> None:
        """Stop watching: the process has left the other ranks, and may continue with other work, as in a
        notebook."""
        self._over.set()
        self._store = None

    def doing(self, what: str, keys: Sequence[str] = (), explain: Callable[[], str] | None = None) -> None:
        """Note what this rank does next.

        Args:
            what: such as "at align step 3".
            keys: of the samples that it does it with.
            explain: returns the reason when it takes long; called from another thread.
        """
        self.activity = Activity(f"{what} ({', '.join(keys)})" if keys else what, time.monotonic(), explain)
        if self._store is not None:
            with suppress(RuntimeError):  # the store's host is gone; the next collective fails
                self._store.set(str(dist.get_rank()), self.activity.what)

    def report_failure(self, problem: str) -> None:
        """Print ``problem`` on stderr, with what this rank and the others were doing."""
        rank = os.environ.get("RANK", "0")
        lines = [f"vlmds: rank {rank}: {problem}", f"vlmds: rank {rank}: it was {self.activity.described()}"]
        others: list[str] = []
        if not finishes_within(lost_ranks.STORE_SECONDS, lambda: self._ask_others(others)):
            others.append(NO_ANSWER)
        log_line("\n".join(lines + list(others)), sys.stderr)

    def note_failure(self) -> None:
        """Note for the other ranks that this one ends by an error that it reports itself."""
        if self._store is not None:
            with suppress(RuntimeError):
                lost_ranks.note_failure(self._store)

    def report_lost_rank(self) -> None:
        """Print on stderr which other rank is gone, when that ends this one."""
        lost_ranks.report_loss(self._store)

    def end_job(self, problem: str, report: bool = True) -> NoReturn:
        """End this process, and with it the job, after :func:`report_failure`. Any thread may call it.

        Args:
            report: False if another rank reports the same.
        """
        if report:
            self.report_failure(f"{problem}, ending the job")
        else:
            finishes_within(lost_ranks.STORE_SECONDS, self.note_failure)
        os._exit(1)

    def idle_seconds(self) -> float:
        """How long the current activity has lasted."""
        return time.monotonic() - self.activity.since

    def _ask_others(self, lines: list[str]) -> None:
        """Add a line for each rank that does something else than this one."""
        if self._store is None:
            return
        self.note_failure()
        mine = dist.get_rank()
        for rank in range(dist.get_world_size()):
            try:
                if rank == mine or not self._store.check([str(rank)]):
                    continue
                what = self._store.get(str(rank)).decode()
            except RuntimeError:
                lines.append(NO_ANSWER)
                return
            if what != self.activity.what:
                lines.append(f"vlmds:   rank {rank} was last {what}")
            if len(lines) == MOST_RANKS:
                return

    def _watch(self, timeout: float, stall: float, over: threading.Event) -> None:
        seen, due, wait = 0.0, stall, 0.0
        while not over.wait(wait):
            activity = self.activity
            if activity.since != seen:
                seen, due = activity.since, stall
            waited = time.monotonic() - activity.since
            if waited >= timeout:
                self.end_job(f"no progress for {timeout:.0f} s (training.timeout_minutes)")
            if waited >= due and activity.explain is not None:
                log_line(f"vlmds: rank {os.environ.get('RANK', '0')}: still {activity.described()}", sys.stderr)
                due *= 2
            wait = min(max(timeout - waited, 0) + 0.05, 1.0)


# Global, as torch's process group is: a process is one rank, and what it is doing is noted by code of many
# rooms, down to the reading of one shard.
PROCESS = Watchdog()
start_watch, stop, doing = PROCESS.start_watch, PROCESS.stop, PROCESS.doing
report_failure, note_failure, report_lost_rank = (
    PROCESS.report_failure,
    PROCESS.note_failure,
    PROCESS.report_lost_rank,
)
end_job, idle_seconds = PROCESS.end_job, PROCESS.idle_seconds
