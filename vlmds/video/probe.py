"""The probe: what a video's packets say of it, and whether decord may read it.

Two decoders give the same frames: PyAV reads everything; decord only what `probe` clears. Elsewhere
decord returns other frames without an error: edit lists, rotation, mirrors, pixels that are not square,
10-bit, interlaced video, open GOPs and intra refresh.
"""

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np

from vlmds.errors import SampleError
from vlmds.video.container import Source, is_mp4, opened, reading, time_base, video_stream
from vlmds.video.frame_table import FrameTable
from vlmds.video.upright import display_size, orientation

# Codecs of which a packet is a displayed frame, so that packets state the display times. With others
# (VP8 has hidden frames; AVI has no B-frame times) only decoding shows them.
_PACKET_IS_FRAME = {"h264", "hevc", "vp9", "av1", "mpeg4"}
_SEEKABLE = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
_STATES_DURATIONS = _SEEKABLE | {"gif", "apng"}  # of packets; elsewhere FFmpeg derives them from the rate
_DECORD_CODECS = {"h264", "hevc", "vp9"}
_DECORD_PIX_FMTS = {"yuv420p", "yuvj420p"}


@dataclass(frozen=True, eq=False)
class VideoInfo(FrameTable):
    """What `probe` found.

    fps: frames / duration. discarded: packets that an edit list hides. preroll: packets that refer
    to what is before the file's first keyframe. container: FFmpeg's name of the format.
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
    info = _probe(source, is_mp4(source)) or _probe(source, hasty=False)
    if info is None:
        raise SampleError("no frames")
    return info


def _probe(source: Source, hasty: bool) -> VideoInfo | None:
    """hasty: open by the headers, and decode the first frame from the first packet. None if there is
    no frame, or if that does not give it."""
    with reading("cannot be read"), opened(source, headers_only=hasty) as container:
        stream = video_stream(container)
        name = container.format.name
        videos = len(container.streams.video)
        rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
        base = packet_base = time_base(stream)
        codec = stream.codec_context.codec.canonical_name
        packets, plain, first = _read_packets(container, stream, hasty)
        if first is None:
            return None
        # Read last: the file's header may not say them, but the first frame does.
        aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
        end = _stated_end(container, stream)

    hidden = sum(p.hidden for p in packets)
    ticks, preroll = _packet_ticks(packets)
    by_pts = codec in _PACKET_IS_FRAME and name != "avi" and ticks is not None and bool(ticks[0] == first.pts)
    if not by_pts or ticks is None:
        ticks, base = _decoded_ticks(source, rate)
    gap = packets[0].duration * packet_base or 1 / rate
    if len(ticks) > 1:
        gap = Fraction(int(ticks[-1] - ticks[0]), len(ticks) - 1) * base
        if name in _STATES_DURATIONS and base == packet_base:
            gap = _last_gap(packets, int(ticks[-1]), base, gap, end)
    duration = float(int(ticks[-1] - ticks[0]) * base + gap)

    closed = by_pts and plain and not hidden and name in _SEEKABLE and _closed_gops(packets)
    keys = [p.time for p in packets if p.key and p.time is not None] if closed else []
    rotation, mirrored = orientation(first)
    width, height = display_size(first, aspect, rotation)
    cleared = (
        closed
        and videos == 1
        and (width, height, rotation, mirrored) == (first.width, first.height, 0, False)
        and not first.interlaced_frame
        and codec in _DECORD_CODECS
        and first.format.name in _DECORD_PIX_FMTS
    )
    return VideoInfo(
        width=width,
        height=height,
        rotation=rotation,
        mirrored=mirrored,
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


def _stated_end(container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> Fraction | None:
    """When the video ends, as the container states it, seconds."""
    if stream.duration:
        return ((stream.start_time or 0) + stream.duration) * time_base(stream)
    # Matroska's duration begins at time 0, not at the first frame.
    return Fraction(container.duration, av.time_base) if container.duration else None


def _last_gap(packets: list[_Packet], last: int, base: Fraction, mean: Fraction, end: Fraction | None) -> Fraction:
    """Seconds for which the last frame (at tick `last`) is shown: as long as the mean frame, or as its
    packet says if that differs by more than half and the container agrees to within a frame.

    mean: seconds between frames. end: see `_stated_end`; None: not stated.
    """
    said = next((p.duration * base for p in packets if p.time == last and not p.hidden), Fraction(0))
    agreed = end is None or abs(last * base + said - end) < mean
    return said if said and agreed and abs(said - mean) > mean / 2 else mean


def _read_packets(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, hasty: bool
) -> tuple[list[_Packet], bool, av.VideoFrame | None]:
    """All packets, in decoding order, whether decord may start at every keyframe, and the first frame;
    nothing if `hasty` and the first packet alone does not give it."""
    codec = stream.codec_context.codec.canonical_name
    extradata = bytes(stream.codec_context.extradata or b"")
    packets, plain, sizes = [], True, set()
    first: av.VideoFrame | None = None
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
        if codec == "vp9" and plain:
            sizes.add(_vp9_size(bytes(packet)[:9].ljust(9, b"\0")))
            plain = len(sizes - {None}) < 2
        elif packet.is_keyframe and plain:
            plain = _is_idr(bytes(packet), codec, extradata)
        packets.append(_Packet(packet.pts, packet.duration or 0, packet.is_keyframe, packet.is_discard))
    return packets, plain, first


def _is_idr(packet: bytes, codec: str, extradata: bytes) -> bool:
    """Whether a keyframe packet of an MP4 or Matroska file refers to no earlier one, and has the
    parameters (the size, for one) that the file's header states.

    H.264 and H.265 mark recovery points and open GOPs as keyframes too; only the types of the
    NAL units, each behind a big-endian length, show the difference.
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
        kind = header & 0x1F if codec == "h264" else header >> 1 & 0x3F
        end = position + width + int.from_bytes(packet[position : position + width], "big")
        if kind == (7 if codec == "h264" else 33) and packet[position + width : end] not in extradata:
            return False  # a parameter set of its own
        if kind in ((5,) if codec == "h264" else (19, 20)):
            return True
        position = end
    return False


