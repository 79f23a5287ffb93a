"""The upright picture: a decoded frame as a player shows it.

Three things stand between the two: the display matrix (phones turn, front cameras mirror), pixels that
are not square, and frames whose size changes in the middle of a video (calls, broadcasts).
"""

import struct
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import Type

from vlmds.errors import SampleError
from vlmds.video.frame_table import MAX_PIXELS, FrameTable

# A sample aspect ratio nearer to 1 comes from rounding (854 x 480 as 16:9 is 1280:1281); to scale by it
# would blur more than it corrects.
_SQUARE = Fraction(1, 100)
_UNKNOWN = range(len(list(Type)), 64)  # FFmpeg's numbers of the side data that PyAV does not know

_TURNS: dict[int, list[tuple[str, str | None]]] = {
    0: [],
    90: [("transpose", "clock")],
    180: [("hflip", None), ("vflip", None)],
    270: [("transpose", "cclock")],
}


def orientation(frame: av.VideoFrame) -> tuple[int, bool]:
    """Rotation (degrees clockwise: 0, 90, 180, 270) and whether the frame is turned upside down before
    it, by the frame's display matrix or EXIF orientation."""
    rotation = round(-frame.rotation / 90) * 90 % 360  # FFmpeg counts counterclockwise
    side_data: Any  # PyAV's stub has another type
    try:
        side_data = frame.side_data
    except ValueError:  # PyAV gives none of it where it does not know a type, such as EXIF
        side_data = _filtered(frame, [("sidedata", f"mode=delete:type={number}") for number in _UNKNOWN]).side_data
    matrix = next((bytes(each) for each in side_data if each.type == Type.DISPLAYMATRIX), None)
    if matrix is None:
        return rotation, False
    a, b, _, c, d = struct.unpack("=5i", matrix[:20])
    return rotation, a * d < b * c


def display_size(frame: av.VideoFrame, aspect: Fraction | None, rotation: int) -> tuple[int, int]:
    """Width and height of the upright picture.

    aspect: width of a pixel / its height; None: square. Raises SampleError: too large, or too narrow.
    """
    width, height = frame.width, frame.height
    if aspect and abs(aspect - 1) > _SQUARE:
        width = round(width * aspect)
        if not 0 < width * height <= MAX_PIXELS:
            raise SampleError(f"frame too large or narrow: {width} x {height} at a pixel aspect ratio of {aspect}")
    return (height, width) if rotation in (90, 270) else (width, height)


def upright(frame: av.VideoFrame, info: FrameTable) -> np.ndarray:
    """The frame as a player shows it: uint8 [info.height, info.width, 3], RGB.

    Scaled (bicubic) if its pixels are not square or its size is not the first frame's.
    """
    if (frame.width, frame.height) != info.stored_size:
        frame = _filtered(frame, [_scale(info), ("format", "rgb24")])
    rgb = frame.to_ndarray(format="rgb24")
    if info.mirrored:
        rgb = rgb[::-1]
    return np.ascontiguousarray(np.rot90(rgb, -info.rotation // 90))


def upright_frame(frame: av.VideoFrame, info: FrameTable) -> av.VideoFrame:
    """The same in the frame's own pixel format, for encoding."""
    filters = [_scale(info)] if (frame.width, frame.height) != info.stored_size else []
    if info.mirrored:
        filters.append(("vflip", None))
    filters += _TURNS[info.rotation]
    return _filtered(frame, filters) if filters else frame


def _scale(info: FrameTable) -> tuple[str, str | None]:
    width, height = info.stored_size
    return "scale", f"{width}:{height}:flags=bicubic"


def _filtered(frame: av.VideoFrame, filters: list[tuple[str, str | None]]) -> av.VideoFrame:
    graph = av.filter.Graph()
    graph.link_nodes(
        graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 1000)
        ),
        *(graph.add(name, options) for name, options in filters),
        graph.add("buffersink"),
    ).configure()
    graph.push(frame)
    turned = graph.pull()
    assert isinstance(turned, av.VideoFrame)
    return turned
