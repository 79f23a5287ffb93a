"""Start and clean-up of real training processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests import tiny
from tests.training.forked import ROOT, Forked, environment
from vlmds.distributed.ranks import free_port

SCRIPT = ROOT / "launch" / "train.py"
FAULTY = Path(__file__).with_name("faulty.py")
TIMEOUT = 240
START_SECONDS = 120  # until a run has taken the wanted steps
DURATION = r"(\d+ s|\d+ min \d\d s|\d+ h \d\d min)"
PROGRESS = re.compile(rf"^vlmds: (?!rank).+(: |, | in ){DURATION}\n", re.M)
"""Lines of vlmds.console.progress, of which a slow machine prints more."""


def arguments(models: Path, shards: Path, run: Path, *overrides: str, exp: str = "e3") -> list[str]:
    """Arguments of launch/train.py for a packaged experiment on the tiny models."""
    return ["--exp", exp, "--output", str(run), "--data", str(shards), "--set", *tiny.settings(models), *overrides]


def command(ranks: int, *arguments: str, script: Path = SCRIPT) -> list[str]:
    """`deepspeed --num_gpus N launch/train.py …`, or the plain script for one process (0 ranks)."""
    if not ranks:
        return [sys.executable, str(script), *arguments]
    return [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_gpus",
        str(ranks),
        "--master_port",
        str(free_port()),
        str(script),
        *arguments,
    ]


@contextmanager
def running(
    ranks: int, *arguments: str, log: Path, script: Path = SCRIPT, fresh: bool = False, **env: str
) -> Iterator[subprocess.Popen | Forked]:
    """A started training, whose output goes to log.out and log.err; killed at the end with all
    its descendants.

    fresh: started by :func:`command`, as by a user, and not :class:`Forked`, which is five to ten
    seconds faster. It matters where a launcher's part in a start or an end is tested.
    """
    if fresh:
        with log.with_suffix(".out").open("w") as out, log.with_suffix(".err").open("w") as err:
            process = subprocess.Popen(
                command(ranks, *arguments, script=script),
                env=environment(**env),
                cwd=ROOT,
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
    else:
        process = fork(ranks, str(script), *arguments, log=log, **env)
    try:
        yield process
    finally:
        kill_tree(process)


def fork(ranks: int, *words: str, log: Path, **env: str) -> Forked:
    """Ranks that run a script, or -m and a module; their output goes to log.out and log.err."""
    place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())) if ranks else {}
    return Forked(ranks, list(words), environment(**place, **env), log)


def exit_code(ranks: int, *words: str, log: Path, **env: str) -> int:
    """With which such ranks end."""
    process = fork(ranks, *words, log=log, **env)
    try:
        return process.wait(TIMEOUT)
    finally:
        kill_tree(process)


def forked(ranks: int, *words: str, log: Path, expect: int = 0) -> str:
    """What such ranks print until their end, on both streams; `expect` is their exit code."""
    code = exit_code(ranks, *words, log=log)
    printed = "".join(log.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
    assert code == expect, f"{code}\n{printed[-5000:]}"
    return printed


def train(
    ranks: int,
    *arguments: str,
    expect: int | None = 0,
    script: Path = SCRIPT,
    timeout: float = TIMEOUT,
    fresh: bool = False,
    **env: str,
) -> subprocess.CompletedProcess:
    """Run to the end; the exit code must be `expect` (None: any but 0). fresh: see
    :func:`running`. What it returns as stderr is without the lines of progress."""
    run = Path(arguments[arguments.index("--output") + 1])
    log = run.with_name(f"{run.name}-log")
    with running(ranks, *arguments, log=log, script=script, fresh=fresh, **env) as process:
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = "hung"
    out, err = (log.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
    assert code != 0 if expect is None else code == expect, f"{code}\n{out[-3000:]}{err[-5000:]}"
    return subprocess.CompletedProcess(arguments, code, out, PROGRESS.sub("", err))


def train_until(
    ranks: int,
    run: Path,
    lines: int,
    act: Callable[[subprocess.Popen], None],
    *arguments: str,
    checkpoint: str = "",
    fresh: bool = False,
) -> None:
    """Run until metrics.jsonl has that many lines and, as checkpoints are written in the
    background, until one whose name starts like `checkpoint` is there; then `act`, then kill what
    is left."""
    deadline = time.monotonic() + TIMEOUT
    with running(ranks, *arguments, log=run.with_name(f"{run.name}-until"), fresh=fresh) as process:
        while len(_lines(run)) < lines or not _has_checkpoint(run, checkpoint):
            assert process.poll() is None, "training ended before its time"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        act(process)


def train_and_kill(
    ranks: int, run: Path, lines: int, *arguments: str, checkpoint: str = "", fresh: bool = False
) -> None:
    """As train_until, with SIGKILL for all of it."""
    train_until(ranks, run, lines, lambda process: None, *arguments, checkpoint=checkpoint, fresh=fresh)


def until_lines(run: Path, lines: int, *processes: subprocess.Popen) -> None:
    """Wait until metrics.jsonl has that many lines; the processes must all live until then."""
    deadline = time.monotonic() + START_SECONDS
    while len(_lines(run)) < lines:
        if any(process.poll() is not None for process in processes):
            raise RuntimeError(f"{run} ended before line {lines} of its metrics; see its logs")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{run}: no {lines} lines of metrics within {START_SECONDS} s")
        time.sleep(0.002)


def metrics(run: Path) -> list[dict]:
    """metrics.jsonl without what depends on the machine's speed."""
    timing = ("samples_per_s", "tokens_per_s", "data_wait", "memory_gib", "ranks")
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in _lines(run)]


def kill_tree(process: subprocess.Popen | Forked) -> None:
    """SIGKILL a process and all its descendants, and wait until they are gone."""
    children = descendants(process.pid)
    for pid in (process.pid, *children):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    for pid in children:  # they may hold files open until they are gone
        while _alive(pid) and time.monotonic() < deadline:
            time.sleep(0.01)


def descendants(pid: int) -> list[int]:
    """All descendants of a process."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            for child in map(int, path.read_text().split()):
                found += [child, *descendants(child)]
        except OSError:
            pass
    return found


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Process ids of the ranks below a launcher, by rank."""
    found = {}
    for pid in [process.pid, *descendants(process.pid)]:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            variables = dict(v.partition(b"=")[::2] for v in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
        except OSError:
            continue
        if str(SCRIPT).encode() in words and b"RANK" in variables and b"LOCAL_RANK" in variables:
            found.setdefault(int(variables[b"RANK"]), pid)
    return [found[rank] for rank in sorted(found)]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _has_checkpoint(run: Path, start: str) -> bool:
    """A folder of checkpoints has its final name once it is whole."""
    return not start or any((run / "checkpoints").glob(f"{start}*"))


def _lines(run: Path) -> list[str]:
    """The whole lines; a run that goes on, or was killed, may have written part of another."""
    path = run / "metrics.jsonl"
    return path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