def _vp9_size(beginning: bytes) -> bytes | None:
    """The bits that state the size of a VP9 frame of profile 0; None if it is an earlier frame's.

    beginning: 9 bytes or more of the packet.
    """
    first, bits = beginning[0], f"{int.from_bytes(beginning[1:5]):032b}"
    existing, inter, shown, resilient = (first >> shift & 1 for shift in (3, 2, 1, 0))
    if existing:
        return None
    if not inter:
        return beginning[1:8] + bytes([beginning[8] & 0xF0])
    intra_only = not shown and bits[0] == "1"
    sizes = (not shown) + (0 if resilient else 2) + 8 + 12  # here three bits name a frame of the same size
    return b"its own" if intra_only or "1" not in bits[sizes : sizes + 3] else None


def _packet_ticks(packets: list[_Packet]) -> tuple[np.ndarray | None, int]:
    """Sorted display times of the frames to be shown, None if the packets do not state them; and the
    number of packets that cannot be shown, as they refer to what is before the first keyframe."""
    stated = [(p.time, p.key, p.hidden) for p in packets if p.time is not None]
    first_key = next((i for i, p in enumerate(packets) if p.key), None)
    if len(stated) < len(packets) or first_key is None:
        return None, 0
    begin = stated[first_key][0]  # what is shown before it refers to frames that are not in the file
    times = [time for time, _, hidden in stated[first_key:] if not hidden and time >= begin]
    preroll = sum(i < first_key or time < begin for i, (time, _, _) in enumerate(stated))
    if not times or max(Counter(times).values()) > 1:
        return None, preroll
    return np.sort(np.array(times, np.int64)), preroll


def _closed_gops(packets: list[_Packet]) -> bool:
    """Whether the first packet is a keyframe and all frames after a keyframe are shown after all
    frames before it. All packets have a time."""
    latest, key = -np.inf, np.inf
    for i, packet in enumerate(packets):
        assert packet.time is not None
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
        base = time_base(stream)
        decoded = [frame.pts for frame in container.decode(stream)]
    ticks = [tick for tick in decoded if tick is not None]
    if len(set(ticks)) < len(decoded):  # a raw stream, or several in one: only the rate is known
        return np.arange(len(decoded)), 1 / rate
    return np.sort(np.array(ticks, np.int64)), base
