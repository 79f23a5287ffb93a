"""Shared parts of all benchmarks: timing in turns, tables, and the files of results."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from vlmds.files import write

Name = TypeVar("Name", bound=Hashable)


def in_turns(jobs: Mapping[Name, Callable[[], object]], repeats: int) -> dict[Name, float]:
    """Seconds of each job: the least of `repeats`. They run in turns, to share slow spells of the
    machine."""
    best = dict.fromkeys(jobs, float("inf"))
    for _ in range(repeats):
        for name, job in jobs.items():
            begin = time.perf_counter()
            job()
            best[name] = min(best[name], time.perf_counter() - begin)
    return best


def table(rows: Iterable[Mapping[str, object]]) -> str:
    """Rows of the same keys as a Markdown table."""
    rows = list(rows)
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([str(row[c]) for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def save(output: Path, name: str, result: dict) -> Path:
    """Write the figures, with a description of the machine, as JSON. Returns the file."""
    path = output / f"{name}.json"
    write(
        path,
        json.dumps(
            {
                "cores": len(os.sched_getaffinity(0)),
                "machine": platform.machine(),
                "python": platform.python_version(),
                **result,
            },
            indent=2,
        )
        + "\n",
    )
    return path
