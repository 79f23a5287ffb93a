"""The opening of video files and pictures from untrusted sources.

FFmpeg also accepts playlists and session descriptions as videos, opens what they name, and so reads
other files and the network. Here a file is read from its own bytes alone.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.stream import Disposition

from vlmds.errors import SampleError
from vlmds.video.frame_table import MAX_PIXELS
from vlmds.video.webp import is_animated_webp, webp_to_mov

Source = str | os.PathLike | bytes

# FFmpeg's names of the formats that contain all of a video, or of a picture, in one file: their readers open no
# other file or address. Not among them are playlists (hls, dash, concat), session descriptions (sdp, rtsp),
# numbered files (image2, which takes a name for a pattern) and svg_pipe, whose pictures may name others.
_FORMATS = ",".join(
    """
    mov matroska avi mpegts mpeg flv live_flv asf ogg mxf gxf rm nut nsv wtv dv dhav swf ivf obu
    h261 h263 h264 hevc vvc mpegvideo m4v vc1 cavsvideo dirac mjpeg yuv4mpegpipe
    gif apng jpeg_pipe png_pipe webp_pipe
    """.split()
)

# Options that open a file without decoding, and those of its first streams.
_HEADERS_ONLY = {"probesize": "32", "fpsprobesize": "0"}
_NO_FRAMES = [{"skip_frame": "all", "threads": "1"}] * 8


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn FFmpeg's and the system's errors into a SampleError without the file's path."""
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        raise SampleError(f"{what}: {error.strerror}") from error


def opened(source: Source, headers_only: bool = False) -> av.container.InputContainer:
    """Open a file for reading. An animated WebP is opened as a MOV of the same frames.

    headers_only: skip the frames that FFmpeg decodes at opening to complete the headers. Raises
    SampleError (a playlist, for example) and FFmpeg's errors.
    """
    if is_animated_webp(_beginning(source)):
        source = webp_to_mov(source if isinstance(source, bytes) else Path(source).read_bytes())
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "" if isinstance(source, bytes) else "file"}
    if headers_only:
        options |= _HEADERS_ONLY
    try:
        # Titles in old code pages must not make the video unreadable.
        return av.open(
            file,
            metadata_errors="ignore",
            options=options,
            stream_options=_NO_FRAMES if headers_only else None,  # type: ignore[arg-type]  # PyAV takes dicts
        )
    except av.ArgumentError as error:
        raise SampleError("cannot be read: not a video file of a known format") from error


def is_mp4(source: Source) -> bool:
    """Whether it is an MP4 or MOV file, whose headers say all that `probe` asks for."""
    return _beginning(source)[4:8] == b"ftyp"


def is_sealed(source: Source) -> bool:
    """Whether the file begins as only MP4 and Matroska do: a reader without the limits of `opened`
    does not take it for a playlist either."""
    beginning = _beginning(source)
    return (
        beginning[4:8] == b"ftyp"
        and beginning[8:10] != b"jp"  # FFmpeg doubts JPEG 2000
        or beginning[:4] == b"\x1a\x45\xdf\xa3"
    )


def _beginning(source: Source) -> bytes:
    """The first 32 bytes."""
    if isinstance(source, bytes):
        return source[:32]
    with reading("cannot be read"), open(source, "rb") as file:
        return file.read(32)


def video_stream(container: av.container.InputContainer) -> av.video.stream.VideoStream:
    """The stream to decode. Raises SampleError."""
    stream = container.streams.best("video")
    if not isinstance(stream, av.video.stream.VideoStream) or stream.disposition & Disposition.attached_pic:
        raise SampleError("no video stream")
    if stream.width * stream.height > MAX_PIXELS:
        raise SampleError(
            f"frame too large: {stream.width} x {stream.height} pixels; the limit is {MAX_PIXELS >> 20} megapixels"
        )
    stream.thread_type = "NONE"
    stream.codec_context.options = {
        "err_detect": "explode",  # an error for damage, not a guess
        "max_pixels": str(MAX_PIXELS),
    }
    return stream


def time_base(stream: av.video.stream.VideoStream) -> Fraction:
    """Seconds of a tick of the stream's times; only a stream that is being written may have none."""
    assert stream.time_base is not None
    return stream.time_base
