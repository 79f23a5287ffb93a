"""Open a video file, which may come from anybody.

FFmpeg also takes playlists and session descriptions for videos, opens what they name, and so reads
other files and asks the network. Here a file is read from its own bytes alone.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager

import av
from av.stream import Disposition

from vlmds.errors import SampleError
from vlmds.video.frame_table import MAX_PIXELS

Source = str | os.PathLike | bytes

# FFmpeg's names of the formats that hold all of a video in one file.
_FORMATS = ",".join(
    (
        "mov",
        "matroska",
        "avi",
        "mpegts",
        "mpeg",
        "flv",
        "live_flv",
        "asf",
        "ogg",
        "mxf",
        "gxf",
        "rm",
        "nut",
        "nsv",
        "wtv",
        "dv",
        "dhav",
        "swf",
        "gif",
        "apng",
        "ivf",
        "obu",
        "h261",
        "h263",
        "h264",
        "hevc",
        "vvc",
        "mpegvideo",
        "m4v",
        "vc1",
        "cavsvideo",
        "dirac",
        "mjpeg",
        "yuv4mpegpipe",
        "jpeg_pipe",
        "png_pipe",
        "webp_pipe",
    )
)

# Opens a file without decoding; for each of its first streams.
_HEADERS_ONLY = {"probesize": "32", "fpsprobesize": "0"}
_NO_FRAMES = [{"skip_frame": "all", "threads": "1"}] * 8


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns FFmpeg's and the system's errors into a SampleError without the file's path."""
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        raise SampleError(f"{what}: {error.strerror}") from error


def opened(source: Source, headers_only: bool = False) -> av.container.InputContainer:
    """headers_only: do without the frames that FFmpeg decodes while it opens a file, to learn what
    the headers may not tell. Raises SampleError (a playlist, for one) and FFmpeg's errors."""
    in_memory = isinstance(source, bytes)
    file = io.BytesIO(source) if in_memory else os.fspath(source)
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "" if in_memory else "file"}
    if headers_only:
        options |= _HEADERS_ONLY
    try:
        # Titles in old code pages must not cost us the video.
        return av.open(
            file, metadata_errors="ignore", options=options, stream_options=_NO_FRAMES if headers_only else None
        )
    except av.ArgumentError as error:
        raise SampleError("cannot be read: not a video file of a known format") from error


def is_mp4(source: Source) -> bool:
    """MP4 or MOV, whose headers tell all that `probe` asks for."""
    return _beginning(source)[4:8] == b"ftyp"


def is_sealed(source: Source) -> bool:
    """A file that begins as only MP4 and Matroska do, so that a reader without the limits of
    `opened` does not take it for a playlist either."""
    beginning = _beginning(source)
    return (
        beginning[4:8] == b"ftyp"
        and beginning[8:10] != b"jp"  # FFmpeg doubts JPEG 2000
        or beginning[:4] == b"\x1a\x45\xdf\xa3"
    )


def _beginning(source: Source) -> bytes:
    """The first 12 bytes."""
    if isinstance(source, bytes):
        return source[:12]
    with reading("cannot be read"), open(source, "rb") as file:
        return file.read(12)


def video_stream(container: av.container.InputContainer) -> av.video.stream.VideoStream:
    """The stream to decode. Raises SampleError."""
    stream = container.streams.best("video")
    if stream is None or stream.disposition & Disposition.attached_pic:
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
