"""JSON Lines files to which records are appended during a run."""

from __future__ import annotations

import json
import os
from pathlib import Path

from vlmds.console.progress import log_line


class Journal:
    """One such file. A full disk does not end the training: the failure is reported once, and the records
    are kept in memory and written with the next ones."""

    def __init__(self, path: Path):
        self.path = path
        self._kept: list[str] = []

    def add(self, records: list[dict]) -> None:
        """Append these records, after those kept in memory. The file never ends in an incomplete line."""
        lines = self._kept + [json.dumps(r, ensure_ascii=False) + "\n" for r in records]
        if not lines:
            return
        try:
            append(self.path, "".join(lines).encode())
        except OSError as error:
            if not self._kept:
                log_line(
                    f"vlmds: WARNING: {self.path}: {error.strerror}; training goes on, and the "
                    "records are written as soon as there is room"
                )
            self._kept = lines
        else:
            self._kept = []


def append(path: Path, data: bytes) -> None:
    """Append all of the data or, with an OSError, none of it.

    On NFS, appending is safe for one writer only: only rank 0 writes a run's files.
    """
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(file).st_size
        try:
            written = 0
            while written < len(data):
                written += os.write(file, data[written:])
            os.close(os.dup(file))  # NFS reports a full disk here; otherwise without effect
        except OSError:
            os.ftruncate(file, size)
            raise
    finally:
        os.close(file)


def read_metrics(path: Path) -> list[dict]:
    """The records of a run's metrics.jsonl, also of one in progress; none if it is missing."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                records.append(json.loads(line))
            except ValueError:
                continue  # the last line of a run in progress
    return [r for r in records if isinstance(r, dict) and "kind" in r]
