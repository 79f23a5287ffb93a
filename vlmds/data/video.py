"""Probe a video, choose frames by display time, decode and resize them.

Two decoders give the same frames: PyAV reads everything; decord only what `probe` clears for it,
because it returns other frames, without an error, for edit lists, rotation, 10-bit, interlaced
video, open GOPs and intra refresh.
"""

import io
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.stream import Disposition
from PIL import Image

from vlmds.errors import SampleError

SAMPLER = "centre-of-equal-spans"
RESIZER = "pil-bicubic-shortest-edge-centre-crop"

# The largest frame decoded: 8K video is 35 million pixels, a 360° one 67. A few bytes can declare
# any size, and each pixel of it costs memory and time.
MAX_PIXELS = 8192 * 8192

Source = str | os.PathLike | bytes

# Codecs of which a packet is a displayed frame, so that packets tell the display times. Elsewhere
# (VP8 has hidden frames; AVI has no B-frame times) only decoding does.
_PACKET_IS_FRAME = {"h264", "hevc", "vp9", "av1", "mpeg4"}
_SEEKABLE = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
_DECORD_CODECS = {"h264", "hevc", "vp9"}
_DECORD_PIX_FMTS = {"yuv420p", "yuvj420p"}


@dataclass(frozen=True, eq=False)
class VideoInfo:
    """What `probe` found.

    width, height: as displayed, after rotation. rotation: degrees clockwise to apply for display
    (0, 90, 180, 270). fps: frames / duration. frames: displayable ones. discarded: packets that
    an edit list hides. preroll: packets whose frames cannot be shown, for they come before the
    first keyframe. decoder: "decord" or "pyav".
    pts: float64 [frames], sorted display times in seconds from the first displayed frame, which
    the file places at `start_time`.
    by_pts: a decoded frame's time is found in pts; otherwise the k-th decoded frame has pts[k].
    keyframes: float64 [K], times at which decoding may start; empty if only from the beginning.
    """

    codec: str
    pix_fmt: str
    width: int
    height: int
    rotation: int
    fps: float
    frames: int
    duration: float
    discarded: int
    preroll: int
    container: str
    decoder: str
    pts: np.ndarray
    start_time: float
    by_pts: bool
    keyframes: np.ndarray


@dataclass(frozen=True)
class _Packet:
    time: float | None  # display time as the file has it, seconds
    duration: float
    key: bool
    hidden: bool  # an edit list discards it


def probe(source: Source) -> VideoInfo:
    """Read every packet of the video once and decode its first frame.

    source: a path, or the file's bytes. Takes milliseconds for most files; where packets do not
    tell the display times, decodes all of it. Raises SampleError.
    """
    try:
        return _probe(source)
    except SampleError:
        _refuse_large(source)  # of the limit FFmpeg says no more than "invalid"
        raise


def _probe(source: Source) -> VideoInfo:
    with _reading("cannot be read"), open_video(source) as container:
        stream = video_stream(container)
        name = container.format.name
        codec = stream.codec_context.codec.canonical_name
        videos = len(container.streams.video)
        rate = float(stream.average_rate or stream.guessed_rate or 0) or 25.0
        packets, only_idr, first = _read_packets(container, stream)
        if first is None:
            raise SampleError("no frames")
        first_time = _seconds(first.pts, stream.time_base)

    hidden = sum(p.hidden for p in packets)
    times = _packet_times(packets)
    by_pts = codec in _PACKET_IS_FRAME and name != "avi" and times is not None
    by_pts = by_pts and times[0] == first_time
    if not by_pts:
        times = _decoded_times(source, rate)
    pts = times - times[0]
    # The last frame is taken to last as long as the mean one: what files say of it is unreliable.
    gap = pts[-1] / (len(pts) - 1) if len(pts) > 1 else packets[0].duration or 1.0 / rate
    duration = float(pts[-1] + gap)

    closed = by_pts and only_idr and not hidden and name in _SEEKABLE and _closed_gops(packets)
    keyframes = [p.time for p in packets if p.key] if closed else []
    # Counterclockwise in FFmpeg's matrix, hence the sign.
    rotation = round(-first.rotation / 90) * 90 % 360
    width, height = first.width, first.height
    if rotation in (90, 270):
        width, height = height, width
    cleared = (
        closed and videos == 1 and rotation == 0 and not first.interlaced_frame
        and first.width % 2 == first.height % 2 == 0  # decord errs at the edge of an odd picture
        and codec in _DECORD_CODECS and first.format.name in _DECORD_PIX_FMTS
    )
    return VideoInfo(
        codec=codec, pix_fmt=first.format.name, width=width, height=height, rotation=rotation,
        fps=len(pts) / duration, frames=len(pts), duration=duration, discarded=hidden,
        preroll=_preroll(packets), container=name, decoder="decord" if cleared else "pyav", pts=pts,
        start_time=float(times[0]), by_pts=by_pts, keyframes=np.array(keyframes) - times[0],
    )


