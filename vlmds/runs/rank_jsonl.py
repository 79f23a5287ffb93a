"""JSONL files that several ranks write together, and that a restarted job continues."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlmds.files import sync_folder, write

SYNC_SECONDS = 10.0  # what a power cut may cost

Record = dict[str, Any]


class RankJsonl:
    """A file of JSON lines for each rank, in one folder.

    Args:
        path: rank 0's.
        prefix, suffix: of the other ranks' names, the number of the rank between them.
    """

    def __init__(self, path: Path, prefix: str, suffix: str = ""):
        self.path, self._prefix, self._suffix = path, prefix, suffix

    def appender(self, rank: int) -> Appender:
        return Appender(self.path.with_name(f"{self._prefix}{rank:05d}{self._suffix}") if rank else self.path)

    def read(self) -> list[Record]:
        """All ranks' records, rank by rank; a line that a kill cut short is left out."""
        records = []
        for path in (self.path, *self._others()):
            if not path.is_file():
                continue
            # Not splitlines(), which also splits where a caption has U+2028.
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                with suppress(ValueError):
                    records.append(json.loads(line))
        return records

    def replace(self, records: Iterable[Record]) -> None:
        """Make these the only records, all in rank 0's file."""
        write(self.path, "".join(map(json_line, records)))
        for path in self._others():
            path.unlink()
        sync_folder(self.path.parent)

    def remove(self) -> None:
        for path in (self.path, *self._others()):
            path.unlink(missing_ok=True)

    def _others(self) -> list[Path]:
        if not self.path.parent.is_dir():
            return []
        return sorted(
            path
            for path in self.path.parent.iterdir()
            if path.name.startswith(self._prefix)
            and path.name.endswith(self._suffix)
            and path.name[len(self._prefix) : len(path.name) - len(self._suffix)].isdigit()
            and path != self.path
        )


class Appender:
    """Adds lines to a file, on disk every ``SYNC_SECONDS``. Use as a context manager."""

    def __init__(self, path: Path):
        self._file = path.open("ab+")
        if self._file.tell():
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")  # ends a line that a kill cut short
        self._synced = time.monotonic()

    def add(self, records: Iterable[Record]) -> None:
        self._file.writelines(json_line(record).encode() for record in records)
        self._file.flush()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def __enter__(self) -> Appender:
        return self

    def __exit__(self, *_) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def json_line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
