"""Find and read the samples of a packed dataset by position, without scanning its shards."""

import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from vlmds.errors import InputError, SampleError
from vlmds.files import sha256_of

FORMAT, VERSION = "vlmds", 1

# index.parquet has one row group per shard that holds a sample, in order of (split, shard).
SCHEMA = pa.schema([
    ("split", pa.string()), ("shard", pa.int32()), ("key", pa.string()),
    ("members", pa.list_(pa.struct([
        ("ext", pa.string()), ("offset", pa.int64()), ("size", pa.int64()),
        ("crc32", pa.uint32())]))),
    ("num_captions", pa.int32()), ("frames", pa.int32()), ("duration", pa.float64()),
    ("fps", pa.float64()), ("width", pa.int32()), ("height", pa.int32()), ("codec", pa.string()),
    ("rotation", pa.int16()), ("decoder", pa.string()), ("start", pa.float64()),
    ("end", pa.float64()), ("status", pa.string()),
])

CACHED_SHARDS = 64  # row groups, and open files, that a process keeps

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


@dataclass(frozen=True)
class SampleRow:
    """A sample's row in the index.

    shard: the number in the shard's name. duration, start, end: seconds, fps: mean frames per
    second, width, height: pixels as displayed, all of the original video.
    """

    split: str
    shard: int
    key: str
    members: tuple[Member, ...]
    num_captions: int
    frames: int
    duration: float
    fps: float
    width: int
    height: int
    codec: str
    rotation: int
    decoder: str
    start: float | None
    end: float | None
    status: str


class ShardIndex:
    """A packed dataset. Can be pickled, and used after a fork.

    root: its folder. meta: dataset.json. store: "video", "frames" or "features".
    fingerprint: changes with any byte of any sample. splits: names, sorted.
    """

    def __init__(self, root: Path, meta: dict[str, Any]):
        self.root = root
        self.meta = meta
        self.store: str = meta["store"]
        self.fingerprint: str = meta["index_sha256"]
        self._shards: dict[str, list[ShardInfo]] = {}
        self._first_group: dict[str, int] = {}
        for group, entry in enumerate(meta["shards"]):
            self._first_group.setdefault(entry["split"], group)
            self._shards.setdefault(entry["split"], []).append(ShardInfo(**entry))
        self.splits = sorted(self._shards)
        self._open_caches()

    @classmethod
    def open(cls, root: str | Path) -> "ShardIndex":
        """Open the dataset in folder `root`.

        Reads dataset.json and checks index.parquet against it, but no shard. Raises InputError.
        """
        root = Path(root)
        path = root / "dataset.json"
        try:
            meta = json.loads(path.read_bytes())
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; make a dataset with vlmds pack") from None
        except ValueError:
            raise InputError(f"{path}: damaged; run vlmds pack again") from None
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise InputError(f"{path}: not a vlmds dataset")
        if meta.get("version") != VERSION:
            raise InputError(f"{path}: format version {meta.get('version')}, but this vlmds reads "
                             f"version {VERSION}; pack the dataset again")
        index = root / "index.parquet"
        if not index.is_file():
            raise InputError(f"{index}: missing; run vlmds pack again")
        if sha256_of(index) != meta["index_sha256"]:
            raise InputError(f"{index}: damaged, its sha256 is not the one in dataset.json; "
                             "run vlmds pack again")
        return cls(root, meta)

    def shards(self, split: str) -> list[ShardInfo]:
        """The split's shards in order. Raises InputError if there is no such split."""
        if split not in self._shards:
            raise InputError(f"{self.root}: no split {split!r}; it has {', '.join(self.splits)}")
        return self._shards[split]

    def count(self, split: str) -> int:
        """Number of samples in the split."""
        return sum(shard.count for shard in self.shards(split))

    def row(self, split: str, shard_pos: int, i: int) -> SampleRow:
        """Sample `i` of the split's shard at `shard_pos` (a position in `shards(split)`)."""
        if not 0 <= i < self.shards(split)[shard_pos].count:
            raise IndexError(f"{split}: shard {shard_pos} has no sample {i}")
        table = self._tables.get(self._first_group[split] + shard_pos)
        values = table.slice(i, 1).to_pylist()[0]
        values["members"] = tuple(Member(**member) for member in values["members"])
        return SampleRow(**values)

    def read(self, row: SampleRow) -> dict[str, bytes]:
        """The sample's members {extension: bytes}, "json" among them, checked against the index.

        Nothing is extracted or unpickled. Raises SampleError naming shard, key and member.
        """
        path = f"{row.split}/{row.shard:06d}.tar"
        members = {}
        for member in row.members:
            where = f"{path}: {row.key}.{member.ext}"
            try:
                data = _pread(self._files.get(path), member.size, member.offset)
            except OSError as error:
                raise SampleError(f"{where}: {error.strerror}") from error
            if len(data) != member.size:
                raise SampleError(f"{where}: the shard ends before it")
            if zlib.crc32(data) != member.crc32:
                raise SampleError(f"{where}: damaged, its crc32 is not the index's")
            members[member.ext] = data
        return members

    def verify(self, shards: Iterable[ShardInfo], level: str = "size") -> None:
        """Check shards by "size", or by "sha256" (which reads them). Raises InputError."""
        if level not in ("size", "sha256"):
            raise ValueError(f"level: {level!r}")
        for shard in shards:
            path = self.root / shard.path
            if not path.is_file():
                raise InputError(f"{path}: missing; run vlmds pack again to make it anew")
            size = path.stat().st_size
            if size != shard.bytes:
                raise InputError(f"{path}: damaged, it has {size} bytes instead of {shard.bytes}; "
                                 "run vlmds pack again to make it anew")
            if level == "sha256" and sha256_of(path) != shard.sha256:
                raise InputError(f"{path}: damaged, its sha256 is not the one in dataset.json; "
                                 "delete it and run vlmds pack again to make it anew")

    def _open_caches(self) -> None:
        self._index: pq.ParquetFile | None = None
        self._tables = _Cache(self._read_group, lambda table: None)
        self._files = _Cache(lambda path: os.open(self.root / path, os.O_RDONLY), os.close)

    def _read_group(self, group: int) -> pa.Table:
        if self._index is None:
            self._index = pq.ParquetFile(self.root / "index.parquet")
        return self._index.read_row_group(group, use_threads=False)

    def __getstate__(self) -> tuple[Path, dict[str, Any]]:
        return self.root, self.meta

    def __setstate__(self, state: tuple[Path, dict[str, Any]]) -> None:
        self.__init__(*state)


class _Cache(Generic[Key, Value]):
    """The values last used, made on demand.

    A fork shares open files with its parent, which is safe: pread moves no file position.
    """

    def __init__(self, make: Callable[[Key], Value], drop: Callable[[Value], None]):
        self._make, self._drop = make, drop
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key) -> Value:
        if key not in self._values:
            self._values[key] = self._make(key)
            if len(self._values) > CACHED_SHARDS:
                self._drop(self._values.popitem(last=False)[1])
        self._values.move_to_end(key)
        return self._values[key]

    def __del__(self) -> None:
        for value in self._values.values():
            self._drop(value)


def _pread(file: int, size: int, offset: int) -> bytes:
    """`size` bytes from `offset`, or fewer at the file's end. One pread gives at most 2 GiB."""
    parts = []
    while size and (part := os.pread(file, size, offset)):
        parts.append(part)
        size -= len(part)
        offset += len(part)
    return b"".join(parts)
