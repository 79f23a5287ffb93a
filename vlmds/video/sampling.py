"""The choice of frames: by display time, at the centres of equal spans."""

import numpy as np

from vlmds.errors import SampleError
from vlmds.video.frame_table import FrameTable

SAMPLER = "centre-of-equal-spans"


def is_still(frames: int) -> bool:
    """Whether a video of so many frames is a still picture, which models get as one frame."""
    return frames == 1


def kept_frames(frames: int, num_frames: int) -> int:
    """How many frames of a video of so many are stored, and shown to models: num_frames, or 1 of a still picture."""
    return 1 if is_still(frames) else num_frames


def clip_span(duration: float, start: float | None = None, end: float | None = None) -> tuple[float, float]:
    """The span [start, end] (seconds; default: all) of a video that lasts `duration` seconds.

    An end past the video's is the video's end. Raises SampleError if start is past it.
    """
    start = 0.0 if start is None else start
    end = duration if end is None else min(end, duration)
    if start >= end:
        raise SampleError(f"start past the end: {start:g} s of {duration:g} s")
    return start, end


def sample_times(num_frames: int, start: float, end: float) -> np.ndarray:
    """Centres of `num_frames` equal spans of [start, end] (seconds): float64 [num_frames]."""
    return start + (np.arange(num_frames) + 0.5) * (end - start) / num_frames


def pick_frames(pts: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Index of the frame on display at each time: int64 [len(times)].

    The last frame with pts <= time (+ 1 µs), or the first frame if there is none.
    """
    return np.maximum(np.searchsorted(pts, times + 1e-6, side="right") - 1, 0).astype(np.int64)


def pick(info: FrameTable, num_frames: int, start: float | None = None, end: float | None = None) -> np.ndarray:
    """Indices of the frames that stand for [start, end] (default: the video): int64 [num_frames].

    Raises SampleError if start is past the video's end.
    """
    return pick_frames(info.pts, sample_times(num_frames, *clip_span(info.duration, start, end)))
