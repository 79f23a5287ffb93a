"""What is in samples that are packed already: their descriptions and their frames.

Shards may come from elsewhere, so nothing is believed of a member but its bytes.
"""

import io
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmds.data.index import SampleRow, ShardIndex
from vlmds.errors import SampleError
from vlmds.video.decode_work import VideoReply, VideoRequest
from vlmds.video.pool import DecodePool


def read_description(members: dict[str, bytes]) -> dict[str, Any]:
    """A sample's member "json": captions (some), prompt (may be missing) and facts of the video.
    Raises SampleError."""
    try:
        told = json.loads(members["json"])
        captions, prompt = told["captions"], told.get("prompt")
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SampleError(f"its description cannot be read: {type(error).__name__}") from None
    if not (isinstance(captions, list) and captions and all(isinstance(caption, str) for caption in captions)):
        raise SampleError("its description cannot be read: captions are no list of texts")
    if not isinstance(prompt, str | None):
        raise SampleError("its description cannot be read: the prompt is no text")
    return told


def read_video(members: dict[str, bytes]) -> bytes:
    """The video file of a sample of a video store. Raises SampleError."""
    videos = [data for extension, data in members.items() if extension != "json"]
    if len(videos) != 1:
        raise SampleError(f"{len(videos)} videos, not one")
    return videos[0]


def read_jpegs(members: dict[str, bytes], meta: dict[str, Any]) -> np.ndarray:
    """The frames of a sample of a frames store: uint8 [F, 3, S, S].

    members: the sample's, {extension: bytes}. meta: dataset.json. Raises SampleError if they are
    not of the number and size that dataset.json promises.
    """
    number = sum(extension != "json" for extension in members)
    if number != meta["num_frames"]:
        raise SampleError(f"{number} frames, not {meta['num_frames']}")
    return np.stack([read_jpeg(members, i, meta["image_size"]) for i in range(number)])


def read_jpeg(members: dict[str, bytes], number: int, size: int) -> np.ndarray:
    """One of them: uint8 [3, size, size]. Raises SampleError."""
    try:
        # Of the other formats, one starts a program (EPS).
        with Image.open(io.BytesIO(members[f"{number}.jpg"]), formats=("JPEG",)) as image:
            if image.size == (size, size):
                return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
            width, height = image.size
    except (KeyError, OSError, Image.DecompressionBombError) as error:
        raise SampleError(f"frame {number}: {error}") from error
    raise SampleError(f"frame {number}: {width} x {height} pixels, not {size} x {size}")


def decode_stored(
    index: ShardIndex,
    rows: Iterable[SampleRow],
    pool: DecodePool,
    *,
    store: str,
    num_frames: int,
    image_size: int,
    quality: int | None = None,
) -> Iterator[VideoReply]:
    """For each sample of a video store, in order, what `prepare_video` makes of its video for `store`:
    "frames" (JPEGs of this quality) or "pixels"; or the reason why it cannot. A sample that cannot
    be read from its shard is a VideoReply with a reason, too."""
    with tempfile.TemporaryDirectory(prefix="vlmds-") as folder:
        damaged: dict[int, str] = {}

        def requests() -> Iterator[VideoRequest]:
            for number, row in enumerate(rows):
                path = Path(folder) / str(number)
                try:
                    path.write_bytes(read_video(index.read(row)))
                except SampleError as error:
                    damaged[number] = str(error)  # the child only finds no file
                yield VideoRequest(str(path), row.start, row.end, store, num_frames, image_size, quality)

        for number, reply in enumerate(pool.map(requests())):
            (Path(folder) / str(number)).unlink(missing_ok=True)
            yield VideoReply(damaged.pop(number)) if number in damaged else reply


def pixels_of(reply: VideoReply, image_size: int) -> np.ndarray | SampleError:
    """A reply to a request for "pixels" as uint8 [F, 3, image_size, image_size]."""
    if reply.reason is not None:
        return SampleError(reply.reason)
    pixels = np.frombuffer(reply.members["rgb"], np.uint8)
    return pixels.reshape(-1, 3, image_size, image_size)
