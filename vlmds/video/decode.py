"""Probe a video, choose frames by display time, decode and resize them.

Two decoders give the same frames: PyAV reads everything; decord only what `probe` clears for it,
because it returns other frames, without an error, for edit lists, rotation, 10-bit, interlaced
video, open GOPs and intra refresh.
"""

import io
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

from vlmds.errors import SampleError
from vlmds.video.container import Source, is_mp4, is_sealed, opened, reading, video_stream
from vlmds.video.frame_table import FrameTable

SAMPLER = "centre-of-equal-spans"
RESIZER = "pil-bicubic-shortest-edge-centre-crop"

# Codecs of which a packet is a displayed frame, so that packets tell the display times. Elsewhere
# (VP8 has hidden frames; AVI has no B-frame times) only decoding does.
_PACKET_IS_FRAME = {"h264", "hevc", "vp9", "av1", "mpeg4"}
_SEEKABLE = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
_DECORD_CODECS = {"h264", "hevc", "vp9"}
_DECORD_PIX_FMTS = {"yuv420p", "yuvj420p"}


@dataclass(frozen=True, eq=False)
class VideoInfo(FrameTable):
    """What `probe` found.

    fps: frames / duration. discarded: packets that an edit list hides. preroll: packets that refer
    to what is before the file's first keyframe. decoder: "decord" if it may be used.
    """

    codec: str
    pix_fmt: str
    fps: float
    discarded: int
    preroll: int
    container: str


class _Packet(NamedTuple):
    time: int | None  # display time as the file has it, ticks
    duration: int
    key: bool
    hidden: bool  # an edit list discards it


def probe(source: Source) -> VideoInfo:
    """Read every packet of the video and decode its first frame (milliseconds, for most files).

    source: a path, or the file's bytes. Raises SampleError.
    """
    return _probe(source, is_mp4(source)) or _probe(source, hasty=False)


def _probe(source: Source, hasty: bool) -> VideoInfo | None:
    """hasty: open by the headers, and ask for the first frame as soon as the first packet is in; None
    if there is none."""
    with reading("cannot be read"), opened(source, headers_only=hasty) as container:
        stream = video_stream(container)
        name = container.format.name
        videos = len(container.streams.video)
        rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
        base = packet_base = Fraction(stream.time_base)
        codec = stream.codec_context.codec.canonical_name
        packets, only_idr, first = _read_packets(container, stream, hasty)
        if first is None:
            if hasty:
                return None
            raise SampleError("no frames")

    hidden = sum(p.hidden for p in packets)
    ticks, preroll = _packet_ticks(packets)
    by_pts = codec in _PACKET_IS_FRAME and name != "avi" and ticks is not None
    by_pts = by_pts and bool(ticks[0] == first.pts)
    if not by_pts:
        ticks, base = _decoded_ticks(source, rate)
    length = int(ticks[-1] - ticks[0])
    # The last frame is taken to last as long as the mean one: what files say of it is unreliable.
    gap = (Fraction(length, len(ticks) - 1) * base if len(ticks) > 1
           else packets[0].duration * packet_base or 1 / rate)
    duration = float(length * base + gap)

    closed = by_pts and only_idr and not hidden and name in _SEEKABLE and _closed_gops(packets)
    keys = [p.time for p in packets if p.key] if closed else []
    # Counterclockwise in FFmpeg's matrix, hence the sign.
    rotation = round(-first.rotation / 90) * 90 % 360
    width, height = first.width, first.height
    if rotation in (90, 270):
        width, height = height, width
    cleared = (
        closed and videos == 1 and rotation == 0 and not first.interlaced_frame
        and codec in _DECORD_CODECS and first.format.name in _DECORD_PIX_FMTS
    )
    return VideoInfo(
        width=width, height=height, rotation=rotation, duration=duration,
        decoder="decord" if cleared else "pyav", time_base=base, ticks=ticks, by_pts=by_pts,
        keys=np.searchsorted(ticks, np.array(keys, np.int64)), codec=codec,
        pix_fmt=first.format.name, fps=len(ticks) / duration, discarded=hidden, preroll=preroll,
        container=name)


def sample_times(num_frames: int, start: float, end: float) -> np.ndarray:
    """Centres of `num_frames` equal spans of [start, end] (seconds): float64 [num_frames]."""
    return start + (np.arange(num_frames) + 0.5) * (end - start) / num_frames


