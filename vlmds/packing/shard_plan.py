"""The plan of the shards: which rows each has, and the split of each row.

Numbers of rows follow from the manifest alone. --shard-bytes, --dedup and --val-fraction also read
the videos, and the results change when a file is repaired or comes back. They are recorded once, in
`plan-{key}.jsonl` beside the shards, where each task and each later start reads them.
"""

import hashlib
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from vlmds.console.progress import phase
from vlmds.console.text import counted
from vlmds.errors import InputError
from vlmds.files import as_path, as_spelled, is_url, sha256_of, write_once
from vlmds.packing.manifest import ManifestRow, Reject
from vlmds.packing.options import PackOptions
from vlmds.packing.shards import Shard, json_line, options_hash

PLANS = "plan-*.jsonl"
ATTEMPTS = 4
END_BYTES = 64 << 10  # at each end of a video, which identify it
THREADS, BATCH = 32, 4096

Value = TypeVar("Value")
Facts = dict[int, tuple[int, str | None]]  # by ManifestRow.row: bytes of the video, sha256


def facts_of(out: Path, rows: list[ManifestRow], options: PackOptions, dedup: bool, packed: dict[tuple, str]) -> Facts:
    """What the plan needs of the videos: their bytes (0 where there is no such file) and, for
    `dedup`, the sha256 of those that may be copies (of the others None).

    Empty if nothing is needed. packed: as for :func:`without_duplicates`.
    Raises InputError if a video's size or bytes cannot be read, or the plan in `out` is damaged.
    """
    if not rows or not (dedup or options.shard_bytes):
        return {}
    key = [dedup, bool(dedup and packed), [[row.source, row.start, row.end] for row in rows]]
    found = _recorded(out, key, len(rows), lambda: _look_up(rows, dedup, bool(packed)))
    return {row.row: tuple(fact) for row, fact in zip(rows, found)}


def _recorded(out: Path, key: Any, count: int, make: Callable[[], list]) -> list:
    """`count` values, made once for a key and then read from the plan in `out`."""
    path = out / f"plan-{hashlib.sha256(json_line(key)).hexdigest()[:16]}.jsonl"
    if not path.exists():
        # The file may by now be another task's, which is as good.
        write_once(path, b"".join(map(json_line, make())))
    try:
        found = [json.loads(line) for line in path.read_bytes().splitlines()]
    except ValueError:
        found = []
    if len(found) != count:
        raise InputError(f"{path}: damaged; delete it to read the videos again")
    return found


def with_val(
    out: Path, rows: list[ManifestRow], undecided: set[int], fraction: float, packed: dict[str, str]
) -> tuple[list[ManifestRow], list[str]]:
    """The rows, of which those without a split go to "val" for a `fraction` of the source videos.

    A video is identified by its content (:func:`_fingerprint`), or by its name if it is a URL or the
    file is missing: spans and copies of one video are never in both splits. Rows without a split
    join rows of the same video that have one, or are `packed` (source -> split); for other videos a
    hash decides.

    Returns:
        the rows, and lines for the user
    """
    if not 0.0 <= fraction < 1.0:
        raise InputError(f"val_fraction: {fraction} is not in [0, 1)")
    if not fraction or not undecided:
        return rows, []
    videos = {row.source: row.video for row in rows}
    prints = _recorded(out, ["sources", list(videos)], len(videos), lambda: _fingerprints(list(videos.values())))
    content = dict(zip(videos, prints))
    splits = dict(packed)  # by source, and by content
    splits |= {content[source]: split for source, split in packed.items() if content.get(source)}
    for row in rows:
        if row.row not in undecided:
            splits.setdefault(row.source, row.split)
            splits.setdefault(content[row.source] or row.source, row.split)
    decided = []
    for row in rows:
        if row.row in undecided:
            name = content[row.source] or row.source
            hashed = "val" if _unit_interval(name) < fraction else "train"
            row = replace(row, split=splits.get(row.source) or splits.get(name) or hashed)
        decided.append(row)
    named = sum(found is None for found in prints)
    note = f"--val-fraction chose among {counted(len(videos), 'source video')}, identified by content"
    return decided, [note + (f", {named:,} of them by name (URLs, and files that are not there)" if named else "")]


def _fingerprints(videos: list[str]) -> list[str | None]:
    found = _each(_fingerprint, videos, "reading both ends of the videos")
    return [found[video] for video in videos]


