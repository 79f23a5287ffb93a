"""Which rows make which shard (`vlmds pack`).

By numbers of rows this follows from the manifest alone. --shard-bytes and --dedup ask the videos
too, and the answers change when a file is repaired or comes back: so they are written down once, in
`plan-{key}.jsonl` beside the shards, where each task and each later start reads them.
"""

import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import fsspec

from vlmds.console.progress import phase
from vlmds.errors import InputError
from vlmds.files import as_path, sha256_of, write_once
from vlmds.packing.manifest import ManifestRow, Reject
from vlmds.packing.shards import PackOptions, Shard, json_line, options_hash

PLANS = "plan-*.jsonl"
ATTEMPTS = 4
THREADS, BATCH = 32, 4096

Value = TypeVar("Value")
Facts = dict[int, tuple[int, str | None]]  # by ManifestRow.row: bytes of the video, sha256


def facts_of(out: Path, rows: list[ManifestRow], options: PackOptions, dedup: bool, packed: dict[tuple, str]) -> Facts:
    """What the layout asks of the videos: their bytes (0 where there is no such file) and, for
    `dedup`, the sha256 of those that may have a double (of the others None).

    Empty if the layout asks nothing. packed: as for :func:`without_duplicates`.
    Raises InputError if a video's size or bytes cannot be read, or the plan in `out` is damaged.
    """
    if not rows or not (dedup or options.shard_bytes):
        return {}
    key = hashlib.sha256(json_line([dedup, bool(dedup and packed), [[row.source, row.start, row.end] for row in rows]]))
    path = out / f"plan-{key.hexdigest()[:16]}.jsonl"
    if not path.exists():
        # What stands there then may be another task's, whose answers are as good.
        write_once(path, b"".join(map(json_line, _look_up(rows, dedup, bool(packed)))))
    try:
        found = [tuple(json.loads(line)) for line in path.read_bytes().splitlines()]
    except ValueError:
        found = []
    if len(found) != len(rows):
        raise InputError(f"{path}: damaged; delete it to read the videos' sizes again")
    return {row.row: fact for row, fact in zip(rows, found)}


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


def _each(look: Callable[[str], Value], videos: list[str], what: str) -> dict[str, Value]:
    """What `look` says of each video; in batches, as each call waiting costs memory. what: it does,
    for the phase."""
    found = {}
    with phase(what, len(videos), "videos", left=True) as shown, ThreadPoolExecutor(THREADS) as pool:
        for at in range(0, len(videos), BATCH):
            batch = videos[at : at + BATCH]
            for video, answer in zip(batch, pool.map(look, batch)):
                found[video] = answer
                shown.advance()
    return found


def _size(video: str) -> int:
    return _ask(video, 0, lambda: int(fsspec.core.url_to_fs(video)[0].size(video) or 0))


def _digest(video: str) -> str | None:
    return _ask(video, None, lambda: sha256_of(as_path(video)))


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


def _ask(video: str, default, make: Callable):
    """What `make` returns of a video; the default where there is no such file or it may not be
    read, which packing then tells.

    The answer is for good: so other errors, such as a network's, are no answer, and are tried again.

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
        ):  # the last two: a protocol that nobody knows
            return default
        except Exception as error:  # each protocol's driver has its own
            if attempt + 1 == ATTEMPTS:
                raise InputError(
                    f"{video}: cannot be read to plan the shards: "
                    f"{type(error).__name__}: {error}; repair that and start again "
                    "(nothing is lost)"
                ) from error
            time.sleep(2.0**attempt)
