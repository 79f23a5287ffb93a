"""The probe: what a video's packets say of it, and whether decord may read it.

Two decoders give the same frames: PyAV reads everything; decord only what `probe` clears for it,
because it returns other frames, without an error, for edit lists, rotation, 10-bit, interlaced
video, open GOPs and intra refresh.
"""

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np

from vlmds.errors import SampleError
from vlmds.video.container import Source, is_mp4, opened, reading, video_stream
from vlmds.video.frame_table import FrameTable

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
    gap = Fraction(length, len(ticks) - 1) * base if len(ticks) > 1 else packets[0].duration * packet_base or 1 / rate
    duration = float(length * base + gap)

    closed = by_pts and only_idr and not hidden and name in _SEEKABLE and _closed_gops(packets)
    keys = [p.time for p in packets if p.key] if closed else []
    # Counterclockwise in FFmpeg's matrix, hence the sign.
    rotation = round(-first.rotation / 90) * 90 % 360
    width, height = first.width, first.height
    if rotation in (90, 270):
        width, height = height, width
    cleared = (
        closed
        and videos == 1
        and rotation == 0
        and not first.interlaced_frame
        and codec in _DECORD_CODECS
        and first.format.name in _DECORD_PIX_FMTS
    )
    return VideoInfo(
        width=width,
        height=height,
        rotation=rotation,
        duration=duration,
        decoder="decord" if cleared else "pyav",
        time_base=base,
        ticks=ticks,
        by_pts=by_pts,
        keys=np.searchsorted(ticks, np.array(keys, np.int64)),
        codec=codec,
        pix_fmt=first.format.name,
        fps=len(ticks) / duration,
        discarded=hidden,
        preroll=preroll,
        container=name,
    )


def _read_packets(container, stream, hasty: bool) -> tuple[list[_Packet], bool, av.VideoFrame | None]:
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
        packets.append(_Packet(packet.pts, packet.duration or 0, packet.is_keyframe, packet.is_discard))
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
        position += width + int.from_bytes(packet[position : position + width], "big")
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