def pick_frames(pts: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Index of the frame on display at each time: int64 [len(times)].

    The last frame with pts <= time (+ 1 µs), or the first frame if there is none.
    """
    return np.maximum(np.searchsorted(pts, times + 1e-6, side="right") - 1, 0).astype(np.int64)


def pick(
    info: FrameTable, num_frames: int, start: float | None = None, end: float | None = None
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
    info: FrameTable,
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
    with reading("cannot be decoded"):
        found = _decode_pyav(source, info, wanted)
        if len(info.keyframes) and len(found) < len(wanted):  # a seek went too far
            found = _decode_pyav(source, info, wanted, seek=False)
    for i in wanted:
        if i not in found:
            raise SampleError(f"cannot be decoded: no frame at {info.pts[i]:.3f} s")
    frames = np.stack([found[int(i)] for i in indices])
    return np.ascontiguousarray(np.rot90(frames, -info.rotation // 90, axes=(1, 2)))


def all_frames(
    source: Source, info: FrameTable, first: int = 0, last: int | None = None
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frames first … last (default: all) with their indices, by decoding from the beginning.

    They are as the file stores them, not rotated. Raises SampleError if one is missing.
    """
    last = info.frames - 1 if last is None else last
    expected, position = first, -1
    with reading("cannot be decoded"), opened(source) as container:
        stream = video_stream(container)
        for frame in container.decode(stream):
            position = _index(info, frame, stream.time_base) if info.by_pts else position + 1
            if position == expected:
                yield position, frame
                expected += 1
            if expected > last:
                return
    raise SampleError(f"cannot be decoded: no frame at {info.pts[expected]:.3f} s")


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


def _read_packets(
    container, stream, hasty: bool
) -> tuple[list[_Packet], bool, av.VideoFrame | None]:
    """All packets, in decoding order, whether every keyframe resets the decoder (IDR), and the
    first frame; nothing if, `hasty`, the first packet alone does not give it."""
    codec = stream.codec_context.codec.canonical_name
    extradata = bytes(stream.codec_context.extradata or b"")
    packets, only_idr, first = [], True, None
    for packet in container.demux(stream):
        if first is None:
            with reading("cannot be decoded"):
                frames = packet.decode()
                if hasty and not frames and packet.size:
                    frames = stream.codec_context.decode(None)  # as if nothing came after it
                first = next(iter(frames), None)
            if hasty and first is None:
                return [], False, None
        if not packet.size:
            continue
        if packet.is_keyframe and only_idr:
            only_idr = _is_idr(bytes(packet), codec, extradata)
        packets.append(_Packet(
            packet.pts, packet.duration or 0, packet.is_keyframe, packet.is_discard))
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


def _packet_ticks(packets: list[_Packet]) -> tuple[np.ndarray | None, int]:
    """Sorted display times of the frames to come out, None if the packets do not tell; and the
    number of those that cannot be shown, for they refer to what is before the first keyframe."""
    if any(p.time is None for p in packets) or not any(p.key for p in packets):
        return None, 0
    first_key = next(i for i, p in enumerate(packets) if p.key)
    begin = packets[first_key].time  # what is shown before it refers to frames we do not have
    times = [p.time for p in packets[first_key:] if not p.hidden and p.time >= begin]
    preroll = sum(i < first_key or p.time < begin for i, p in enumerate(packets))
    if not times or max(Counter(times).values()) > 1:
        return None, preroll
    return np.sort(np.array(times, np.int64)), preroll


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


def _decoded_ticks(source: Source, rate: Fraction) -> tuple[np.ndarray, Fraction]:
    """Display times found by decoding everything, sorted int64 [frames], and their unit."""
    with reading("cannot be decoded"), opened(source) as container:
        stream = video_stream(container)
        base = Fraction(stream.time_base)
        ticks = [frame.pts for frame in container.decode(stream)]
    if None in ticks or len(set(ticks)) < len(ticks):  # a raw stream: only the rate is known
        return np.arange(len(ticks)), 1 / rate
    return np.sort(np.array(ticks, np.int64)), base


def _decode_pyav(
    source: Source, info: FrameTable, wanted: list[int], seek: bool = True
) -> dict[int, np.ndarray]:
    """Decode the frames `wanted` (sorted indices) and return those found: uint8 [H, W, 3]."""
    found = {}
    with opened(source) as container:
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
                found[target] = frame.to_ndarray(format="rgb24")
    return found


def _index(info: FrameTable, frame: av.VideoFrame, time_base: Fraction) -> int:
    """Which frame of `info.pts` this is; -1 if none."""
    if frame.pts is None:
        return -1
    time = frame.pts * time_base.numerator / time_base.denominator - info.start_time
    index = int(np.searchsorted(info.pts, time - 1e-6))
    return index if index < len(info.pts) and info.pts[index] <= time + 1e-6 else -1


def decode_decord(source: Source, info: FrameTable, indices: np.ndarray) -> np.ndarray:
    """The frames `indices`, by decord alone: uint8 [F, height, width, 3]. Raises SampleError."""
    try:
        import decord
    except (ImportError, OSError) as error:  # there is none for this machine, or not its libraries
        raise SampleError("cannot be decoded: decord is not installed") from error
    if not is_sealed(source):  # decord would go where it points
        raise SampleError("cannot be decoded: decord is for MP4 and Matroska files alone")
    decord.logging.set_level(decord.logging.QUIET)  # what matters becomes a reason
    try:
        reader = decord.VideoReader(
            io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source), num_threads=1)
        frames = reader.get_batch([int(i) for i in indices]).asnumpy()
        count = len(reader)
    except (decord.DECORDError, RuntimeError, OSError, IndexError) as error:
        raise SampleError("cannot be decoded: decord failed") from error  # its text is an address
    if count != info.frames or frames.shape[1:] != (info.height, info.width, 3):
        raise SampleError(f"cannot be decoded: decord sees {count} frames, not {info.frames}")
    return frames
