"""Rewrite a video, for a video store, so that every reader sees the same frames in it.

Readers differ on edit lists that hide packets, on MPEG-TS, and on files that do not begin with a
keyframe. Such a file is rewritten: by copying its packets where that gives the same frames, else by
encoding it anew. A span [start, end] is cut out in the same two ways. Any other file is left alone.
The result holds the video stream only.
"""

import io
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import av
import numpy as np

from vlmds.data import video
from vlmds.data.video import VideoInfo
from vlmds.errors import SampleError

CRF = 18  # H.264's quality for which the loss is hardly visible
MIN_PSNR = 25.0  # dB, of each sampled frame that was encoded anew; noise has 30, other frames less
TIME = 1e-7  # seconds by which display times may differ: rounding, a tenth of what `pick` allows

_MPEG = {"mpegts", "mpeg"}
_MP4_CODECS = {"h264", "hevc", "av1", "vp9", "mpeg4", "mjpeg"}


@dataclass(frozen=True, eq=False)
class Repaired:
    """What is to be stored. start, end: the span in this file, seconds. record: how and why it
    differs from the original, {} if it does not."""

    data: bytes
    info: VideoInfo
    start: float | None
    end: float | None
    record: dict[str, Any]


def fault(info: VideoInfo) -> str | None:
    """Why readers may differ on the file, or None."""
    if info.discarded:
        return f"an edit list hides {info.discarded} packets"
    if info.preroll:
        return f"{info.preroll} packets before the first keyframe"
    return "MPEG stream" if info.container in _MPEG else None


def repair(
    data: bytes, info: VideoInfo, num_frames: int, start: float | None = None,
    end: float | None = None,
) -> Repaired:
    """The file, or what replaces it. `num_frames` frames of [start, end] are compared: exactly
    where packets were copied, else by PSNR. Raises SampleError if they cannot be kept.
    """
    reason = fault(info)
    whole = Repaired(data, info, start, end, {})
    if reason is None and start is None and end is None:
        return whole
    stored = whole
    if reason is not None:
        stored = _replaced(whole, _copied(data, info, 0, info.frames - 1), None, num_frames)
        # Where decord, the least able reader, is known to be right, others are too.
        if stored is not None and stored.info.decoder != "decord":
            stored = None
    if stored is not None and (start is not None or end is not None):
        stored = _cut(stored, num_frames)
    if stored is None:
        first, last = _needed(info, start, end)
        span_end = None if start is None and end is None else _end(info, end)
        encoded = _encoded(data, info, first, last, span_end)
        stored = _replaced(whole, encoded, first, num_frames, exact=False)
        if stored is None:
            raise SampleError("cannot be repaired: encoding it anew changes its frames")
    if reason is not None:
        stored.record["reason"] = reason
    return stored


def _cut(whole: Repaired, num_frames: int) -> Repaired | None:
    """The GOPs that the span needs, copied; None if that does not give the same frames."""
    first, last = _needed(whole.info, whole.start, whole.end)
    if not len(whole.info.keyframes):
        return None
    first = int(np.searchsorted(
        whole.info.pts, _keyframe_before(whole.info, first) - TIME))
    if (first, last) == (0, whole.info.frames - 1):
        return whole
    return _replaced(whole, _copied(whole.data, whole.info, first, last), first, num_frames)


def _keyframe_before(info: VideoInfo, frame: int) -> float:
    return info.keyframes[np.searchsorted(info.keyframes, info.pts[frame] + TIME) - 1]


def _needed(info: VideoInfo, start: float | None, end: float | None) -> tuple[int, int]:
    """First and last frame on display in the span, and one after it, which ends the last one."""
    (first,) = video.pick_frames(info.pts, np.array([start or 0.0]))
    after = int(np.searchsorted(info.pts, _end(info, end)))
    return int(first), min(after, info.frames - 1)


def _end(info: VideoInfo, end: float | None) -> float:
    return info.duration if end is None else min(end, info.duration)


def _replaced(
    old: Repaired, data: bytes | None, first: int | None, num_frames: int, exact: bool = True
) -> Repaired | None:
    """`old` with `data` in its place, which begins with frame `first` of it; None if the frames
    of the span are not the same.

    first: None keeps the whole video, and the span.
    """
    if data is None:
        return None
    span = first is not None and (old.start is not None or old.end is not None)
    start, end = old.start, old.end
    shift = 0.0
    if span:
        shift = float(old.info.pts[first])
        start, end = (old.start or 0.0) - shift, _end(old.info, old.end) - shift
    try:
        info = video.probe(data)
        if not _same_times(old, info, first or 0, shift, end if span else None):
            return None
        before = _frames(old.data, old.info, num_frames, old.start, old.end)
        after = _frames(data, info, num_frames, start, end)
    except SampleError:
        if exact:
            return None  # the original may be damaged; encoding tells
        raise
    record = dict(old.record)
    if exact:
        if not np.array_equal(before, after):
            return None
        record.setdefault("method", "copied")
    else:
        psnr = min(map(_psnr, before, after))
        if before.shape != after.shape or psnr < MIN_PSNR:
            raise SampleError(f"cannot be repaired: encoding it anew leaves a PSNR of {psnr:.1f} "
                              f"dB, under {MIN_PSNR:g}")
        record |= {"method": "encoded", "codec": "h264", "crf": CRF, "psnr": round(psnr, 1)}
    if span:
        record["cut"] = [round(shift, 6), round(shift + info.duration, 6)]
    return Repaired(data, info, start, end, record)


