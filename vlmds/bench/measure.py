"""What all benchmarks share: timing in turns, tables, and where the results go."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

from vlmds.files import write


def in_turns(jobs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of each job: the least of `repeats`, run in turns so that a slow spell of the machine
    hits all alike."""
    best = dict.fromkeys(jobs, float("inf"))
    for _ in range(repeats):
        for name, job in jobs.items():
            begin = time.perf_counter()
            job()
            best[name] = min(best[name], time.perf_counter() - begin)
    return best


def table(rows: list[dict[str, object]]) -> str:
    """Rows of the same keys as a Markdown table."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([str(row[c]) for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def save(output: Path, name: str, result: dict) -> Path:
    """Write the figures, and what machine they are of, as JSON."""
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
