"""Contents of packed samples: descriptions, videos and frames.

Shards may come from elsewhere, so every member is checked before use.
"""

import io
import json
import tempfile
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmds.data.index import SampleRow, ShardIndex
from vlmds.errors import SampleError
from vlmds.video.decode_work import VideoReply, VideoRequest
from vlmds.video.fit import FIT
from vlmds.video.pool import DecodePool
from vlmds.video.sampling import kept_frames


def read_description(members: dict[str, bytes]) -> dict[str, Any]:
    """A sample's member "json": captions (some), prompt (may be missing) and facts of the video.
    Raises SampleError."""
    try:
        description = json.loads(members["json"])
        captions, prompt = description["captions"], description.get("prompt")
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SampleError(f"its description cannot be read: {type(error).__name__}") from None
    if not (isinstance(captions, list) and captions and all(isinstance(caption, str) for caption in captions)):
        raise SampleError("its description cannot be read: captions is not a list of texts")
    if not isinstance(prompt, str | None):
        raise SampleError("its description cannot be read: prompt is not a text")
    return description


def read_video(members: dict[str, bytes]) -> bytes:
    """The video file of a sample of a video store. Raises SampleError."""
    videos = [data for extension, data in members.items() if extension != "json"]
    if len(videos) != 1:
        raise SampleError(f"{len(videos)} videos instead of one")
    return videos[0]


def read_jpegs(members: dict[str, bytes], meta: dict[str, Any], still: bool = False) -> np.ndarray:
    """The frames of a sample of a frames store: uint8 [F, 3, S, S].

    members: the sample's, {extension: bytes}. meta: dataset.json. still: a still picture, of which F is 1;
    stores of version 2 have num_frames copies of it. Raises SampleError if number or size is not the one in
    dataset.json.
    """
    number = sum(extension != "json" for extension in members)
    if number != meta["num_frames"] and not (still and number == 1):
        raise SampleError(f"{number} frames, not {meta['num_frames']}" + (", of a still picture" if still else ""))
    return np.stack([read_jpeg(members, i, meta["image_size"]) for i in range(1 if still else number)])


def read_jpeg(members: dict[str, bytes], number: int, size: int) -> np.ndarray:
    """Frame ``number`` of a sample of a frames store: uint8 [3, size, size]. Raises SampleError."""
    try:
        # JPEG only: to open EPS, Pillow starts a program.
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
    fit: str = FIT,
) -> Generator[VideoReply, None, None]:
    """Decoded samples of a video store, in order.

    Args:
        store: "frames" gives JPEGs of this quality, "pixels" gives uncompressed frames; both give one of
            a still picture.
        fit: of the frames to the square (`resize_frames`).

    Yields:
        A VideoReply for each sample; with a reason if it cannot be read or decoded.
    """
    with tempfile.TemporaryDirectory(prefix="vlmds-") as folder:
        damaged: dict[int, str] = {}

        def requests() -> Iterator[VideoRequest]:
            for number, row in enumerate(rows):
                path = Path(folder) / str(number)
                try:
                    path.write_bytes(read_video(index.read(row)))
                except SampleError as error:
                    damaged[number] = str(error)  # the decoding process would only report a missing file
                wanted = kept_frames(row.frames, num_frames) if store == "pixels" else num_frames
                yield VideoRequest(str(path), row.start, row.end, store, wanted, image_size, quality, fit=fit)

        for number, reply in enumerate(pool.map(requests())):
            (Path(folder) / str(number)).unlink(missing_ok=True)
            yield VideoReply(damaged.pop(number)) if number in damaged else reply


def pixels_of(reply: VideoReply, image_size: int) -> np.ndarray | SampleError:
    """A reply to a request for "pixels": uint8 [F, 3, image_size, image_size] (F is 1 for a still picture), or
    its error."""
    if reply.reason is not None:
        return SampleError(reply.reason)
    pixels = np.frombuffer(reply.members["rgb"], np.uint8)
    return pixels.reshape(-1, 3, image_size, image_size)
