"""Decoding of chosen frames, by PyAV or, where the probe allows it, by decord."""

import io
import os
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np

from vlmds.errors import SampleError
from vlmds.video.container import Source, is_sealed, opened, reading, video_stream
from vlmds.video.frame_table import FrameTable
from vlmds.video.sampling import pick


def decode_frames(
    source: Source, info: FrameTable, num_frames: int, start: float | None = None, end: float | None = None
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


def _decode_pyav(source: Source, info: FrameTable, wanted: list[int], seek: bool = True) -> dict[int, np.ndarray]:
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
            io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source), num_threads=1
        )
        frames = reader.get_batch([int(i) for i in indices]).asnumpy()
        count = len(reader)
    except (decord.DECORDError, RuntimeError, OSError, IndexError) as error:
        raise SampleError("cannot be decoded: decord failed") from error  # its text is an address
    if count != info.frames or frames.shape[1:] != (info.height, info.width, 3):
        raise SampleError(f"cannot be decoded: decord sees {count} frames, not {info.frames}")
    return frames
