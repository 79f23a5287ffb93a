"""Decoding of chosen frames, by PyAV or, where the probe allows it, by decord."""

import io
import os
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np

from vlmds.errors import SampleError
from vlmds.video.container import Source, is_sealed, opened, reading, time_base, video_stream
from vlmds.video.frame_table import FrameTable
from vlmds.video.sampling import pick
from vlmds.video.upright import upright


def decode_frames(
    source: Source, info: FrameTable, num_frames: int, start: float | None = None, end: float | None = None
) -> np.ndarray:
    """Decode the frames that `pick` chooses: uint8 [num_frames, height, width, 3], RGB, upright.

    Uses `info.decoder`, and PyAV where decord fails, as it does on some widths. Raises SampleError
    if a frame cannot be decoded.
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
    return np.stack([found[int(i)] for i in indices])


def all_frames(
    source: Source, info: FrameTable, first: int = 0, last: int | None = None
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frames first … last (default: all) with their indices, by decoding from the beginning.

    They are as the file stores them, not upright. Raises SampleError if one is missing.
    """
    last = info.frames - 1 if last is None else last
    expected, position = first, -1
    with reading("cannot be decoded"), opened(source) as container:
        stream = video_stream(container)
        base = time_base(stream)
        for frame in container.decode(stream):
            position = _index(info, frame, base) if info.by_pts else position + 1
            if position == expected:
                yield position, frame
                expected += 1
            if expected > last:
                return
    raise SampleError(f"cannot be decoded: no frame at {info.pts[expected]:.3f} s")


def _decode_pyav(source: Source, info: FrameTable, wanted: list[int], seek: bool = True) -> dict[int, np.ndarray]:
    """Decode the frames `wanted` (sorted indices) and return those found: uint8 [H, W, 3], upright."""
    found: dict[int, np.ndarray] = {}
    with opened(source) as container:
        stream = video_stream(container)
        base = time_base(stream)
        frames = container.decode(stream)
        position = -1  # index of the last frame decoded
        for target in wanted:
            before = np.searchsorted(info.keyframes, info.pts[target], side="right") - 1
            if seek and before >= 0 and info.keyframes[before] > info.pts[max(position, 0)]:
                seconds = info.keyframes[before] + info.start_time
                container.seek(round(seconds / base), stream=stream)
                frames = container.decode(stream)
            for frame in frames:
                position = _index(info, frame, base) if info.by_pts else position + 1
                if position >= target:
                    break
            if position == target:
                found[target] = upright(frame, info)
    return found


def _index(info: FrameTable, frame: av.VideoFrame, base: Fraction) -> int:
    """The frame's index in `info.pts`; -1 if it is not there."""
    if frame.pts is None:
        return -1
    time = frame.pts * base.numerator / base.denominator - info.start_time
    index = int(np.searchsorted(info.pts, time - 1e-6))
    return index if index < len(info.pts) and info.pts[index] <= time + 1e-6 else -1


def decode_decord(source: Source, info: FrameTable, indices: np.ndarray) -> np.ndarray:
    """The frames `indices`, by decord alone: uint8 [F, height, width, 3]. Raises SampleError."""
    try:
        import decord
    except (ImportError, OSError) as error:  # no wheel for this machine, or a library is missing
        raise SampleError("cannot be decoded: decord is not installed") from error
    if not is_sealed(source):  # decord would open what it names
        raise SampleError("cannot be decoded: decord is used for MP4 and Matroska files only")
    decord.logging.set_level(decord.logging.QUIET)  # errors become reasons
    try:
        reader = decord.VideoReader(
            io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source), num_threads=1
        )
        frames = reader.get_batch([int(i) for i in indices]).asnumpy()
        count = len(reader)
    except (decord.DECORDError, RuntimeError, OSError, IndexError) as error:
        raise SampleError("cannot be decoded: decord failed") from error  # its text has addresses of memory
    if count != info.frames or frames.shape[1:] != (info.height, info.width, 3):
        raise SampleError(f"cannot be decoded: decord sees {count} frames, not {info.frames}")
    return frames
