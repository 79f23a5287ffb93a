"""Repair at packing: for a video that readers decode differently, a file that all of them decode alike.

Edit lists that hide frames, MPEG program and transport streams, and packets that refer to what is
before the file's beginning give other frames in other readers. Such a file is written again: its
packets are copied if that gives the very same frames, and otherwise encoded (H.264). The same
function cuts a span out of a file. The new file is read back and compared, frame by frame, before it
is used. Sound is left out. Every other file stays as it is.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np

from vlmds.errors import SampleError
from vlmds.video.container import opened, reading, time_base, video_stream
from vlmds.video.decode import all_frames
from vlmds.video.probe import VideoInfo, probe
from vlmds.video.sampling import clip_span, pick, pick_frames
from vlmds.video.upright import upright, upright_frame

CRF = 18  # of x264: visually lossless for most content
MIN_PSNR = 30.0  # dB, of each frame that was encoded again
# Seconds that a repair may take: per frame of the video, and per megapixel of each frame. Several
# times what one core needs to decode, encode and compare.
FRAME_SECONDS, MEGAPIXEL_SECONDS = 0.01, 0.3

_STREAM_FORMATS = {"mpegts", "mpeg"}  # without a table of frames: readers disagree about the times
_EXACT_PIX_FMTS = {"yuv420p", "yuvj420p", "yuv444p", "yuvj444p"}  # encoded without conversion
_CHECKED = range(1, 65)  # for each of these numbers of frames, a span must choose the same frames


@dataclass(frozen=True)
class Repaired:
    """A new file. start, end: the span in its own times (seconds); None: the file's beginning or end.

    method: "copy" (the original's packets) or "encode". reason: what was wrong, or "cut".
    offset: where the new file begins in the original, seconds.
    """

    data: bytes
    info: VideoInfo
    method: str
    reason: str
    start: float | None
    end: float | None
    offset: float

    @property
    def facts(self) -> dict[str, str | float]:
        return {"method": self.method, "reason": self.reason, "offset": round(self.offset, 6)}


def flaw(info: VideoInfo) -> str | None:
    """Why readers may decode the video differently; None if they do not."""
    if info.discarded:
        return f"packets hidden by an edit list: {info.discarded}"
    if info.preroll:
        return f"packets that refer to what is before the first keyframe: {info.preroll}"
    if info.container in _STREAM_FORMATS:
        return f"{info.container} stream"
    return None


def repair_video(
    data: bytes,
    info: VideoInfo,
    start: float | None = None,
    end: float | None = None,
    more_time: Callable[[float], None] | None = None,
) -> Repaired | None:
    """A file in which every reader finds the frames of [start, end] (seconds; default: the video) of
    `data`; None if the original can be kept.

    A sound original is also kept if the span alone is not smaller. more_time: called before the work
    begins, with the seconds that it may take. Raises SampleError: the original cannot be decoded, or
    the new file differs from it.
    """
    reason = flaw(info)
    begin, stop = clip_span(info.duration, start, end)
    first, last = (int(i) for i in pick_frames(info.pts, np.array([begin, stop])))
    # One more frame, so that the new file does not end before the span.
    last = min(last + 1, info.frames - 1)
    part = (first, last) != (0, info.frames - 1)
    if more_time is not None and (part or reason):
        megapixels = info.width * info.height / 1e6
        more_time(info.frames * (FRAME_SECONDS + MEGAPIXEL_SECONDS * megapixels))
    found = None
    if part:
        try:
            found = _write(data, info, first, last, begin, stop, reason or "cut")
        except SampleError:
            if reason:
                raise
        if not reason:
            return found if found and len(found.data) < len(data) else None
    if reason and found is None:
        found = _write(data, info, 0, info.frames - 1, begin, stop, reason)
        if found is None:
            raise SampleError("cannot be repaired: the new file would give other frames")
    return found


def _write(
    data: bytes, info: VideoInfo, first: int, last: int, start: float, end: float, reason: str
) -> Repaired | None:
    """Frames first … last as a new file; None if [start, end] would give others in it."""
    whole = (first, last) == (0, info.frames - 1)
    copied, lead = _copy(data, info, first, last)
    if copied is not None:
        try:
            found = probe(copied)
            at = int(np.searchsorted(found.pts, lead - 1e-6))
            if (
                flaw(found) is None
                and len(found.keyframes)
                and _same_times(info, found, first, last, at)
                and not (whole and found.frames != info.frames)
                and _difference(data, info, first, last, copied, found, at) == 0
            ):
                place = _placed(found, info, first, at, (start, end))
                return Repaired(copied, found, "copy", reason, *place) if place else None
        except SampleError:
            pass  # if the original is damaged, encoding fails too
    encoded = _encode(data, info, first, last)
    found = probe(encoded)
    same = found.frames == last - first + 1 and _same_times(info, found, first, last, 0)
    if not same or flaw(found):
        raise SampleError("cannot be repaired: encoding changes the times of frames")
    error = _difference(data, info, first, last, encoded, found, 0)
    psnr = 20 * np.log10(255) - 10 * np.log10(max(error, 1e-9))
    if psnr < MIN_PSNR:
        raise SampleError(f"cannot be repaired: a frame encoded again has a PSNR of {psnr:.1f} dB")
    place = _placed(found, info, first, 0, (start, end))
    return Repaired(encoded, found, "encode", reason, *place) if place else None


def _same_times(info: VideoInfo, found: VideoInfo, first: int, last: int, at: int) -> bool:
    """Whether the new file has frames first … last of the original from its frame `at` on, with the
    same intervals."""
    want = info.pts[first : last + 1] - info.pts[first]
    have = found.pts[at : at + len(want)]
    return len(have) == len(want) and np.allclose(have - have[0], want, rtol=0, atol=1e-6)


def _placed(
    found: VideoInfo, info: VideoInfo, first: int, at: int, span: tuple[float, float]
) -> tuple[float | None, float | None, float] | None:
    """The span of the original in the new file's times (start, end), and where the new file begins in
    the original, seconds; None if that would choose other frames.

    found: of the new file, whose frame `at` is frame `first` of the original.
    """
    offset = float(info.pts[first] - found.pts[at])
    for start, end in ((None, None), (max(span[0] - offset, 0.0), span[1] - offset)):
        if all(np.array_equal(pick(found, n, start, end) - at, pick(info, n, *span) - first) for n in _CHECKED):
            return start, end, offset
    return None


def _copy(data: bytes, info: VideoInfo, first: int, last: int) -> tuple[bytes | None, float]:
    """The packets from the keyframe before frame `first` to frame `last`, in a new container, and
    the time of frame `first` in it.

    None if packets are not frames, or the container does not take them. Packets that an edit list
    hides, or that refer to what is before the keyframe, are left out; the caller checks whether the
    others can be decoded without them.
    """
    if not info.by_pts:
        return None, 0.0
    begin, end = info.pts[[first, last]] + info.start_time
    with reading("cannot be read"), opened(data) as container:
        stream = video_stream(container)
        packets = [p for p in container.demux(stream) if p.size]
        base = time_base(stream)
        ticks = [p.pts for p in packets if p.pts is not None]
        if len(ticks) < len(packets):
            return None, 0.0
        times = [float(tick * base) for tick in ticks]
        keys = [i for i, p in enumerate(packets) if p.is_keyframe and times[i] <= begin + 1e-6]
        if not keys:
            return None, 0.0
        key = max(keys)
        stop = max(i for i, t in enumerate(times) if t <= end + 1e-6 and not packets[i].is_discard)
        kept = [p for i, p in enumerate(packets[key : stop + 1], key) if not p.is_discard and times[i] >= times[key]]
        if not kept or not kept[0].is_keyframe:
            return None, 0.0
        buffer = io.BytesIO()
        name = "matroska" if "matroska" in info.container else "mp4"
        try:
            with av.open(buffer, "w", format=name, options={"fflags": "+bitexact"}) as out:
                copy = out.add_stream_from_template(stream)
                copy.time_base = base
                for packet in kept:
                    if packet.pts is not None:
                        packet.pts -= ticks[key]
                    if packet.dts is not None:
                        packet.dts -= ticks[key]
                    packet.stream = copy
                    out.mux(packet)
        except (av.FFmpegError, ValueError):  # a codec or packet that the container does not take
            return None, 0.0
    return buffer.getvalue(), begin - times[key]


def _encode(data: bytes, info: VideoInfo, first: int, last: int) -> bytes:
    """Frames first … last, upright, as H.264 in an MP4.

    Without B-frames: decoding order is display order, and no edit list is needed.
    """
    times = info.pts - info.pts[first]
    base = _exact_base(data, times)
    even = info.width % 2 == 0 and info.height % 2 == 0
    # One thread and no assembly that differs between CPUs: the same bytes on every machine.
    options = {
        "crf": str(CRF),
        "preset": "medium",
        "bf": "0",
        "g": "48",
        "x264-params": "threads=1:cpu-independent=1:open-gop=0",
    }
    buffer = io.BytesIO()
    with reading("cannot be repaired"), av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as out:
        stream: av.video.stream.VideoStream | None = None
        for index, frame in all_frames(data, info, first, last):
            frame = upright_frame(frame, info)
            if stream is None:
                exact = frame.format.name in _EXACT_PIX_FMTS and (even or "444" in frame.format.name)
                pix_fmt = frame.format.name if exact else "yuv420p" if even else "yuv444p"
                stream = out.add_stream("libx264", rate=_rate(info), options=options)
                stream.width, stream.height, stream.pix_fmt = info.width, info.height, pix_fmt
                stream.time_base = stream.codec_context.time_base = base
                context = stream.codec_context
                context.color_range = frame.color_range
                context.colorspace = frame.colorspace
                context.color_primaries = frame.color_primaries
                context.color_trc = frame.color_trc
            if frame.format.name != pix_fmt:
                frame = frame.reformat(format=pix_fmt)
            frame.pict_type = av.video.frame.PictureType.NONE
            frame.time_base, frame.pts = base, round(times[index] / base)
            out.mux(stream.encode(frame))
        assert stream is not None  # all_frames raises if there is none
        packets = stream.encode(None)
        if packets and last == info.frames - 1 > 0:
            packets[-1].duration = round((info.duration - info.pts[-1]) / base)
        out.mux(packets)
    return buffer.getvalue()


def _rate(info: VideoInfo) -> Fraction:
    return Fraction(min(max(info.fps, 1.0), 1000.0)).limit_denominator(1001)


def _exact_base(data: bytes, times: np.ndarray) -> Fraction:
    """The stream's time base if it can express the times, else microseconds."""
    with opened(data) as container:
        base = time_base(video_stream(container))
    exact = np.allclose(np.round(times / float(base)) * float(base), times, rtol=0, atol=1e-7)
    return base if exact and base.denominator < 1 << 31 else Fraction(1, 1_000_000)


def _difference(data: bytes, info: VideoInfo, first: int, last: int, new: bytes, found: VideoInfo, at: int) -> float:
    """The largest mean squared error of a frame, in RGB at half size (the colour of a 2 x 2 block
    is all that 4:2:0 keeps); 0.0 only if the frames are equal."""
    worst = 0.0
    for a, b in zip(
        _upright_rgb(data, info, first, last), _upright_rgb(new, found, at, at + last - first), strict=True
    ):
        if a.shape != b.shape:
            raise SampleError("cannot be repaired: the shape of pixels or the orientation is lost")
        if not np.array_equal(a, b):
            worst = max(worst, float(np.square(_halved(a) - _halved(b)).mean()), 1e-9)
    return worst


def _upright_rgb(data: bytes, info: VideoInfo, first: int, last: int) -> Iterator[np.ndarray]:
    for _, frame in all_frames(data, info, first, last):
        yield upright(frame, info)


def _halved(rgb: np.ndarray) -> np.ndarray:
    height, width = max(rgb.shape[0] // 2, 1) * 2, max(rgb.shape[1] // 2, 1) * 2
    a = rgb[:height, :width].astype(np.float32)
    if a.shape[0] < 2 or a.shape[1] < 2:
        return a
    return (a[::2, ::2] + a[1::2, ::2] + a[::2, 1::2] + a[1::2, 1::2]) / 4
