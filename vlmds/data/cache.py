"""The cache of a remote dataset's shards on this machine, kept for the next epoch and run.

Any number of processes may share a cache folder. One of them downloads a shard while others that
need it wait; the shard gets its name once it is complete and its sha256 is right. At the limit the
shards that were opened longest ago are deleted; a process that has one open can still read it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmds.files import sha256_of

BLOCK = 8 << 20  # bytes of a download at once
# No space, no permission to write, or (on some network drives) no locks.
UNUSABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOLCK,
    errno.ENOTSUP,
    errno.ENOSYS,
}


class ShardCache:
    """A folder for at most ``limit`` bytes of shards, on a disk where file locks work, best one of
    this machine. Can be pickled."""

    def __init__(self, folder: str | Path, limit: float):
        self.folder, self.limit = Path(folder), int(limit)
        self._warned = False

    def fetch(self, source: Path, sha256: str, size: int) -> int | None:
        """The shard at ``source`` (a UPath) as an open local file, downloaded if it is not here; None
        if it cannot be kept (disk full, larger than the limit), which is reported once.

        Raises:
            OSError: the source cannot be read, or has another ``sha256``.
        """
        path = self.folder / f"{sha256}.tar"  # by content: two datasets may share a folder
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if size > self.limit:
                raise OSError(errno.ENOSPC, f"a shard of {size:,} bytes is larger than data.cache_gb allows")
            with self._locked(f"{sha256}.lock"):
                if not path.is_file() or path.stat().st_size != size:
                    self._make_room(size)
                    self._download(source, path, sha256)
                file = os.open(path, os.O_RDONLY)
                os.utime(file)  # the time of last use
                return file
        except OSError as error:
            if error.errno not in UNUSABLE:
                raise
            if not self._warned:
                print(f"vlmds: {self.folder}: {error.strerror}; shards are read remotely", file=sys.stderr, flush=True)
                self._warned = True
            return None

    def drop_if_damaged(self, sha256: str) -> bool:
        """Hash the copy of a shard and remove it if its ``sha256`` is wrong. Returns whether there was
        a copy: if so, reading again may succeed."""
        path = self.folder / f"{sha256}.tar"
        try:
            with self._locked(f"{sha256}.lock"):
                if sha256_of(path) != sha256:
                    path.unlink()
                return True
        except OSError:
            return False

    def _download(self, source: Path, path: Path, sha256: str) -> None:
        temporary = path.with_suffix(".tmp")  # one process at a time: the lock is held
        try:
            with temporary.open("wb") as local:
                for block in _blocks(source):
                    local.write(block)
                local.flush()
                os.fsync(local.fileno())
            if sha256_of(temporary) != sha256:
                raise OSError(errno.EIO, "its sha256 is not the one in dataset.json")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Remove abandoned downloads, then the oldest shards, until ``size`` bytes fit. Downloads in
        progress are not counted."""
        with self._locked("room.lock"):
            kept = []
            for file in [*self.folder.glob("*.tar"), *self.folder.glob("*.tmp")]:
                try:
                    found = file.stat()
                    if file.suffix == ".tmp" and self._abandoned(file):
                        file.unlink()
                        continue
                except FileNotFoundError:
                    continue
                kept.append((found.st_mtime, found.st_size, file))
            total = sum(bytes_ for _, bytes_, _ in kept)
            for _, bytes_, file in sorted(kept):
                if total + size <= self.limit:
                    break
                if file.suffix == ".tar":
                    file.unlink(missing_ok=True)
                    total -= bytes_

    def _abandoned(self, temporary: Path) -> bool:
        """Whether the process that was downloading this has ended."""
        with temporary.with_suffix(".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
        return True

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """A lock that the kernel releases when its process ends."""
        with (self.folder / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _blocks(source: Path) -> Iterator[bytes]:
    """A remote file in blocks. Raises OSError, whatever its protocol's driver raises."""
    try:
        with source.open("rb") as remote:
            while block := remote.read(BLOCK):
                yield block
    except OSError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error
