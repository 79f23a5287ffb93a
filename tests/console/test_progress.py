"""Progress messages."""

import io
import os
import platform
import re
import sys
import threading
import time

import pytest

from vlmds.console import progress
from vlmds.console.progress import Phase, log_line, phase


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Intervals a hundred times shorter."""
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.02)
    monkeypatch.setattr(progress, "LOG_SECONDS", (0.1, 0.6))
    monkeypatch.setattr(progress, "TERMINAL_SECONDS", 0.005)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


class Screen(io.StringIO):
    """Records the output; `there` is set once it has the awaited text."""

    def __init__(self, terminal: bool, awaited: str):
        super().__init__()
        self.terminal, self.awaited, self.there = terminal, awaited, threading.Event()

    def isatty(self):
        return self.terminal

    def write(self, text):
        super().write(text)
        if self.awaited in self.getvalue():
            self.there.set()

    def fileno(self):
        raise OSError


@pytest.fixture
def screen(monkeypatch):
    def make(terminal=False, awaited=": "):
        made = Screen(terminal, awaited)
        monkeypatch.setattr(sys, "stderr", made)
        return made

    return make


def test_a_short_phase_prints_nothing(screen, monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 60)
    log = screen()
    with phase("checking weights", 16.4e9, "bytes"):
        pass
    assert log.getvalue() == ""


def test_a_long_phase_has_a_line_and_an_end(screen):
    log = screen(awaited="5.2 of")  # a slow machine may print a line before the first bytes
    with phase("checking weights", total=16_400_000_000, unit="bytes") as p:
        p.advance(5_200_000_000)
        assert log.there.wait(30)
        p.advance(11_200_000_000)
    *lines, last = log.getvalue().splitlines()
    assert any(re.fullmatch(r"vlmds: checking weights: 5\.2 of 16\.4 GB, \d+ s", line) for line in lines)
    assert re.fullmatch(r"vlmds: checking weights: 16\.4 GB in \d+ s", last)


def test_a_phase_without_a_count_shows_its_seconds(screen):
    log = screen()
    with phase("quantising"):
        assert log.there.wait(30)
    lines = log.getvalue().splitlines()
    assert re.fullmatch(r"vlmds: quantising: \d+ s", lines[0])
    assert re.fullmatch(r"vlmds: quantising: done in \d+ s", lines[-1])


def test_the_time_left_and_a_note_follow(screen, monkeypatch):
    monkeypatch.setattr(progress, "duration", lambda seconds: f"{seconds:.0f} s")
    current = Phase("captioning", 40, "clips", left=True)
    monkeypatch.setattr(Phase, "seconds", 30.0)
    assert current.progress_line() == "captioning: 0 of 40 clips, 30 s"
    current.advance(10)
    current.note = "2 failed"
    assert current.progress_line() == "captioning: 10 of 40 clips, 30 s, about 90 s left, 2 failed"
    assert current.final_line() == "captioning: 10 clips in 30 s, 2 failed"


def test_silenced_phases_print_nothing(screen):
    log = screen()
    with progress.silenced(), phase("loading"), progress.silenced(False):
        assert not log.there.wait(0.2)
    assert log.getvalue() == ""
    with phase("loading"):
        assert log.there.wait(30)


def test_a_log_gets_lines_at_growing_intervals(screen, monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 2.0)
    monkeypatch.setattr(progress, "LOG_SECONDS", (10.0, 60.0))
    log, waits = screen(), []

    class Clock(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)
            return len(waits) > 6

    current = Phase("loading")
    monkeypatch.setattr(progress, "_open", [current])
    progress._show(current, "vlmds: ", Clock(), threading.Event())
    assert waits == [2, 10, 20, 40, 60, 60, 60]
    assert len(log.getvalue().splitlines()) == 6


def test_on_a_terminal_the_line_is_updated_in_place(screen, capsys):
    terminal = screen(terminal=True, awaited="layers")
    with phase("folding", 36, "layers") as p:
        assert terminal.there.wait(30)
        p.advance(36)
        log_line("another line")  # removes the phase's line first
        shown = terminal.getvalue()
    assert "\n" not in shown and shown.count("\r") >= 3
    assert re.search(r"\r +\r$", shown)
    assert re.search(r"vlmds: folding: 36 layers in \d+ s\n$", terminal.getvalue())
    assert capsys.readouterr().out == "another line\n"


def test_only_the_inner_phase_is_shown(screen):
    log = screen(awaited="inner")
    with phase("outer"):
        time.sleep(0.05)
        with phase("inner"):
            assert log.there.wait(30)
            said = len(log.getvalue().splitlines())
            time.sleep(0.3)
            assert "outer" not in "".join(log.getvalue().splitlines()[said:])


def test_a_failure_is_not_reported_as_done(screen):
    log = screen()
    with pytest.raises(ValueError), phase("loading"):
        assert log.there.wait(30)
        raise ValueError
    assert " in " not in log.getvalue()


@pytest.mark.parametrize(
    "rank, local_rank, each_node, host",
    [
        ("0", "0", False, ""),
        ("1", "1", False, None),
        ("1", "1", True, None),
        ("8", "0", False, None),
        ("8", "0", True, f"{platform.node()}: "),
    ],
)
def test_which_ranks_print(screen, monkeypatch, rank, local_rank, each_node, host):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    log = screen()
    with phase("loading", each_node=each_node):
        log.there.wait(30 if host is not None else 0.2)
    if host is None:
        assert log.getvalue() == ""
    else:
        assert log.getvalue().startswith(f"vlmds: {host}loading: ")


def test_threads_count_together():
    with phase("checking", unit="files") as p:
        threads = [threading.Thread(target=lambda: [p.advance() for _ in range(1000)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert p.done == 8000


def test_a_closed_terminal_raises_nothing(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)  # the reader is gone: writing gives EPIPE
    with os.fdopen(writing, "w") as gone:
        monkeypatch.setattr(sys, "stderr", gone)
        with phase("loading") as p:
            time.sleep(0.1)
        p.advance()
        log_line("and later lines", gone)
