"""Start real training processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 420


def command(ranks: int, *arguments: str) -> list[str]:
    """`deepspeed --num_gpus N launch/train.py …`, or the plain script for one process."""
    script = str(ROOT / "launch" / "train.py")
    if not ranks:
        return [sys.executable, script, *arguments]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks),
            "--master_port", str(port), script, *arguments]


def environment() -> dict:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path}


def train(ranks: int, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess:
    """Run to the end; the exit code must be `expect`."""
    done = subprocess.run(command(ranks, *arguments), env=environment(), cwd=ROOT, timeout=TIMEOUT,
                          capture_output=True, text=True)
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def train_and_kill(ranks: int, run: Path, lines: int, *arguments: str) -> None:
    """Run until metrics.jsonl has that many lines, then SIGKILL all of it."""
    process = subprocess.Popen(command(ranks, *arguments), env=environment(), cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    children = _children(process.pid)
    deadline = time.monotonic() + TIMEOUT
    try:
        while len(_lines(run)) < lines:
            assert process.poll() is None, "training ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        children = _children(process.pid)
    finally:
        for pid in (process.pid, *children):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.wait()
    for pid in children:  # they may hold files open until they are gone
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.01)


def metrics(run: Path) -> list[dict]:
    """metrics.jsonl without what depends on the machine's speed."""
    timing = ("samples_per_s", "tokens_per_s", "data_wait", "memory_gib")
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in _lines(run)]


def _lines(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def _children(pid: int) -> list[int]:
    """All descendants of a process."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            for child in map(int, path.read_text().split()):
                found += [child, *_children(child)]
        except OSError:
            pass
    return found
