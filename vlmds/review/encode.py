"""The process that encodes a clip for browsers: a video's bytes in, an MP4 (H.264, without sound) of its span out."""

from __future__ import annotations

import io
import resource
import signal
import sys
from fractions import Fraction

import av
import av.logging
import numpy as np

from vlmds.errors import SampleError
from vlmds.video.child import MEMORY
from vlmds.video.container import reading
from vlmds.video.decode import all_frames
from vlmds.video.probe import probe
from vlmds.video.sampling import clip_span, pick_frames
from vlmds.video.upright import upright_frame

LINES = 720
"""Height above which the picture is made smaller; and the width likewise, at 16:9."""
_MICROSECONDS = Fraction(1, 1_000_000)


def main(start: float | None, end: float | None, seconds: float) -> None:
    """Exit code 1, with the reason on stderr, for a video that cannot be decoded."""
    av.logging.set_level(av.logging.PANIC)  # errors become reasons
    signal.setitimer(signal.ITIMER_REAL, seconds)  # its default action ends the process, whatever FFmpeg is doing
    data = sys.stdin.buffer.read()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY + 3 * len(data), resource.RLIM_INFINITY))
    try:
        sys.stdout.buffer.write(encode_span(data, start, end))
    except (SampleError, MemoryError) as error:
        print(str(error) or f"out of memory: decoding needs more than {MEMORY >> 30} GiB", file=sys.stderr)
        sys.exit(1)


def encode_span(data: bytes, start: float | None, end: float | None) -> bytes:
    """The frames of [start, end] (seconds; default: the video), upright, as an MP4. Raises SampleError."""
    info = probe(data)
    begin, stop = clip_span(info.duration, start, end)
    first, last = (int(i) for i in pick_frames(info.pts, np.array([begin, stop])))
    scale = min(1.0, LINES / info.height, LINES * 16 / 9 / info.width)
    width, height = (max(2, round(side * scale / 2) * 2) for side in (info.width, info.height))
    buffer = io.BytesIO()
    with reading("cannot be encoded"), av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=30, options={"preset": "veryfast", "crf": "23", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = stream.codec_context.time_base = _MICROSECONDS
        for index, frame in all_frames(data, info, first, last):
            frame = upright_frame(frame, info).reformat(width=width, height=height, format="yuv420p")
            frame.pict_type = av.video.frame.PictureType.NONE
            frame.time_base, frame.pts = _MICROSECONDS, round((info.pts[index] - info.pts[first]) * 1e6)
            out.mux(stream.encode(frame))
        packets = stream.encode(None)
        if packets:
            packets[-1].duration = max(1, round((stop - info.pts[last]) * 1e6))
        out.mux(packets)
    return buffer.getvalue()
