"""outside.json: what made captions that no run of vlmds made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from vlmds.errors import InputError
from vlmds.files import write

FORMAT, VERSION = "vlmds-outside", 1
RECORD = "outside.json"
FILE, MODEL = "predictions file", "outside model"
"""Kinds."""


@dataclass(frozen=True)
class Outside:
    """What outside.json records.

    source: the file, or the model's name or folder. revision: commit of a model from the hub. licence: as its
    model card names it. sha256: of the file of predictions.
    """

    id: str
    name: str
    kind: str
    source: str
    revision: str | None = None
    licence: str | None = None
    sha256: str | None = None


def read_outside(folder: Path) -> Outside:
    """The folder's outside.json. Raises InputError if it is damaged or of another version."""
    path = folder / RECORD
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if (found.pop("format"), found.pop("version")) != (FORMAT, VERSION):
            raise InputError(f"{path}: not of this vlmds; evaluate again")
        return Outside(**found)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{path}: damaged; evaluate again into another folder") from None


def write_outside(folder: Path, outside: Outside) -> None:
    record = {"format": FORMAT, "version": VERSION, **vars(outside)}
    write(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
