"""Packing of shards with decoding processes of this machine."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from vlmds.console.progress import Phase, phase
from vlmds.packing.manifest import ManifestRow
from vlmds.packing.options import PackOptions
from vlmds.packing.shards import Shard, write_shard
from vlmds.video.decode_work import VideoReply, VideoRequest
from vlmds.video.pool import DecodePool


def pack_here(out: Path, shards: list[Shard], options: PackOptions, workers: int | None, deadline: float) -> None:
    """Pack these shards with decoding processes of this machine."""
    rows = sum(len(shard.rows) for shard in shards)
    lanes = min(workers or len(os.sched_getaffinity(0)), max(rows, 1))
    requests = (request(row, options) for shard in shards for row in shard.rows)
    with DecodePool(lanes, deadline) as pool, phase("packing", rows, "videos", left=True) as shown:
        replies = counting(pool.map(requests), shown)
        for shard in shards:
            write_shard(out, shard, replies)


def request(row: ManifestRow, options: PackOptions) -> VideoRequest:
    """The request to a decoding process for a manifest row."""
    return VideoRequest(
        row.video,
        row.start,
        row.end,
        options.store,
        options.num_frames,
        options.image_size,
        options.quality,
        options.verify,
        options.fit,
    )


def counting(replies: Iterable[VideoReply], shown: Phase) -> Iterator[VideoReply]:
    """The same replies, each counted."""
    rejected = 0
    for reply in replies:
        rejected += reply.reason is not None
        shown.note = f"{rejected:,} rejected" if rejected else ""
        shown.advance()
        yield reply
