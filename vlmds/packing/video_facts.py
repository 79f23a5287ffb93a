"""The sizes and hashes of videos that --shard-bytes, --dedup and --val-fraction need.

They change when a file is repaired or comes back, so they are recorded once, in `plan-{key}.jsonl`
beside the shards, where each task and each later start reads them.
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from vlmds.console.progress import phase
from vlmds.errors import InputError
from vlmds.files import as_path, as_spelled, is_url, sha256_of, write_once
from vlmds.packing.manifest import ManifestRow
from vlmds.packing.options import PackOptions
from vlmds.packing.shards import json_line

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
    found = recorded(out, key, len(rows), lambda: _look_up(rows, dedup, bool(packed)))
    return {row.row: tuple(fact) for row, fact in zip(rows, found)}


def recorded(out: Path, key: Any, count: int, make: Callable[[], list]) -> list:
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


def fingerprints(videos: list[str]) -> list[str | None]:
    """What identifies the content of each video, without reading all of it; see :func:`_fingerprint`."""
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
