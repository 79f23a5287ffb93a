"""Progress messages of commands, and the printing of lines.

Progress goes to stderr; stdout is for results, such as captions. A phase of less than two seconds prints
nothing. A longer one updates one line on a terminal, or writes lines at growing intervals to a log file,
and at its end prints how long it took. A thread prints, so progress is also shown during one long call.
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

QUIET_SECONDS = 2.0  # a shorter phase prints nothing
LOG_SECONDS = (10.0, 60.0)  # first and longest interval between lines of a log
TERMINAL_SECONDS = 0.5  # between two updates of the line on a terminal

# Global, as the screen is: all phases of the process share it.
_open: list[Phase] = []  # running phases; only the last, innermost one is shown
_silenced = 0  # number of enclosing silenced() blocks
_in_place = 0  # characters of a phase's line that is on the terminal now


class Phase:
    """A long piece of work. done, total: its progress, in ``unit``. note: text at the end of the line. All
    three may be set at any time by any thread."""

    def __init__(self, what: str, total: float | None = None, unit: str = "", left: bool = False):
        self.what, self.total, self.unit, self.done = what, total, unit, 0.0
        self.left, self.note = left, ""
        self._start = time.monotonic()
        self._lock = threading.Lock()

    def advance(self, amount: float = 1) -> None:
        """Add ``amount`` to what is done. Any thread may call it."""
        with self._lock:
            self.done += amount

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def counting(self, items: Collection[Item]) -> Iterator[Item]:
        """The items; each counts as done when the next one is requested."""
        self.done, self.total = 0, len(items)
        for item in items:
            yield item
            self.advance()

    def progress_line(self) -> str:
        """The line while it runs: "checking weights: 5.2 of 16.4 GB, 12 s"."""
        counted = self._counted(self.total)
        parts = [counted, duration(self.seconds), self._rest(), self.note]
        return f"{self.what}: {', '.join(part for part in parts if part)}"

    def final_line(self) -> str:
        """The line at its end: "checking weights: 16.4 GB in 31 s"."""
        note = f", {self.note}" if self.note else ""
        return f"{self.what}: {self._counted(None) or 'done'} in {duration(self.seconds)}{note}"

    def _rest(self) -> str:
        """Estimated time left, at the rate so far."""
        if not self.left or not self.total or not 0 < self.done < self.total:
            return ""
        return f"about {duration(self.seconds * (self.total - self.done) / self.done)} left"

    def _counted(self, total: float | None) -> str:
        """The amounts done and in total; empty if nothing is counted."""
        if not self.done and total is None:
            return ""
        amounts = [self.done] if total is None else [self.done, total]
        unit, texts = self.unit, [f"{amount:.0f}" for amount in amounts]
        if unit == "bytes":
            unit, size, form = ("GB", 1e9, ".1f") if amounts[-1] >= 1e9 else ("MB", 1e6, ".0f")
            texts = [format(amount / size, form) for amount in amounts]
        if texts[-1] == "1":
            unit = unit.removesuffix("es") if unit.endswith("ches") else unit.removesuffix("s")
        return f"{' of '.join(texts)} {unit}".rstrip()


@contextmanager
def phase(
    what: str, total: float | None = None, unit: str = "", *, each_node: bool = False, left: bool = False
) -> Iterator[Phase]:
    """Show the progress of the block, on rank 0, once it has taken two seconds. A phase within another one
    replaces it on the screen until it ends.

    Args:
        what: the work, such as "checking weights".
        total: the amount of work; None if unknown.
        unit: of :meth:`Phase.advance`: "bytes", a noun in the plural (with an s), or empty.
        each_node: the first rank of each other node prints, too, with its host's name.
        left: show the estimated time left; for items of similar size.
    """
    who = _line_start(each_node)
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
                log_line(f"{who}{current.final_line()}", sys.stderr)


@contextmanager
def silenced(yes: bool = True) -> Iterator[None]:
    """Show no progress of phases within the block, for example in a notebook."""
    global _silenced
    _silenced += yes
    try:
        yield
    finally:
        _silenced -= yes


def log_line(text: str, stream: TextIO | None = None) -> None:
    """Print a line, by default on stdout. If the reader is gone (a closed terminal or ssh), this does not
    raise, because training must go on: the stream is redirected to /dev/null."""
    _clear()
    _print(f"{text}\n", stream or sys.stdout)


def duration(seconds: float) -> str:
    """A duration as text: "2 h 05 min", "7 min 30 s" or "12 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _line_start(each_node: bool) -> str | None:
    """The start of this rank's lines; None if it prints nothing."""
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
            line = f"{who}{current.progress_line()}"
            _replace(line) if terminal else log_line(line, sys.stderr)
        wait = TERMINAL_SECONDS if terminal else interval
        interval = interval if terminal else min(2 * interval, LOG_SECONDS[1])


def _replace(line: str) -> None:
    """Show the line in place of the previous one."""
    global _in_place
    line = line[: shutil.get_terminal_size().columns - 1]  # a wrapped line could not be replaced
    _print(f"\r{line:<{_in_place}}", sys.stderr)
    _in_place = len(line)


def _clear() -> None:
    """Remove the line of a phase from the terminal."""
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
