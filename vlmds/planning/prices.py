"""The cost of each store: bytes to keep and to read, and a core's seconds to decode a sample.

Decoding is timed on a few samples of the dataset, on this machine, in the decoding processes that
training uses too. Without data there is a table of typical clips, marked as not measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vlmds.console.text import counted
from vlmds.data.features import EXTENSION, bytes_per_sample, decode_features, encode_features
from vlmds.data.index import SampleRow, ShardIndex
from vlmds.data.stored import decode_stored, pixels_of, read_jpegs
from vlmds.errors import SampleError
from vlmds.packing.report import spread
from vlmds.video.jpeg import QUALITY, encode_jpegs
from vlmds.video.pool import DecodePool
from vlmds.video.sampling import is_still

SAMPLES = 6
SECONDS = 30.0  # after this long no further sample is timed


@dataclass(frozen=True)
class Price:
    """The cost of one sample in one store.

    name: the store, and the clip if it is a typical one. bytes: of its members. seconds: of one core,
    from the bytes in memory to the tensor for a batch. origin: how both are known.
    """

    store: str
    name: str
    bytes: float
    seconds: float
    origin: str


# Seconds: 8 frames -> 336 px on one core, 2026-11. Bytes of video: at a usual rate for the size.
ASSUMED = [
    Price("video", "video, 360p, 10 s", 10 * 0.8e6 / 8, 0.180, "typical, not measured here"),
    Price("video", "video, 1080p, 30 s", 30 * 5e6 / 8, 2.700, "typical, not measured here"),
    Price("frames", "frames", 8 * 55e3, 0.006, "typical, not measured here"),
]


@dataclass(frozen=True)
class Need:
    """The needs of a store per GPU. cores: busy with decoding. read: bytes a second. total: bytes of
    all samples, if their number is known."""

    price: Price
    cores: float
    read: float
    total: float | None

    def fed_by(self, cores: float) -> bool:
        """Whether that many cores decode as fast as the GPU trains."""
        return self.cores <= cores


def prices(
    parts: Sequence[ShardIndex], num_frames: int, image_size: int, patches: int, width: int, fit: str
) -> list[Price]:
    """Prices of the data's store and of those it can be converted to; of typical clips without data.

    parts: the packed datasets, all of one store. num_frames, image_size, fit: of the
    experiment's frames. patches, width: of its features, P vectors a frame.
    """
    features = _features_price(parts, num_frames, patches, width)
    if not parts:
        scale = num_frames / 8
        frames = [
            Price(p.store, p.name, p.bytes * scale, p.seconds * scale, p.origin) if p.store == "frames" else p
            for p in ASSUMED
        ]
        return [*frames, features]
    store = parts[0].store
    if store == "features":  # one of version 2 has copies of still pictures
        return [replace(features, bytes=_mean_size(parts))]
    chosen = [(part, spread(part, max(1, SAMPLES // len(parts)))) for part in parts]
    if store == "frames":
        return [_stored_frames_price(parts, chosen), features]
    return [*_video_prices(parts, chosen, num_frames, image_size, fit), features]


def needs(found: Sequence[Price], samples_per_second: float, samples: int | None) -> list[Need]:
    """The needs of each store at this rate per GPU. samples: in all, for the total size."""
    return [
        Need(
            price,
            price.seconds * samples_per_second,
            price.bytes * samples_per_second,
            None if samples is None else price.bytes * samples,
        )
        for price in found
    ]


def cheapest(found: Sequence[Need], cores: float) -> Need | None:
    """The smallest store that `cores` cores per GPU decode as fast as the GPU trains; None if there is
    none."""
    return min((need for need in found if need.fed_by(cores)), key=lambda need: need.price.bytes, default=None)


def _video_prices(
    parts: Sequence[ShardIndex],
    chosen: list[tuple[ShardIndex, list[SampleRow]]],
    num_frames: int,
    image_size: int,
    fit: str,
) -> list[Price]:
    """Prices of the videos, and of the frames that they would become."""
    seconds, frame_sizes, frame_seconds = [], [], []
    shape = {"num_frames": num_frames, "image_size": image_size}
    begin = time.monotonic()
    for index, rows in chosen:
        with DecodePool(1, deadline=SECONDS) as pool:
            # The first one starts the decoding process, so it is decoded twice and timed the second time.
            options: dict[str, Any] = {"num_frames": num_frames, "image_size": image_size, "fit": fit}
            replies = decode_stored(index, [rows[0], *rows], pool, store="pixels", **options)
            next(replies)
            for row in rows:
                started = time.perf_counter()
                frames = pixels_of(next(replies), image_size)
                elapsed = time.perf_counter() - started
                if not isinstance(frames, SampleError):
                    seconds.append(elapsed)
                    jpegs = encode_jpegs(frames, QUALITY)
                    frame_sizes.append(sum(map(len, jpegs.values())))
                    frame_seconds.append(_timed(read_jpegs, jpegs, shape, is_still(row.frames)))
                if time.monotonic() - begin > SECONDS:
                    break
            replies.close()
    if not seconds:
        return []
    origin = f"{counted(len(seconds), 'sample')} timed here"
    return [
        Price("video", "video (this data)", _mean_size(parts), float(np.mean(seconds)), origin),
        Price("frames", "frames", float(np.mean(frame_sizes)), float(np.mean(frame_seconds)), origin),
    ]


def _stored_frames_price(parts: Sequence[ShardIndex], chosen: list[tuple[ShardIndex, list[SampleRow]]]) -> Price:
    seconds = []
    for index, rows in chosen:
        for row in rows:
            try:
                members = index.read(row)
                seconds.append(_timed(read_jpegs, members, index.meta, is_still(row.frames)))
            except SampleError:
                continue  # damaged since it was packed; training reports it
    return Price(
        "frames",
        "frames (this data)",
        _mean_size(parts),
        float(np.mean(seconds or [0.0])),
        f"{counted(len(seconds), 'sample')} timed here",
    )


def _features_price(parts: Sequence[ShardIndex], num_frames: int, patches: int, width: int) -> Price:
    """With the share of still pictures in these datasets, of which one frame is kept."""
    meta = {"num_frames": num_frames, "vision": {"patches": patches, "width": width}}
    share = _share_of_stills(parts)
    size, seconds = 0.0, 0.0
    for frames, part in ((num_frames, 1 - share), (1, share)):
        if part:
            members = {EXTENSION: encode_features(torch.zeros(frames * patches, width))}
            size += part * bytes_per_sample(frames, patches, width)
            seconds += part * _timed(decode_features, members, meta, frames == 1)
    return Price("features", "features", size, seconds, "exact size, read timed here")


def _share_of_stills(parts: Sequence[ShardIndex]) -> float:
    """The share of the samples that are still pictures, 0 … 1; 0 without data."""
    stills = samples = 0
    for table in (table for part in parts for table in part.tables(["frames"])):
        samples += table.num_rows
        stills += sum(map(is_still, table["frames"].to_pylist()))
    return stills / max(samples, 1)


def _mean_size(parts: Sequence[ShardIndex]) -> float:
    """Mean bytes of a sample of all these datasets, in their shards."""
    shards = [shard for index in parts for split in index.splits for shard in index.shards(split)]
    return sum(shard.bytes for shard in shards) / sum(shard.count for shard in shards)


def _timed(action: Callable[..., object], *arguments: object) -> float:
    """Seconds of the call, the best of three: other processes only make it slower."""
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        action(*arguments)
        best = min(best, time.perf_counter() - started)
    return best
