"""The index of a packed dataset: samples by position, without a scan of its shards.

The dataset may lie on another machine (any URL that fsspec knows). What it says is not trusted:
a shard's place follows from its split and number.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from vlmds.data.cache import ShardCache
from vlmds.data.shard_reader import Member, RecentlyUsed, ShardInfo, ShardReader
from vlmds.errors import InputError
from vlmds.files import as_path, is_url, sha256_of

FORMAT = "vlmds"
VERSIONS = {"video": 2, "frames": 3, "features": 3}
"""The version that dataset.json gets, by store. Frames and features stores of version 2 have num_frames copies of a
still picture's frame, those of version 3 one; samples of version 2 may be among them (`vlmds pack --append`)."""

# index.parquet has one row group per shard that contains a sample, in order of (split, shard).
SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("shard", pa.int32()),
        ("key", pa.string()),
        (
            "members",
            pa.list_(
                pa.struct([("ext", pa.string()), ("offset", pa.int64()), ("size", pa.int64()), ("crc32", pa.uint32())])
            ),
        ),
        ("num_captions", pa.int32()),
        ("frames", pa.int32()),
        ("duration", pa.float64()),
        ("fps", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("codec", pa.string()),
        ("rotation", pa.int16()),
        ("decoder", pa.string()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("status", pa.string()),
    ]
)


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

    @property
    def span(self) -> tuple[float, float]:
        """(start, end) of the sample in its video, in seconds."""
        end = self.duration if self.end is None else min(self.end, self.duration)
        return self.start or 0.0, end