def sample_times(num_frames: int, start: float, end: float) -> np.ndarray:
    """Centres of `num_frames` equal spans of [start, end] (seconds): float64 [num_frames]."""
    return start + (np.arange(num_frames) + 0.5) * (end - start) / num_frames


def pick_frames(pts: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Index of the frame on display at each time: int64 [len(times)].

    The last frame with pts <= time (+ 1 µs), or the first frame if there is none.
    """
    return np.maximum(np.searchsorted(pts, times + 1e-6, side="right") - 1, 0).astype(np.int64)


def pick(
    info: VideoInfo, num_frames: int, start: float | None = None, end: float | None = None
) -> np.ndarray:
    """Indices of the frames that stand for [start, end] (default: the video): int64 [F].

    An end past the video's is the video's end. Raises SampleError if start is past it.
    """
    start = 0.0 if start is None else start
    end = info.duration if end is None else min(end, info.duration)
    if start >= end:
        raise SampleError(f"start past the end: {start:g} s of {info.duration:g} s")
    return pick_frames(info.pts, sample_times(num_frames, start, end))


def decode_frames(
    source: Source,
    info: VideoInfo,
    num_frames: int,
    start: float | None = None,
    end: float | None = None,
) -> np.ndarray:
    """Decode the frames that `pick` names: uint8 [num_frames, height, width, 3], RGB, upright.

    Uses `info.decoder`; PyAV also where decord fails, as it does on some widths. Raises SampleError
    if one of them cannot be decoded.
    """
    indices = pick(info, num_frames, start, end)
    if info.decoder == "decord":
        try:
            return decode_decord(source, info, indices)
        except SampleError:
            pass
    wanted = [int(i) for i in np.unique(indices)]
    with _reading("cannot be decoded"):
        found = _decode_pyav(source, info, wanted)
        if len(info.keyframes) and len(found) < len(wanted):  # a seek went too far
            found = _decode_pyav(source, info, wanted, seek=False)
    for i in wanted:
        if i not in found:
            raise SampleError(f"cannot be decoded: no frame at {info.pts[i]:.3f} s")
    frames = np.stack([found[int(i)] for i in indices])
    return np.ascontiguousarray(np.rot90(frames, -info.rotation // 90, axes=(1, 2)))


def resize_frames(frames: np.ndarray, size: int) -> np.ndarray:
    """Shortest edge to `size` (PIL bicubic), then the centre size × size.

    frames: uint8 [F, H, W, 3]. Returns uint8 [F, 3, size, size], exactly what transformers'
    CLIPImageProcessorPil gives before it rescales and normalises.
    """
    height, width = frames.shape[1:3]
    long = int(size * max(height, width) / min(height, width))
    new_width, new_height = (size, long) if width <= height else (long, size)
    left, top = (new_width - size) // 2, (new_height - size) // 2
    out = np.empty((len(frames), 3, size, size), np.uint8)
    for i, frame in enumerate(frames):
        image = Image.fromarray(frame).resize((new_width, new_height), Image.Resampling.BICUBIC)
        out[i] = np.asarray(image)[top:top + size, left:left + size].transpose(2, 0, 1)
    return out


def _refuse_large(source: Source) -> None:
    """Raises SampleError if the video declares frames over the limit. Decodes nothing."""
    try:
        with av.open(_file(source), options={"skip_frame": "all"}) as container:
            stream = container.streams.best("video")
            width, height = (stream.width, stream.height) if stream else (0, 0)
    except (av.FFmpegError, OSError, UnicodeDecodeError):
        return
    if width * height > MAX_PIXELS:
        raise SampleError(
            f"frames too large: {width} × {height} is over the limit of {MAX_PIXELS:,} pixels")


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turns FFmpeg's and the system's errors into a SampleError without the file's path."""
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        raise SampleError(f"{what}: {error.strerror}") from error


def open_video(source: Source) -> av.container.InputContainer:
    """Raises av.FFmpegError or OSError."""
    # Opening may decode a frame too. Titles in old code pages must not cost us the video.
    return av.open(_file(source), options={"max_pixels": str(MAX_PIXELS)}, metadata_errors="ignore")


def _file(source: Source) -> io.BytesIO | str:
    return io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)


