"""What a command says while something takes long.

Lines go to stderr: stdout holds results, such as captions. A phase of less than two seconds says
nothing. A longer one has its line in place on a terminal, and elsewhere (a log file) lines that
come ever more seldom, and at its end the seconds that it took. A thread prints them, so that they
also come during one long call.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeVar

Item = TypeVar("Item")

QUIET_SECONDS = 2.0  # a phase that is over by then says nothing
LOG_SECONDS = (10.0, 60.0)  # between two lines of a log: at first, and at most
TERMINAL_SECONDS = 0.5  # between two states of the line on a terminal

_open: list[Phase] = []  # the innermost one last: it alone has the screen
_silenced = 0  # blocks that say nothing, one inside of another
_in_place = 0  # characters of the line that a phase has on the terminal


class Phase:
    """One thing that takes long. done, total: how far it is, in ``unit``; both, and ``note``, which
    follows them on the line, may be set at any time and by any thread."""

    def __init__(self, what: str, total: float | None = None, unit: str = "", left: bool = False):
        self.what, self.total, self.unit, self.done = what, total, unit, 0.0
        self.left, self.note = left, ""
        self._start = time.monotonic()
        self._lock = threading.Lock()

    def advance(self, amount: float = 1) -> None:
        """``amount`` more is done. Any thread may call it."""
        with self._lock:
            self.done += amount

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def counting(self, items: Collection[Item]) -> Iterator[Item]:
        """The items, each of which is done when the next one is asked for."""
        self.done, self.total = 0, len(items)
        for item in items:
            yield item
            self.advance()

    def under_way(self) -> str:
        """ "checking weights: 5.2 of 16.4 GB, 12 s"."""
        counted = self._counted(self.total)
        parts = [counted, duration(self.seconds), self._rest(), self.note]
        return f"{self.what}: {', '.join(part for part in parts if part)}"

    def over(self) -> str:
        """ "checking weights: 16.4 GB in 31 s"."""
        note = f", {self.note}" if self.note else ""
        return f"{self.what}: {self._counted(None) or 'done'} in {duration(self.seconds)}{note}"

    def _rest(self) -> str:
        """How long the rest will take at the pace so far."""
        if not self.left or not self.total or not 0 < self.done < self.total:
            return ""
        return f"about {duration(self.seconds * (self.total - self.done) / self.done)} left"

    def _counted(self, total: float | None) -> str:
        """How much is done, and of how much; empty where nothing is counted."""
        if not self.done and total is None:
            return ""
        amounts = [self.done] if total is None else [self.done, total]
        unit, texts = self.unit, [f"{amount:.0f}" for amount in amounts]
        if unit == "bytes":
            unit, size, form = ("GB", 1e9, ".1f") if amounts[-1] >= 1e9 else ("MB", 1e6, ".0f")
            texts = [format(amount / size, form) for amount in amounts]
        return f"{' of '.join(texts)} {unit}".rstrip()


@contextmanager
def phase(
    what: str, total: float | None = None, unit: str = "", *, each_node: bool = False, left: bool = False
) -> Iterator[Phase]:
    """Say how far the block is, on rank 0, once it has taken two seconds. Inside of another phase
    it takes that one's place on the screen until it ends.

    Args:
        what: it does, such as "checking weights".
        total: how much there is to do; None if that is not known.
        unit: what :meth:`Phase.advance` counts: "bytes", a noun in the plural, or nothing.
        left: say how long the rest will take, where things are of about one size.
        each_node: the first rank of each other node speaks, too, with its host's name.
    """
    who = _speaker(each_node)
    current = Phase(what, total, unit, left)
    if who is None:
        yield current
        return
    over, shown = threading.Event(), threading.Event()
    _open.append(current)
    thread = threading.Thread(target=_show, args=(current, who, over, shown), daemon=True)
    thread.start()
    finished = False
    try:
        yield current
        finished = True
    finally:
        over.set()
        thread.join()
        _open.remove(current)
        if shown.is_set():
            _clear()
            if finished:
                tell(f"{who}{current.over()}", sys.stderr)


@contextmanager
def silenced(yes: bool = True) -> Iterator[None]:
    """Phases inside of the block say nothing, as a notebook may want it."""
    global _silenced
    _silenced += yes
    try:
        yield
    finally:
        _silenced -= yes


def tell(text: str, stream: TextIO | None = None) -> None:
    """Print a line, on stdout if no stream is given. Where nobody reads any more, since a terminal
    or an ssh is gone, that must not end the training: from then on the stream leads nowhere."""
    _clear()
    _print(f"{text}\n", stream or sys.stdout)


def duration(seconds: float) -> str:
    """ "2 h 05 min", "7 min 30 s" or "12 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _speaker(each_node: bool) -> str | None:
    """What this rank's lines begin with, None if it says nothing."""
    if _silenced:
        return None
    if os.environ.get("RANK", "0") == "0":
        return "vlmds: "
    if each_node and os.environ.get("LOCAL_RANK") == "0":
        return f"vlmds: {platform.node()}: "
    return None


def _show(current: Phase, who: str, over: threading.Event, shown: threading.Event) -> None:
    wait, interval = QUIET_SECONDS, LOG_SECONDS[0]
    while not over.wait(wait):
        terminal = sys.stderr.isatty()
        if _open[-1] is current:
            shown.set()
            line = f"{who}{current.under_way()}"
            _replace(line) if terminal else tell(line, sys.stderr)
        wait = TERMINAL_SECONDS if terminal else interval
        interval = interval if terminal else min(2 * interval, LOG_SECONDS[1])


def _replace(line: str) -> None:
    """Show the line in place of the one before."""
    global _in_place
    line = line[: shutil.get_terminal_size().columns - 1]  # one that wraps could not be replaced
    _print(f"\r{line:<{_in_place}}", sys.stderr)
    _in_place = len(line)


def _clear() -> None:
    """Take the line of a phase off the terminal."""
    global _in_place
    if _in_place:
        _print(f"\r{'':<{_in_place}}\r", sys.stderr)
        _in_place = 0


def _print(text: str, stream: TextIO) -> None:
    try:
        print(text, end="", file=stream, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
