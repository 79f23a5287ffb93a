"""Files that grow by a line of JSON for each thing that happened."""

from __future__ import annotations

import json
import os
from pathlib import Path

from vlmds.console.progress import tell


class Journal:
    """Such a file. A full disk does not end the training: what it would not take is reported once, kept,
    and written with what comes next."""

    def __init__(self, path: Path):
        self.path = path
        self._kept: list[str] = []

    def add(self, records: list[dict]) -> None:
        """Append these records, after those that are kept. The file never ends in half a line."""
        lines = self._kept + [json.dumps(r, ensure_ascii=False) + "\n" for r in records]
        if not lines:
            return
        try:
            append(self.path, "".join(lines).encode())
        except OSError as error:
            if not self._kept:
                tell(
                    f"vlmds: WARNING: {self.path}: {error.strerror}; training goes on, and what "
                    "should stand there is written as soon as there is room"
                )
            self._kept = lines
        else:
            self._kept = []


def append(path: Path, data: bytes) -> None:
    """All of it or nothing. Raises OSError.

    On NFS, appending is safe for one writer only: a run's files are rank 0's.
    """
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(file).st_size
        try:
            written = 0
            while written < len(data):
                written += os.write(file, data[written:])
            os.close(os.dup(file))  # which is where NFS reports a full disk; else it does nothing
        except OSError:
            os.ftruncate(file, size)
            raise
    finally:
        os.close(file)