def video_stream(container: av.container.InputContainer) -> av.video.stream.VideoStream:
    """The stream that is meant to be seen, set to report damage. Raises SampleError."""
    stream = container.streams.best("video")
    if stream is None or stream.disposition & Disposition.attached_pic:
        raise SampleError("no video stream")
    stream.thread_type = "NONE"
    # An error for damage, not a guess.
    stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}
    return stream


def _seconds(pts: int | None, time_base: Fraction) -> float | None:
    return None if pts is None else pts * time_base.numerator / time_base.denominator


def _read_packets(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream
) -> tuple[list[_Packet], bool, av.VideoFrame | None]:
    """All packets, in decoding order; whether every keyframe resets the decoder (IDR); the first
    frame."""
    codec = stream.codec_context.codec.canonical_name
    extradata = bytes(stream.codec_context.extradata or b"")
    packets, only_idr, first = [], True, None
    for packet in container.demux(stream):
        if first is None:
            with _reading("cannot be decoded"):
                first = next(iter(packet.decode()), None)
        if not packet.size:
            continue
        if packet.is_keyframe and only_idr:
            only_idr = _is_idr(bytes(packet), codec, extradata)
        packets.append(_Packet(
            _seconds(packet.pts, stream.time_base),
            _seconds(packet.duration or 0, stream.time_base),
            packet.is_keyframe, packet.is_discard))
    return packets, only_idr, first


def _is_idr(packet: bytes, codec: str, extradata: bytes) -> bool:
    """Whether a keyframe packet of an MP4 or Matroska file starts from nothing.

    H.264 and H.265 mark recovery points and open GOPs as keyframes too; only the type of the
    NAL units, each behind a big-endian length, tells.
    """
    if codec not in ("h264", "hevc"):
        return True
    at = 4 if codec == "h264" else 21
    if len(extradata) <= at or extradata[0] != 1:  # not the MP4 form
        return False
    width = (extradata[at] & 3) + 1
    position = 0
    while position + width < len(packet):
        header = packet[position + width]
        if codec == "h264" and header & 0x1F == 5:
            return True
        if codec == "hevc" and header >> 1 & 0x3F in (19, 20):
            return True
        position += width + int.from_bytes(packet[position:position + width], "big")
    return False


def _packet_times(packets: list[_Packet]) -> np.ndarray | None:
    """Sorted display times of the frames to come out; None if the packets do not tell."""
    if any(p.time is None for p in packets) or not any(p.key for p in packets):
        return None
    first_key = next(i for i, p in enumerate(packets) if p.key)
    begin = packets[first_key].time  # what is shown before it refers to frames we do not have
    times = [p.time for p in packets[first_key:] if not p.hidden and p.time >= begin]
    if not times or max(Counter(times).values()) > 1:
        return None
    return np.sort(np.array(times, np.float64))


def _preroll(packets: list[_Packet]) -> int:
    """Packets that come, or would be shown, before the first keyframe."""
    first_key = next((i for i, p in enumerate(packets) if p.key), len(packets))
    later = packets[first_key:]
    begin = later[0].time if later else None
    early = [p for p in later if None not in (p.time, begin) and p.time < begin]
    return first_key + sum(not p.hidden for p in early)


def _closed_gops(packets: list[_Packet]) -> bool:
    """Whether the first packet is a keyframe and each keyframe parts the frames in two."""
    latest, key = -np.inf, np.inf
    for i, packet in enumerate(packets):
        if packet.key:
            if packet.time < latest:
                return False
            key = packet.time
        elif i == 0 or packet.time < key:
            return False
        latest = max(latest, packet.time)
    return True


