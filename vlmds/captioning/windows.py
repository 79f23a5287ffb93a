"""The windows that long videos are cut into, one caption each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from vlmds.errors import InputError
from vlmds.video.pool import Clip
from vlmds.video.sampling import clip_span

SHORTEST_WINDOW = 0.1  # seconds
SHORTEST_REST = 0.1  # of a window; a shorter remainder is merged into the previous window

Span = tuple[float, float]


def spans(clip: Clip, duration: float, window: float | None) -> list[Span]:
    """The spans to caption, in seconds: the clip, or the windows that it is cut into. The last window
    may be shorter, or longer by less than ``SHORTEST_REST`` of a window.

    Raises:
        SampleError: the clip starts past the end.
        InputError: a window below ``SHORTEST_WINDOW``.
    """
    if window is not None and not window >= SHORTEST_WINDOW:
        raise InputError(f"window {window:g}: must be {SHORTEST_WINDOW:g} s or more")
    start, end = (round(edge, 6) for edge in clip_span(duration, clip.start, clip.end))
    if window is None:
        return [(start, end)]
    count, rest = divmod(end - start, window)
    count = max(1, int(count) + (rest >= SHORTEST_REST * window))
    edges = [*(round(start + i * window, 6) for i in range(count)), end]
    return list(pairwise(edges))


def grouped(todo: Sequence[Span], window: float | None, most: int) -> Iterator[list[Span]]:
    """Groups of up to ``most`` neighbouring windows of full length; the others alone. The video is read
    once per group."""
    group: list[Span] = []
    for span in todo:
        full = window is not None and abs(span[1] - span[0] - window) < 2e-6
        joins = group and full and span[0] == group[-1][1] and len(group) < most
        if group and not joins:
            yield group
            group = []
        group.append(span)
        if not full:
            yield group
            group = []
    if group:
        yield group


def parse_seconds(text: str, option: str) -> float:
    """ "30", "30s", "1m", "1m30s", "1h" -> seconds.

    Raises:
        InputError: another text, or less than ``SHORTEST_WINDOW``.
    """
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    hours, minutes, seconds = (float(part or 0) for part in found.groups()) if found else (0, 0, 0)
    total = 3600 * hours + 60 * minutes + seconds
    if total < SHORTEST_WINDOW:
        raise InputError(f"{option} {text}: write a length such as 30s, 1m or 1m30s, {SHORTEST_WINDOW:g} s or more")
    return total
