"""The demo's picture: clips with their captions."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure

from vlmds.video.decode import decode_frames
from vlmds.video.probe import probe

SHOWN = (0, 2, 5, 7)  # of 8 sampled frames
HANGUL_FONTS = (
    "Noto Sans CJK KR",
    "Noto Sans KR",
    "NanumGothic",
    "Malgun Gothic",
    "AppleGothic",
    "UnDotum",
    "Baekmuk Gulim",
)


def hangul_font() -> str | None:
    """The name of an installed font with Hangul; None if there is none."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return next((name for name in HANGUL_FONTS if name in installed), None)


def draw_results(path: Path, clips: list[Path], references: list[str], captions: list[str]) -> None:
    """One row a clip: four frames, the caption (green if it is the reference, else red) and the
    reference. Without a Hangul font the attributes are named in English."""
    font = hangul_font()
    figure = Figure(figsize=(11, 1.45 * len(clips)), dpi=110)
    with matplotlib.rc_context({"font.family": [font] if font else ["DejaVu Sans"]}):
        grid = figure.add_gridspec(len(clips), len(SHOWN) + 1, width_ratios=[1] * len(SHOWN) + [5])
        for row, (clip, reference, caption) in enumerate(zip(clips, references, captions)):
            frames = decode_frames(str(clip), probe(str(clip)), 8)
            for column, number in enumerate(SHOWN):
                axes = figure.add_subplot(grid[row, column])
                axes.imshow(np.asarray(frames[number]))
                axes.set_axis_off()
            axes = figure.add_subplot(grid[row, len(SHOWN)])
            axes.set_axis_off()
            colour = "#177245" if caption == reference else "#b3261e"
            axes.text(0, 0.62, _shown(caption, font), color=colour, fontsize=12, va="center")
            axes.text(0, 0.25, _shown(reference, font), color="#666666", fontsize=10, va="center")
        figure.savefig(path, bbox_inches="tight")


def _shown(text: str, font: str | None) -> str:
    if font:
        return text
    from vlmds.demo.clips import parse_caption

    found = parse_caption(text)
    return f"{found.colour or '?'} {found.shape or '?'}, moves {found.direction or '?'}"
