"""Videos for browsers: a span of any video as an MP4 (H.264, without sound), encoded in a process of its own."""

from __future__ import annotations

import io
import resource
import signal
import subprocess
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
SECONDS = 120.0
"""That encoding may take."""
_MICROSECONDS = Fraction(1, 1_000_000)


def encoded(data: bytes, start: float | None = None, end: float | None = None, seconds: float = SECONDS) -> bytes:
    """The frames of [start, end] (seconds; default: the video), upright, as an MP4 that browsers play.

    Args:
        data: a video's bytes, which need not be trusted. seconds: that it may take.

    Raises:
        SampleError: the video cannot be decoded, or not in this time.
    """
    command = f"from vlmds.video.encode import main; main({start}, {end}, {seconds})"
    try:
        done = subprocess.run([sys.executable, "-c", command], input=data, capture_output=True, timeout=seconds + 30)
    except subprocess.TimeoutExpired:
        raise SampleError(f"decoder hung: stopped after {seconds:g} s") from None
    if done.returncode == 1:
        raise SampleError(done.stderr.decode(errors="replace").strip().splitlines()[-1][:300])
    if done.returncode < 0:
        raise SampleError(f"decoder crashed: signal {-done.returncode}")
    return done.stdout


def main(start: float | None, end: float | None, seconds: float) -> None:
    """The child process, from stdin to stdout. Exit code 1, with the reason on stderr: the video cannot be decoded."""
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
    """What :func:`encoded` returns, in this process. Raises SampleError."""
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
