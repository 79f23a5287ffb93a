"""The reader of shards: members of samples by offset, from this machine, a cache or another machine.

A shard is not trusted: its members are read as bytes, nothing is extracted or unpickled.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from vlmds.data.cache import ShardCache
from vlmds.errors import InputError, SampleError
from vlmds.files import is_url, sha256_of

CACHED_SHARDS = 64  # open files, and row groups of the index, that a process keeps

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


@dataclass(frozen=True)
class ShardInfo:
    """A shard as dataset.json lists it. path: relative to the dataset; bytes: the tar's size."""

    split: str
    shard: int
    path: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Member:
    """A file in a shard's tar. offset: of its data, in bytes from the tar's start."""

    ext: str
    offset: int
    size: int
    crc32: int


class ShardReader:
    """Reads members of the shards of one dataset, and checks whole shards.

    Args:
        root: the dataset's folder or URL. listed: the shards, as dataset.json lists them.
        cache: where shards of a remote dataset are kept on this machine, if anywhere.
    """

    def __init__(self, root: Path, listed: list[dict[str, Any]], cache: ShardCache | None):
        self.root, self.listed, self.cache = root, listed, cache
        self.caching = cache is not None and is_url(root)
        self._by_path: dict[str, ShardInfo] | None = None
        # A copy that has left the cache takes its room on the disk for as long as it is open.
        self._files = RecentlyUsed(self._open, lambda file: file.close(), 1 if self.caching else CACHED_SHARDS)

    def read(self, path: str, key: str, members: Iterable[Member]) -> dict[str, bytes]:
        """A sample's members {extension: bytes}, each checked by its crc32.

        A cached copy of the shard that is damaged is replaced, and a file that another machine has
        replaced on a shared drive is opened again.

        Args:
            path: the shard, relative to the dataset. key: of the sample.

        Raises:
            SampleError: names shard, key and member.
        """
        try:
            return self._read(path, key, members)
        except SampleError as error:
            if getattr(error.__cause__, "errno", None) != errno.ESTALE:
                if self.cache is None or not self.caching:
                    raise
                if not self.cache.drop_if_damaged(self._info(path).sha256):
                    raise
            self._files.clear()
        return self._read(path, key, members)

    def read_part(self, path: str, key: str, member: Member, begin: int, size: int) -> bytes:
        """``size`` bytes of a member from ``begin`` on, which no checksum covers. Arguments and errors as of
        :meth:`read`."""
        where = f"{path}: {key}.{member.ext}"
        try:
            data = self._files.get(path)(member.offset + begin, size)
        except OSError as error:
            raise SampleError(f"{where}: {error.strerror or error}") from error
        if len(data) != size:
            raise SampleError(f"{where}: the shard ends before it")
        return data

    def verify(self, shards: Iterable[ShardInfo], level: str = "size") -> None:
        """Check shards by "size", or by "sha256" (which reads them). Raises InputError."""
        if level not in ("size", "sha256"):
            raise ValueError(f"level: {level!r}")
        for shard in shards:
            path = self.root / shard.path
            if not path.is_file():
                raise InputError(f"{path}: missing; run vlmds pack again to make it")
            size = path.stat().st_size
            if size != shard.bytes:
                raise InputError(
                    f"{path}: damaged, it has {size} bytes instead of {shard.bytes}; run vlmds pack again to replace it"
                )
            if level == "sha256" and sha256_of(path) != shard.sha256:
                raise InputError(
                    f"{path}: damaged, its sha256 is not the one in dataset.json; "
                    "delete it and run vlmds pack again to make it"
                )

    def _read(self, path: str, key: str, members: Iterable[Member]) -> dict[str, bytes]:
        found = {}
        for member in members:
            where = f"{path}: {key}.{member.ext}"
            try:
                data = self._files.get(path)(member.offset, member.size)
            except OSError as error:
                raise SampleError(f"{where}: {error.strerror or error}") from error
            if len(data) != member.size:
                raise SampleError(f"{where}: the shard ends before it")
            if zlib.crc32(data) != member.crc32:
                raise SampleError(f"{where}: damaged, its crc32 is not the index's")
            found[member.ext] = data
        return found

    def _info(self, path: str) -> ShardInfo:
        if self._by_path is None:
            self._by_path = {entry["path"]: ShardInfo(**entry) for entry in self.listed}
        return self._by_path[path]

    def _open(self, relative: str) -> LocalFile | RemoteFile:
        path = self.root / relative
        if not is_url(path):
            return LocalFile(os.open(path, os.O_RDONLY))
        if self.cache is not None:
            shard = self._info(relative)
            local = self.cache.fetch(path, shard.sha256, shard.bytes)
            if local is not None:
                return LocalFile(local)
        return RemoteFile(path)


class LocalFile:
    """An open file, read by offset, also when its name is gone. A fork shares it with its parent,
    which is safe: pread moves no file position."""

    def __init__(self, descriptor: int):
        self._file = descriptor

    def __call__(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, or fewer at the file's end. One pread gives at most 2 GiB."""
        parts = []
        while size and (part := os.pread(self._file, size, offset)):
            parts.append(part)
            size -= len(part)
            offset += len(part)
        return b"".join(parts)

    def close(self) -> None:
        os.close(self._file)


class RemoteFile:
    """A file on another machine, read by ranged requests. path: a UPath."""

    def __init__(self, path: Any):
        self._path = path

    def __call__(self, offset: int, size: int) -> bytes:
        """As :class:`LocalFile`. Raises OSError, whatever the protocol's driver raises."""
        try:
            return self._path.fs.cat_file(self._path.path, start=offset, end=offset + size)
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        pass


class RecentlyUsed(Generic[Key, Value]):
    """At most `limit` values, those used last. `make` makes a missing one, `drop` disposes of one."""

    def __init__(self, make: Callable[[Key], Value], drop: Callable[[Value], None], limit: int = CACHED_SHARDS):
        self._make, self._drop, self._limit = make, drop, limit
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key) -> Value:
        if key not in self._values:
            self._values[key] = self._make(key)
            if len(self._values) > self._limit:
                self._drop(self._values.popitem(last=False)[1])
        self._values.move_to_end(key)
        return self._values[key]

    def clear(self) -> None:
        while self._values:
            self._drop(self._values.popitem()[1])

    def __del__(self) -> None:
        self.clear()