def _decoded_times(source: Source, rate: float) -> np.ndarray:
    """Display times found by decoding everything: sorted float64 [frames]."""
    with _reading("cannot be decoded"), open_video(source) as container:
        stream = video_stream(container)
        times = [_seconds(frame.pts, stream.time_base) for frame in container.decode(stream)]
    if None in times or len(set(times)) < len(times):  # a raw stream: only the rate is known
        return np.arange(len(times)) / rate
    return np.sort(np.array(times, np.float64))


def _decode_pyav(
    source: Source, info: VideoInfo, wanted: list[int], seek: bool = True
) -> dict[int, np.ndarray]:
    """Decode the frames `wanted` (sorted indices) and return those found: uint8 [H, W, 3]."""
    found = {}
    with open_video(source) as container:
        stream = video_stream(container)
        frames = container.decode(stream)
        position = -1  # index of the last frame decoded
        for target in wanted:
            before = np.searchsorted(info.keyframes, info.pts[target], side="right") - 1
            if seek and before >= 0 and info.keyframes[before] > info.pts[max(position, 0)]:
                seconds = info.keyframes[before] + info.start_time
                container.seek(round(seconds / stream.time_base), stream=stream)
                frames = container.decode(stream)
            for frame in frames:
                position = _index(info, frame, stream.time_base) if info.by_pts else position + 1
                if position >= target:
                    break
            if position == target:
                found[target] = _rgb(frame, info)
    return found


def iterate(
    source: Source, info: VideoInfo, first: int, last: int
) -> Iterator[tuple[int, av.VideoFrame]]:
    """(index, frame) of the frames first … last, in order, as the file stores them.

    Raises SampleError for damage, or if one is missing.
    """
    expected = first
    with _reading("cannot be decoded"), open_video(source) as container:
        stream = video_stream(container)
        before = np.searchsorted(info.keyframes, info.pts[first], side="right") - 1
        if before > 0:
            seconds = info.keyframes[before] + info.start_time
            container.seek(round(seconds / stream.time_base), stream=stream)
        index = -1
        for frame in container.decode(stream):
            index = _index(info, frame, stream.time_base) if info.by_pts else index + 1
            if index == expected:
                yield index, frame
                expected += 1
            if index >= last:
                break
    if expected <= last:
        raise SampleError(f"cannot be decoded: no frame at {info.pts[expected]:.3f} s")


def _rgb(frame: av.VideoFrame, info: VideoInfo) -> np.ndarray:
    """uint8 [H, W, 3], as stored. Raises SampleError if its size is not the first frame's."""
    stored = (info.width, info.height) if info.rotation % 180 == 0 else (info.height, info.width)
    if (frame.width, frame.height) != stored:
        raise SampleError(f"cannot be decoded: its frame size changes at {frame.time or 0:.3f} s")
    return frame.to_ndarray(format="rgb24")


def _index(info: VideoInfo, frame: av.VideoFrame, time_base: Fraction) -> int:
    """Which frame of `info.pts` this is; -1 if none."""
    if frame.pts is None:
        return -1
    time = _seconds(frame.pts, time_base) - info.start_time
    index = int(np.searchsorted(info.pts, time - 1e-6))
    return index if index < len(info.pts) and info.pts[index] <= time + 1e-6 else -1


def decode_decord(source: Source, info: VideoInfo, indices: np.ndarray) -> np.ndarray:
    """The frames `indices`, by decord alone: uint8 [F, height, width, 3]. Raises SampleError."""
    import decord

    try:
        reader = decord.VideoReader(_file(source), num_threads=1)
        frames = reader.get_batch([int(i) for i in indices]).asnumpy()
        count = len(reader)
    except (decord.DECORDError, RuntimeError, OSError) as error:
        raise SampleError("cannot be decoded: decord failed") from error  # its text is an address
    if count != info.frames or frames.shape[1:] != (info.height, info.width, 3):
        raise SampleError(f"cannot be decoded: decord sees {count} frames, not {info.frames}")
    return frames
