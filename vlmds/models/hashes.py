"""Hashes of weight files (sha256), computed once while a file stays unchanged.

The name of a large file in the hub's cache is its sha256. For any other file above :data:`SMALL`
bytes the hash is stored in ``~/.cache/vlmds/sha256/`` (or below XDG_CACHE_HOME), in one small JSON
file for each weight file, which no other process changes. (Beside the weights there is often no
permission to write.) A stored hash is valid while size, inode and the times of the last change of
content and of inode are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from vlmds.console.progress import phase
from vlmds.errors import InputError
from vlmds.files import sha256_of, write

SMALL = 16 << 20  # bytes; of smaller files it is computed each time
RACY_SECONDS = 2.0
"""The hash of a file changed less than this before it is read is not stored: some file systems keep times
to two seconds only, and a second change could go unnoticed."""


def weights_sha256(files: Mapping[str, Path]) -> dict[str, str]:
    """sha256 of each of these local files, by the same names.

    Raises:
        InputError: one cannot be read.
    """
    found = {}
    try:
        total = sum(path.stat().st_size for path in files.values())
        with phase("checking weights", total, "bytes", each_node=True) as shown:
            for name, path in files.items():
                found[name] = weight_sha256(path, shown.advance)
    except OSError as error:
        raise InputError(
            f"{error.filename or path}: cannot be read: {error.strerror}; make it readable, or download the model again"
        ) from None
    return found


def weight_sha256(path: Path, advance: Callable[[int], object] = lambda size: None) -> str:
    """sha256 of a local file, in hexadecimal. advance: called with the bytes that were read, or whose
    hash was known."""
    known = _name_of_blob(path)
    if known is not None:
        advance(path.stat().st_size)
        return known
    before, now = _state(path), time.time()
    size = before[0]
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    memo = cache_folder() / "sha256" / f"{digest}.json"
    if size > SMALL and (known := _recalled(memo, before)) is not None:
        advance(size)
        return known
    sha256 = sha256_of(path, advance)
    settled = now - max(before[1], before[2]) / 1e9 >= RACY_SECONDS
    if size > SMALL and settled and _state(path) == before:
        try:
            write(memo, json.dumps({"path": str(path.resolve()), "state": before, "sha256": sha256}))
        except OSError:  # no home, or a full one: it is computed again the next time
            pass
    return sha256


def cache_folder() -> Path:
    """This user's folder of files that can be computed again."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "vlmds"


def _name_of_blob(path: Path) -> str | None:
    """sha256 of a file of the hub's cache, a link to ``blobs/<sha256>``; None for other files. (Small
    files there are named by a git hash of 40 digits.)"""
    if not path.is_symlink():
        return None
    target = path.parent / os.readlink(path)  # which may be a link itself, to a store of chunks
    is_blob = target.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", target.name)
    return target.name if is_blob else None


def _state(path: Path) -> list[int]:
    """Size, times of the last change of content and of inode in ns, and inode."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _recalled(memo: Path, state: list[int]) -> str | None:
    """The stored hash of a file in this state, or None."""
    try:
        known = json.loads(memo.read_bytes())
        return str(known["sha256"]) if known["state"] == state else None
    except (OSError, ValueError, LookupError, TypeError):  # none, or a damaged one
        return None
