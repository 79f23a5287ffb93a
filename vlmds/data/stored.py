"""The frames of samples that are packed already, for what looks at or converts a dataset."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from vlmds.data.decode_child import DecodePool
from vlmds.data.index import SampleRow, ShardIndex
from vlmds.data.prepare import Reply, Request
from vlmds.errors import SampleError


def decode_stored(
    index: ShardIndex, rows: Iterable[SampleRow], pool: DecodePool, *, store: str, num_frames: int,
    image_size: int, quality: int = 95,
) -> Iterator[Reply]:
    """For each sample of a video store, in order, what `prepare` makes of its video for `store`:
    "frames" (JPEGs) or "pixels"; or the reason why it cannot. A sample that cannot be read from
    its shard is a Reply with a reason, too."""
    with tempfile.TemporaryDirectory(prefix="vlmds-") as folder:
        damaged: dict[int, str] = {}

        def requests() -> Iterator[Request]:
            for number, row in enumerate(rows):
                path = Path(folder) / str(number)
                try:
                    members = index.read(row)
                    del members["json"]
                    path.write_bytes(*members.values())
                except SampleError as error:
                    damaged[number] = str(error)  # the child only finds no file
                yield Request(str(path), row.start, row.end, store, num_frames, image_size, quality)

        for number, reply in enumerate(pool.map(requests())):
            (Path(folder) / str(number)).unlink(missing_ok=True)
            yield Reply(damaged.pop(number)) if number in damaged else reply


def pixels_of(reply: Reply, image_size: int) -> np.ndarray | SampleError:
    """A reply to a request for "pixels" as uint8 [F, 3, image_size, image_size]."""
    if reply.reason is not None:
        return SampleError(reply.reason)
    pixels = np.frombuffer(reply.members["rgb"], np.uint8)
    return pixels.reshape(-1, 3, image_size, image_size)
