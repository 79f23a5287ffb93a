"""Clips of a packed dataset for a web page: byte ranges of videos in their shards, and frames.

Videos that browsers cannot play are encoded once (:mod:`vlmds.video.encode`) and kept in a folder. Shards are not
trusted: a video's bytes go to the browser or to the process that encodes them, and are not opened here.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmds.console.text import counted
from vlmds.data.index import SampleRow, ShardIndex
from vlmds.data.shard_reader import Member
from vlmds.data.stored import read_description, read_video
from vlmds.errors import InputError, SampleError
from vlmds.files import replacing
from vlmds.video.encode import encoded

PICTURES = {"jpg": "image/jpeg", "jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp", "gif": "image/gif",
            "apng": "image/apng"}  # fmt: skip
PLAYED = {"mp4": ("h264", "vp9", "av1"), "webm": ("vp8", "vp9", "av1")}
"""Codecs that browsers play, by the container. What one does not play after all it asks to be encoded."""
CHUNK = 1 << 18  # bytes


@dataclass(frozen=True)
class Media:
    """How a page shows a clip. kind: "video", "picture", "frames" (number of them in count), or "none": the videos
    are not in this dataset. start, end: the clip's span in the video, seconds. encode: browsers are not expected to
    play the file as it is."""

    kind: str
    start: float = 0.0
    end: float = 0.0
    encode: bool = False
    count: int = 0


class ClipStore:
    """The clips of one dataset. Threads may share it.

    Args:
        root: folder or URL of the dataset. keys: the clips that will be asked for. cache: folder for encoded videos.

    Raises:
        InputError: no dataset, or clips that it does not have.
    """

    def __init__(self, root: str | Path, keys: Collection[str], cache: Path):
        self.index = ShardIndex.open(root)
        self.cache = cache
        self._reading = threading.Lock()  # the index's caches are of one thread
        self._encoding: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._encoders = threading.Semaphore(2)  # an encoder uses all cores
        self._places = self._find({*keys})
        if missing := [key for key in keys if key not in self._places]:
            raise InputError(
                f"--data {root}: {counted(len(missing), 'clip')} of {len(keys):,} are not in it, such as {missing[0]}; "
                "give the dataset that the runs were evaluated on"
            )

    def missing_shards(self) -> list[str]:
        """Why shards of the clips cannot be read, a line each."""
        found = []
        for split, number in sorted({place[:2] for place in self._places.values()}):
            try:
                self.index.verify([self.index.shards(split)[number]])
            except InputError as error:
                found.append(str(error))
        return found

    def description(self, key: str) -> dict[str, Any]:
        """The clip's JSON: captions, source, prompt, columns … Raises SampleError."""
        row = self._row(key)
        return read_description(self._read(row, [m for m in row.members if m.ext == "json"]))

    def shard(self, key: str) -> tuple[str, int]:
        """(split, number of the shard) of the clip."""
        row = self._row(key)
        return row.split, row.shard

    def media(self, key: str) -> Media:
        row = self._row(key)
        if self.index.store == "features":
            return Media("none")
        if self.index.store == "frames":
            return Media("frames", count=sum(m.ext != "json" for m in row.members))
        member = _video(row)
        if member.ext in PICTURES:
            return Media("picture")
        start, end = row.span
        container = _container(self._part(row, member, 0, 16))
        encode = container is None or row.codec not in PLAYED[container]
        return Media("video", round(start, 3), round(end, 3), encode)

    def size(self, key: str) -> tuple[int, str]:
        """(bytes of the clip's video or picture as it is stored, media type). Raises SampleError."""
        row = self._row(key)
        member = _video(row)
        beginning = self._part(row, member, 0, 16)  # also of a picture: an error must come before the answer begins
        if member.ext in PICTURES:
            return member.size, PICTURES[member.ext]
        return member.size, "video/webm" if _container(beginning) == "webm" else "video/mp4"

    def read(self, key: str, begin: int, end: int) -> Iterator[bytes]:
        """These bytes of the stored video, in parts. Raises SampleError."""
        row = self._row(key)
        member = _video(row)
        for place in range(begin, end, CHUNK):
            yield self._part(row, member, place, min(CHUNK, end - place))

    def frame(self, key: str, number: int) -> bytes:
        """A JPEG of a frames store. Raises SampleError."""
        row = self._row(key)
        return self._read(row, [m for m in row.members if m.ext == f"{number}.jpg"]).get(f"{number}.jpg", b"")

    def encoded(self, key: str) -> Path:
        """The clip's span as a file that browsers play, made if it is not there. Raises SampleError."""
        row = self._row(key)
        member = _video(row)
        named = [row.split, row.shard, row.key, member.crc32, *row.span]
        path = self.cache / f"{hashlib.sha256(repr(named).encode()).hexdigest()[:24]}.mp4"
        with self._encoding[key], self._encoders:
            if not path.is_file():
                data = read_video(self._read(row, [member]))
                playable = encoded(data, row.start, row.end)
                with replacing(path) as file:
                    file.write(playable)
        return path

    def columns(self, name: str, keys: Collection[str]) -> Mapping[str, str]:
        """{clip: value of a kept column}. Raises InputError if no clip has it."""
        found, others = {}, set()
        for key in keys:
            try:
                columns = self.description(key).get("columns") or {}
            except SampleError:
                columns = {}
            others |= {*columns}
            found[key] = str(columns.get(name))
        if name not in others:
            kept = f"it has {', '.join(sorted(others))}" if others else "it has none (vlmds pack --keep-columns)"
            raise InputError(f"--stratify {name}: no such column was kept in {self.index.root}; {kept}")
        return found

    def _find(self, keys: set[str]) -> dict[str, tuple[str, int, int]]:
        """{key: (split, position of the shard in its split, position in the shard)}"""
        found: dict[str, tuple[str, int, int]] = {}
        positions: Counter[str] = Counter()
        for table in self.index.tables(["split", "key"]):
            split = table["split"][0].as_py()
            for number, key in enumerate(table["key"].to_pylist()):
                if key in keys:
                    found.setdefault(key, (split, positions[split], number))
            positions[split] += 1
        return found

    def _row(self, key: str) -> SampleRow:
        with self._reading:
            return self.index.row(*self._places[key])

    def _read(self, row: SampleRow, members: list[Member]) -> dict[str, bytes]:
        with self._reading:
            return self.index.read_members(row, members)

    def _part(self, row: SampleRow, member: Member, begin: int, size: int) -> bytes:
        """Bytes of a member, which no checksum covers: for showing only."""
        with self._reading:
            return self.index.read_part(row, member, begin, min(size, member.size - begin))


def _video(row: SampleRow) -> Member:
    videos = [member for member in row.members if member.ext != "json"]
    if len(videos) != 1:
        raise SampleError(f"{len(videos)} videos instead of one")
    return videos[0]


def _container(beginning: bytes) -> str | None:
    if beginning[4:8] == b"ftyp":
        return "mp4"
    return "webm" if beginning[:4] == b"\x1a\x45\xdf\xa3" else None