class ShardIndex:
    """A packed dataset. Can be pickled, and used after a fork.

    root: its folder or URL. meta: dataset.json. store: "video", "frames" or "features".
    fingerprint: changes with any byte of any sample. splits: names, sorted. cache: where shards of
    a remote dataset are kept on this machine, if anywhere.
    """

    def __init__(self, root: Path, meta: dict[str, Any], cache: ShardCache | None = None):
        self.root = root
        self.meta = meta
        self.cache = cache
        self.store: str = meta["store"]
        self.fingerprint: str = meta["index_sha256"]
        self._shards: dict[str, list[ShardInfo]] = {}
        self._first_group: dict[str, int] = {}
        for group, entry in enumerate(meta["shards"]):
            self._first_group.setdefault(entry["split"], group)
            self._shards.setdefault(entry["split"], []).append(ShardInfo(**entry))
        self.splits = sorted(self._shards)
        self._open_caches()
        _INDEXES.add(self)

    @classmethod
    def open(cls, root: str | Path, cache: ShardCache | None = None) -> ShardIndex:
        """Open the dataset in the folder or at the URL `root`.

        Reads dataset.json and checks the footer of index.parquet, whose pages carry checksums that
        are checked when they are read; no shard is opened. Raises InputError.
        """
        root = as_path(root)
        path = root / "dataset.json"
        try:
            meta = json.loads(path.read_bytes())
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}; make a dataset with vlmds pack") from None
        except ValueError:
            raise InputError(f"{path}: damaged; run vlmds pack again") from None
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise InputError(f"{path}: not a vlmds dataset")
        readable = sorted(set(VERSIONS.values()))
        if meta.get("version") not in readable:
            raise InputError(
                f"{path}: format version {meta.get('version')}, but this vlmds reads "
                f"versions {' and '.join(map(str, readable))}; pack the dataset again"
            )
        for entry in meta["shards"]:
            if (
                not re.fullmatch(r"[0-9A-Za-z_-]+", entry["split"])
                or entry["path"] != f"{entry['split']}/{entry['shard']:06d}.tar"
            ):
                raise InputError(
                    f"{path}: shard path {entry['path']!r} is not one that vlmds writes; do not use this dataset"
                )
            if not re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]):  # a file name in the cache
                raise InputError(
                    f"{path}: {entry['path']} has {entry['sha256']!r} for its sha256; do not use this dataset"
                )
        index = root / "index.parquet"
        if not index.is_file():
            raise InputError(f"{index}: missing; run vlmds pack again")
        if footer_sha256(index) != meta["index_footer_sha256"]:
            raise InputError(f"{index}: damaged, its footer is not the one in dataset.json; run vlmds pack again")
        return cls(root, meta, cache)

    def shards(self, split: str) -> list[ShardInfo]:
        """The split's shards in order. Raises InputError if there is no such split."""
        if split not in self._shards:
            raise InputError(f"{self.root}: no split {split!r}; it has {', '.join(self.splits)}")
        return self._shards[split]

    def count(self, split: str) -> int:
        """Number of samples in the split."""
        return sum(shard.count for shard in self.shards(split))

    def row(self, split: str, shard_pos: int, i: int) -> SampleRow:
        """Sample `i` of the split's shard at `shard_pos` (a position in `shards(split)`).

        Raises InputError if that part of the index is damaged, or the index has been replaced since
        it was opened.
        """
        shard = self.shards(split)[shard_pos]
        if not 0 <= i < shard.count:
            raise IndexError(f"{split}: shard {shard_pos} has no sample {i}")
        table = self._tables.get(self._first_group[split] + shard_pos)
        rows = table.slice(i, 1).to_pylist()
        if not rows or (rows[0]["split"], rows[0]["shard"]) != (split, shard.shard):
            raise InputError(
                f"{self.root / 'index.parquet'}: sample {i} of {shard.path} is not where "
                "dataset.json says; run vlmds pack again"
            )
        values = rows[0]
        values["members"] = tuple(Member(**member) for member in values["members"])
        return SampleRow(**values)

    def tables(self, columns: list[str]) -> Iterator[pa.Table]:
        """These columns of every shard's rows in turn. Raises InputError as :meth:`row` does."""
        return (self._read_group(group, columns) for group in range(len(self.meta["shards"])))

    def read(self, row: SampleRow) -> dict[str, bytes]:
        """The sample's members {extension: bytes}, "json" among them, checked against the index.
        Raises SampleError naming shard, key and member."""
        return self.read_members(row, row.members)

    def read_members(self, row: SampleRow, members: Iterable[Member]) -> dict[str, bytes]:
        """As :meth:`read`, some of the sample's members."""
        return self._reader.read(f"{row.split}/{row.shard:06d}.tar", row.key, members)

    def read_part(self, row: SampleRow, member: Member, begin: int, size: int) -> bytes:
        """``size`` bytes of a member from ``begin`` on; unchecked, as its crc32 is of the whole. Raises SampleError."""
        return self._reader.read_part(f"{row.split}/{row.shard:06d}.tar", row.key, member, begin, size)

    def verify_index(self) -> None:
        """Read all of index.parquet and check its sha256. Raises InputError."""
        index = self.root / "index.parquet"
        if sha256_of(index) != self.fingerprint:
            raise InputError(f"{index}: damaged, its sha256 is not the one in dataset.json; run vlmds pack again")

    def verify(self, shards: Iterable[ShardInfo], level: str = "size") -> None:
        """Check shards by "size", or by "sha256" (which reads them). Raises InputError."""
        self._reader.verify(shards, level)

    def _open_caches(self) -> None:
        self._index: pq.ParquetFile | None = None
        self._tables = RecentlyUsed(self._read_group, lambda table: None)
        self._reader = ShardReader(self.root, self.meta["shards"], self.cache)

    def _read_group(self, group: int, columns: list[str] | None = None) -> pa.Table:
        path = self.root / "index.parquet"
        replaced = (
            f"{path}: not the one that was opened; the dataset has been packed again, or "
            "appended to, since then: start again"
        )
        try:
            if self._index is None:
                # pyarrow's own file reads without moving a position, which a fork would share.
                source = path.open("rb") if is_url(path) else pa.OSFile(os.fsencode(path))
                if _footer_sha256(source) != self.meta["index_footer_sha256"]:
                    raise InputError(replaced)
                self._index = pq.ParquetFile(source, page_checksum_verification=True)
            return self._index.read_row_group(group, columns, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            if getattr(error, "errno", None) == errno.ESTALE:  # on NFS, by another machine
                raise InputError(replaced) from None
            raise InputError(f"{path}: damaged ({' '.join(str(error).split())[:120]}); run vlmds pack again") from None

    def _after_fork(self) -> None:
        """Connections to another machine belong to the parent; the child makes its own."""
        if is_url(self.root):  # asking for its .fs could make one before fsspec's own hook
            self.root = as_path(str(self.root))
            self._open_caches()

    def __reduce__(self) -> tuple:
        return ShardIndex, (self.root, self.meta, self.cache)


_INDEXES: weakref.WeakSet[ShardIndex] = weakref.WeakSet()


def _after_fork() -> None:
    for index in list(_INDEXES):
        index._after_fork()


os.register_at_fork(after_in_child=_after_fork)


def footer_sha256(path: Path) -> str:
    """The sha256 of a Parquet file's footer: the places of its columns, which no page's checksum covers."""
    with path.open("rb") as file:
        return _footer_sha256(file)


def _footer_sha256(file: BinaryIO | pa.NativeFile) -> str:
    file.seek(0, os.SEEK_END)
    end = file.tell()
    file.seek(max(end - 8, 0))
    length = int.from_bytes(file.read(4), "little")
    file.seek(max(end - 8 - length, 0))
    return hashlib.sha256(file.read()).hexdigest()
