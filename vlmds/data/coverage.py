"""Lines about the parts of a dataset's clips that the model does not see: the edges that the centre
crop removes, and the time between frames that are far apart. Only the index is read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from vlmds.console.text import counted
from vlmds.data.index import ShardIndex
from vlmds.experiments.schema import DataConfig
from vlmds.video.fit import FIT, fit_of

SPARSE_SECONDS = 2.0
"""Distance of a clip's frames above which it is counted as sparsely sampled."""


def coverage_lines(
    parts: Sequence[ShardIndex], num_frames: int | None = None, fit: str | None = None, *, korean: bool = False
) -> list[str]:
    """At most a line about the crop and a line about sampling; none where nothing is lost.

    Args:
        parts: packed datasets, all of one store.
        num_frames, fit: None for the store's own, or of a video store what experiments take by default.

    Raises:
        InputError: a damaged index.
    """
    num_frames = num_frames or parts[0].meta.get("num_frames") or DataConfig().num_frames
    tables = [table for part in parts for table in part.tables(["width", "height", "duration", "start", "end"])]
    columns = {name: np.concatenate([_numbers(table[name]) for table in tables]) for name in tables[0].column_names}
    ends = np.fmin(columns["end"], columns["duration"])
    gaps = (ends - np.nan_to_num(columns["start"])) / num_frames
    if fit is None:
        stored = parts[0].store != "video"
        fit = fit_of(parts[0].meta["resizer"]) if stored else FIT
    found = [_crop(columns["width"], columns["height"], korean) if fit == "crop" else ""]
    found.append(_sampling(gaps, num_frames, korean))
    return [line for line in found if line]


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """float64; NaN where a value is missing."""
    return column.cast(pa.float64()).to_numpy()


def _crop(width: np.ndarray, height: np.ndarray, korean: bool) -> str:
    lost = 1 - np.fmin(width, height) / np.fmax(width, height)
    texts = []
    for form, name, which in (("landscape", "가로", width > height), ("portrait", "세로", height > width)):
        if (count := int(which.sum())) and korean:
            texts.append(f"{name} 영상 클립 {count:,}개는 화면의 {lost[which].mean():.0%}")
        elif count:
            texts.append(
                f"{counted(count, f'{form} clip')} {'lose' if count > 1 else 'loses'} "
                f"{lost[which].mean():.0%} of the picture"
            )
    if korean and texts:
        return f"중앙 크롭으로 잘리는 부분: {', '.join(texts)}"
    return f"centre crop: {', '.join(texts)}" if texts else ""


def _sampling(gaps: np.ndarray, num_frames: int, korean: bool) -> str:
    """gaps: seconds between a clip's frames."""
    sparse = gaps[gaps > SPARSE_SECONDS]
    if not len(sparse):
        return ""
    if korean:
        return (
            f"프레임 샘플링: {SPARSE_SECONDS * num_frames:g}초보다 긴 클립 {len(sparse):,}개는 프레임 {num_frames}장, "
            f"간격 {np.median(sparse):.1f}초(중앙값; 가장 긴 클립은 {sparse.max():.1f}초)"
        )
    get = "get" if len(sparse) > 1 else "gets"
    return (
        f"sampling: {counted(len(sparse), 'clip')} longer than "
        f"{SPARSE_SECONDS * num_frames:g} s {get} {counted(num_frames, 'frame')}, one every "
        f"{np.median(sparse):.1f} s (median; {sparse.max():.1f} s in the longest)"
    )
