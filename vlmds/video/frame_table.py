"""The frame table: which frames a video has and how to reach them.

Probing finds it by reading every packet. Packing keeps it in the sample's description (its json, which
the index's crc32 covers) as "timing", and a packed video is not probed again.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np

MAX_PIXELS = 1 << 26  # of a frame: 8192 x 8192; a header may claim more than fits in memory
DESCRIBED = ("width", "height", "rotation", "frames", "timing")  # what `from_described` reads


@dataclass(frozen=True, eq=False)
class FrameTable:
    """What decoding needs to know of a video.

    width, height: of the upright picture (see `vlmds.video.upright`). rotation: degrees clockwise to
    apply for display (0, 90, 180, 270). mirrored: turned upside down before that. duration: seconds.
    decoder: "decord" or "pyav".
    ticks: int64 [frames], sorted display times as the file has them, in units of `time_base`
    (seconds).
    by_pts: a decoded frame's time is found in pts; otherwise the k-th decoded frame has pts[k].
    keys: int64 [K], indices of the frames at which decoding may start; empty if only from the
    beginning.
    """

    width: int
    height: int
    rotation: int
    mirrored: bool
    duration: float
    decoder: str
    time_base: Fraction
    ticks: np.ndarray
    by_pts: bool
    keys: np.ndarray

    @property
    def frames(self) -> int:
        """Number of displayable frames."""
        return len(self.ticks)

    @property
    def stored_size(self) -> tuple[int, int]:
        """Width and height of the picture before it is turned; its pixels are square."""
        return (self.height, self.width) if self.rotation in (90, 270) else (self.width, self.height)

    @cached_property
    def start_time(self) -> float:
        """Display time of the first frame as the file has it, seconds."""
        return float(self._seconds[0])

    @cached_property
    def pts(self) -> np.ndarray:
        """Display times in seconds from the first frame: sorted float64 [frames]."""
        return self._seconds - self._seconds[0]

    @cached_property
    def keyframes(self) -> np.ndarray:
        """Those of `keys`: float64 [K]."""
        return self.pts[self.keys]

    @cached_property
    def _seconds(self) -> np.ndarray:
        return self.ticks * self.time_base.numerator / self.time_base.denominator

    def timing(self) -> dict[str, Any]:
        """What `from_described` needs beside width, height, rotation and frames, as JSON: a few dozen
        bytes at a constant frame rate, some 4 per frame otherwise."""
        timing: dict[str, Any] = {
            "time_base": [self.time_base.numerator, self.time_base.denominator],
            "ticks": _packed(self.ticks),
            "keys": _packed(self.keys),
            "by_pts": self.by_pts,
            "duration": self.duration,
            "cleared": self.decoder == "decord",
        }
        return timing | ({"mirrored": True} if self.mirrored else {})

    @classmethod
    def from_described(cls, described: dict[str, Any]) -> "FrameTable":
        """The table of a packed video from its description. Raises ValueError: it is not a valid one."""
        try:
            width, height, rotation, frames = (
                int(described[name]) for name in ("width", "height", "rotation", "frames")
            )
            timing = described["timing"]
            base, duration = Fraction(*timing["time_base"]), float(timing["duration"])
            ticks, keys = _unpacked(timing["ticks"]), _unpacked(timing["keys"])
            decoder = "decord" if timing["cleared"] else "pyav"
            by_pts, mirrored = bool(timing["by_pts"]), bool(timing.get("mirrored"))
        except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        for wrong, what in (
            (not (0 < width and 0 < height and width * height <= MAX_PIXELS), "size"),
            (rotation not in (0, 90, 180, 270), "rotation"),
            (not (len(ticks) == frames > 0 and _rising(ticks) and base > 0), "times"),
            (not 0 < duration < float("inf"), "duration"),
            (len(keys) and not (keys[0] >= 0 and keys[-1] < frames and _rising(keys)), "keyframes"),
        ):
            if wrong:
                raise ValueError(f"bad {what}")
        return cls(width, height, rotation, mirrored, duration, decoder, base, ticks, by_pts, keys)


def _rising(numbers: np.ndarray) -> bool:
    return bool((numbers[1:] > numbers[:-1]).all())  # a difference might overflow


def _packed(numbers: np.ndarray) -> list[int | list[int]]:
    """The differences of successive numbers, beginning with the first's to 0; [d, n] is n times d."""
    packed: list[int | list[int]] = []
    for difference, group in groupby(np.diff(numbers, prepend=0).tolist()):
        count = sum(1 for _ in group)
        packed += [difference] * count if count < 3 else [[difference, count]]
    return packed


def _unpacked(packed: list[int | list[int]]) -> np.ndarray:
    """The numbers: int64 [N]."""
    runs = np.array([run if isinstance(run, list) else [run, 1] for run in packed], np.int64)
    runs = runs.reshape(-1, 2)
    return np.cumsum(np.repeat(runs[:, 0], runs[:, 1]))
