"""The work of a decoding process on one video: the members that a store keeps of it, or its frames."""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vlmds.errors import SampleError
from vlmds.files import driver_advice, is_url
from vlmds.video import repair
from vlmds.video.decode import decode_decord, decode_frames
from vlmds.video.fit import FIT, resize_frames
from vlmds.video.frame_hash import hash_frames
from vlmds.video.frame_table import FrameTable
from vlmds.video.jpeg import encode_jpegs
from vlmds.video.probe import VideoInfo, probe
from vlmds.video.sampling import kept_frames, pick

MAX_BYTES = 8 << 30  # the largest member that a ustar header can state


@dataclass(frozen=True)
class VideoRequest:
    """A video to prepare; see `vlmds.packing.pack.pack` for the options.

    store: as for packing ("frames" gives one JPEG of a still picture); or "pixels": one member "rgb",
    uint8 [num_frames, 3, size, size]; or "facts": no members. quality: of the JPEGs, for store "frames".
    """

    video: str
    start: float | None
    end: float | None
    store: str
    num_frames: int
    image_size: int
    quality: int | None = None
    verify: bool = True
    fit: str = FIT


@dataclass(frozen=True)
class FramesRequest:
    """Frames of a video whose bytes follow; see `FrameDecoder.frames`."""

    num_frames: int
    image_size: int
    start: float | None
    end: float | None
    decoder: str
    described: dict[str, Any] | None = None
    fit: str = FIT


@dataclass(frozen=True)
class VideoReply:
    """A reason for rejection, or facts about the video and its members {extension: bytes}."""

    reason: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    members: Mapping[str, bytes | memoryview] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(len(member) for member in self.members.values())


def prepare_video(request: VideoRequest, data: bytes, more_time: Callable[[float], None] | None = None) -> VideoReply:
    """Probe the video (a file's bytes) and make its members. Raises SampleError.

    more_time: called with the additional seconds that a repair may take (see `repair.repair_video`).
    """
    info = probe(data)
    if request.store == "facts":
        return VideoReply(facts=_facts(info))
    if request.store == "pixels":
        images = resize_frames(_frames(request, data, info), request.image_size, request.fit)
        return VideoReply(None, _facts(info), {"rgb": images.tobytes()})
    content = hashlib.sha256(data).hexdigest()  # of what came in, to find duplicates
    if request.store == "video":
        reply = _kept_video(request, data, info, more_time)
        reply.facts["content"] = content
        return reply

    request = replace(request, num_frames=kept_frames(info.frames, request.num_frames))
    picks = pick(info, request.num_frames, request.start, request.end)
    frames = _frames(request, data, info)
    facts = (
        _facts(info)
        | {"content": content, "frame_hashes": hash_frames(frames)}
        | {"decoder": "pyav", "timestamps": [round(float(t), 6) for t in info.pts[picks]]}
    )
    assert request.quality is not None
    images = resize_frames(frames, request.image_size, request.fit)
    return VideoReply(None, facts, encode_jpegs(images, request.quality))


def _frames(request: VideoRequest, data: bytes, info: VideoInfo) -> np.ndarray:
    """uint8 [num_frames, H, W, 3]"""
    # PyAV: it reports damage that decord ignores.
    return decode_frames(data, replace(info, decoder="pyav"), request.num_frames, request.start, request.end)


def _kept_video(
    request: VideoRequest, data: bytes, info: VideoInfo, more_time: Callable[[float], None] | None
) -> VideoReply:
    """The file itself, or what `repair.repair_video` makes of it."""
    span = (request.num_frames, request.start, request.end)
    pick(info, *span)
    repaired = repair.repair_video(data, info, request.start, request.end, more_time)
    extension = _extension(request.video, info.container)
    facts: dict[str, Any] = {}
    if repaired is not None:
        data, info = repaired.data, repaired.info
        extension = "mkv" if "matroska" in info.container else "mp4"
        span = (request.num_frames, repaired.start, repaired.end)
        # The span of the file that is kept, in place of the manifest's.
        facts = {"repair": repaired.facts, "start": repaired.start, "end": repaired.end}
    facts |= _facts(info) | {"timing": info.timing()}
    if request.verify:
        frames = decode_frames(data, replace(info, decoder="pyav"), *span)
        facts["frame_hashes"] = hash_frames(frames)
        facts["decoder"] = _verified_decoder(data, info, span, frames)
    return VideoReply(None, facts, {extension: data})


def _facts(info: VideoInfo) -> dict[str, Any]:
    return {
        "frames": info.frames,
        "fps": round(info.fps, 6),
        "duration": round(info.duration, 6),
        "width": info.width,
        "height": info.height,
        "codec": info.codec,
        "rotation": info.rotation,
        "decoder": info.decoder,
    }


def read_frames(data: bytes, request: FramesRequest) -> VideoReply:
    """The frames of a packed video. Raises SampleError."""
    table: FrameTable
    if request.described is None:
        table = probe(data)
    else:
        try:
            table = FrameTable.from_described(request.described)
        except ValueError as error:
            raise SampleError(f"its description cannot be read: timing: {error}") from None
    if request.decoder != "decord":  # packing found that decord fails on this file
        table = replace(table, decoder="pyav")
    frames = decode_frames(data, table, request.num_frames, request.start, request.end)
    return VideoReply(members={"rgb": resize_frames(frames, request.image_size, request.fit).tobytes()})


def _verified_decoder(data: bytes, info: VideoInfo, span: tuple, frames: np.ndarray) -> str:
    """decord only if it gives the same frames of the span as PyAV, which gave `frames`."""
    if info.decoder == "pyav":
        return "pyav"
    try:
        same = np.array_equal(frames, decode_decord(data, info, pick(info, *span)))
    except SampleError:
        same = False
    return "decord" if same else "pyav"


def read_file(path: str) -> bytes:
    """The bytes of a local file or URL."""
    try:
        data = _read_url(path) if is_url(path) else _read_local(Path(path))
    except FileNotFoundError:
        raise SampleError("file not found") from None
    if not data:
        raise SampleError("file is empty")
    if len(data) >= MAX_BYTES:
        raise SampleError("file too large: 8 GiB is the limit of a tar member")
    return data


def _read_local(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            # Not MAX_BYTES for every file: reserving so many takes longer than reading.
            size = os.fstat(file.fileno()).st_size or MAX_BYTES  # 0: a pipe has no size
            return file.read(min(size, MAX_BYTES))
    except FileNotFoundError:
        from vlmds.files import as_spelled

        spelled = as_spelled(str(path))
        if spelled == str(path):
            raise
        return _read_local(Path(spelled))
    except OSError as error:
        raise SampleError(f"file cannot be read: {error.strerror}") from error


def _read_url(url: str) -> bytes:
    import fsspec

    if advice := driver_advice(url):
        raise SampleError(f"file cannot be read: {advice}")
    try:
        with fsspec.open(url, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise
    except Exception as error:  # each protocol's driver has its own
        raise SampleError(f"file cannot be read: {type(error).__name__}: {error}") from error


def _extension(path: str, container: str) -> str:
    extension = PurePosixPath(path.split("?")[0]).suffix[1:].lower()
    if extension.isascii() and extension.isalnum() and len(extension) <= 8 and extension != "json":
        return extension
    return {"matroska,webm": "mkv", "avi": "avi", "mpegts": "ts"}.get(container, "mp4")