def _same_times(
    old: Repaired, info: VideoInfo, first: int, shift: float, end: float | None
) -> bool:
    """Whether the new file shows the old frames at the old times, and no reader can differ."""
    if fault(info) or (info.width, info.height) != (old.info.width, old.info.height):
        return False
    if end is None:
        wanted = old.info.pts[first:]
        if info.frames != len(wanted):
            return False
    else:
        _, last = _needed(old.info, old.start, old.end)
        wanted = old.info.pts[first:last + 1] - shift
        if info.frames < len(wanted) or info.duration < end - TIME:
            return False
    return bool(np.allclose(info.pts[:len(wanted)], wanted, rtol=0, atol=TIME))


def _frames(data, info, num_frames, start, end) -> np.ndarray:
    return video.decode_frames(data, replace(info, decoder="pyav"), num_frames, start, end)


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images in dB, at most 99."""
    error = np.mean((a.astype(np.float32) - b) ** 2)
    return float(10 * np.log10(255.0**2 / max(error, 1e-5)))


def _copied(data: bytes, info: VideoInfo, first: int, last: int) -> bytes | None:
    """Frames first … last by copying packets, with what comes between them in decoding order.

    None if the container refuses them.
    """
    if not info.by_pts:
        return None
    begin, finish = info.pts[first] + info.start_time, info.pts[last] + info.start_time
    name = "mp4" if info.codec in _MP4_CODECS and "matroska" not in info.container else "matroska"
    out = io.BytesIO()
    try:
        with video.open_video(data) as source, _create(out, name) as target:
            stream = video.video_stream(source)
            kept = []
            for packet in source.demux(stream):
                time = None if packet.pts is None else float(packet.pts * stream.time_base)
                if not packet.size or packet.is_discard or time < begin - TIME:
                    continue
                if not kept and not packet.is_keyframe:
                    continue
                kept.append((time, packet))
            while kept and kept[-1][0] > finish + TIME:
                kept.pop()
            copy = target.add_stream_from_template(stream)
            offset = kept[0][1].pts if kept else 0
            for _, packet in kept:
                packet.pts -= offset
                if packet.dts is not None:
                    packet.dts -= offset
                packet.stream = copy
                target.mux(packet)
    except (av.FFmpegError, ValueError):
        return None
    return out.getvalue()


def _encoded(data: bytes, info: VideoInfo, first: int, last: int, end: float | None) -> bytes:
    """Frames first … last as H.264, upright, at their display times. A last frame that would end
    before `end` (seconds in the original), if given, is shown again there."""
    out = io.BytesIO()
    with _create(out, "mp4") as target:
        stream, base = None, _time_base(data)
        for index, frame in video.iterate(data, info, first, last):
            frame = _upright(frame, info.rotation)
            if stream is None:
                stream = _h264_stream(target, frame, info, base)
            frame = frame.reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = round((info.pts[index] - info.pts[first]) / base), base
            frame.pict_type = 0
            target.mux(stream.encode(frame))
        times = info.pts[first:last + 1]
        gap = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
        if end is not None and times[-1] + gap < end - TIME:
            frame.pts = int(np.ceil(round((end - info.pts[first]) / float(base), 6)))
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    return out.getvalue()


def _h264_stream(target, frame: av.VideoFrame, info: VideoInfo, base: Fraction):
    """An encoder for frames like this. One thread: the bytes must not depend on the machine."""
    stream = target.add_stream("libx264", rate=Fraction(info.fps).limit_denominator(1001), options={
        "crf": str(CRF), "preset": "veryfast", "g": "48", "threads": "1"})
    stream.width, stream.height = frame.width, frame.height
    even = frame.width % 2 == frame.height % 2 == 0
    stream.pix_fmt = "yuv420p" if even and "420" in info.pix_fmt else "yuv444p"
    context = stream.codec_context
    context.time_base = base
    context.color_range = frame.color_range
    if frame.colorspace != 0:  # RGB, which becomes YUV
        context.colorspace = frame.colorspace
        context.color_primaries, context.color_trc = frame.color_primaries, frame.color_trc
    return stream


def _upright(frame: av.VideoFrame, rotation: int) -> av.VideoFrame:
    if not rotation:
        return frame
    image = np.rot90(frame.to_ndarray(format="rgb24"), -rotation // 90)
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")


def _time_base(data: bytes) -> Fraction:
    with video.open_video(data) as container:
        return video.video_stream(container).time_base


def _create(out: io.BytesIO, name: str) -> av.container.OutputContainer:
    # Without this FFmpeg writes its version, and random ids in Matroska.
    return av.open(out, "w", format=name, options={"fflags": "+bitexact"})