def _fingerprint(video: str) -> str | None:
    """sha256 of a local file's size and of the 64 KiB at each end; None for a URL, which would cost
    requests, and where there is no such file."""
    if is_url(video):
        return None

    def read() -> str:
        with open(as_spelled(video), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(b"%d " % size + file.read(END_BYTES))
            file.seek(max(size - END_BYTES, 0))
            digest.update(file.read(END_BYTES))
            return digest.hexdigest()

    return None if not os.path.isfile(as_spelled(video)) else _ask(video, None, read)


def _unit_interval(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha1(text.encode()).digest()[:8], "big") / 2**64


def _look_up(rows: list[ManifestRow], dedup: bool, packed: bool) -> list[tuple[int, str | None]]:
    """Bytes and sha256 of the rows' videos."""
    videos = list(dict.fromkeys(row.video for row in rows))
    sizes = _each(_size, videos, "reading the videos' sizes")
    alike = Counter((sizes[row.video], row.start, row.end) for row in rows)
    doubtful = list(
        dict.fromkeys(
            row.video
            for row in rows
            if dedup and sizes[row.video] and (packed or alike[sizes[row.video], row.start, row.end] > 1)
        )
    )
    digests = _each(_digest, doubtful, "comparing videos of one size")
    return [(sizes[row.video], digests.get(row.video)) for row in rows]


def _each(read: Callable[[str], Value], videos: list[str], what: str) -> dict[str, Value]:
    """The result of `read` for each video; in batches, as each waiting call costs memory. what: the
    name of the phase."""
    found = {}
    with phase(what, len(videos), "videos", left=True) as shown, ThreadPoolExecutor(THREADS) as pool:
        for at in range(0, len(videos), BATCH):
            batch = videos[at : at + BATCH]
            for video, answer in zip(batch, pool.map(read, batch)):
                found[video] = answer
                shown.advance()
    return found


def _size(video: str) -> int:
    return _ask(video, 0, lambda: int(fsspec.core.url_to_fs(video)[0].size(as_spelled(video)) or 0))


def _digest(video: str) -> str | None:
    return _ask(video, None, lambda: sha256_of(as_path(as_spelled(video))))


def shards_of(rows: list[ManifestRow], options: PackOptions, facts: Facts, taken: dict[str, int]) -> list[Shard]:
    """All shards in order of (split, number); which rows a shard has never depends on rejects.

    taken: for each split, how many numbers belong to shards that are there already.
    """
    splits: dict[str, list[ManifestRow]] = defaultdict(list)
    for row in rows:
        splits[row.split].append(row)
    shards = []
    for split, members in sorted(splits.items()):
        number = taken.get(split, 0)
        for part in _cut(members, options, facts):
            shards.append(Shard(split, number, part, options_hash(part, options)))
            number += 1
    return shards


def _cut(rows: list[ManifestRow], options: PackOptions, facts: Facts) -> Iterator[list[ManifestRow]]:
    """The rows of a split in parts of at most shard_size rows and shard_bytes bytes of videos (but
    at least one row)."""
    part: list[ManifestRow] = []
    total = 0
    for row in rows:
        size = facts[row.row][0] if options.shard_bytes else 0
        full = len(part) == options.shard_size or (
            options.shard_bytes is not None and total + size > options.shard_bytes
        )
        if part and full:
            yield part
            part, total = [], 0
        part.append(row)
        total += size
    if part:
        yield part


def without_duplicates(
    rows: list[ManifestRow], facts: Facts, packed: dict[tuple, str]
) -> tuple[list[ManifestRow], list[Reject]]:
    """The rows but those whose video, byte for byte, and span an earlier row or one of the `packed`
    samples has, and the ledger's records of those.

    packed: (sha256, start, end) of a sample's video -> its key.
    """
    first = dict(packed)  # content and span -> who has it
    kept, dropped = [], []
    for row in rows:
        digest = facts[row.row][1]
        content = (digest, row.start, row.end)
        if digest is not None and content in first:
            dropped.append(
                Reject(row.row, row.id, row.source, f"duplicate content: the same as {first[content]!r}", row.split)
            )
        else:
            kept.append(row)
            if digest is not None:
                first[content] = row.id
    return kept, dropped


def _ask(video: str, default: Value, make: Callable[[], Value]) -> Value:
    """What `make` returns for a video; the default where there is no such file or it may not be
    read, which packing then reports.

    The result is recorded for good, and another error, such as a network's, is no result: it is
    tried again.

    Raises:
        InputError: it fails again and again.
    """
    for attempt in range(ATTEMPTS):
        try:
            return make()
        except (
            FileNotFoundError,
            PermissionError,
            IsADirectoryError,
            NotADirectoryError,
            ValueError,
            ImportError,
        ):  # the last two: an unknown protocol
            return default
        except Exception as error:  # each protocol's driver has its own
            if attempt + 1 == ATTEMPTS:
                raise InputError(
                    f"{video}: cannot be read to plan the shards: "
                    f"{type(error).__name__}: {error}; fix that and start again "
                    "(nothing is lost)"
                ) from error
            time.sleep(2.0**attempt)
    raise AssertionError
