"""The split of each row: which source videos go to "val" by `--val-fraction`."""

import hashlib
from dataclasses import replace
from pathlib import Path

from vlmds.console.text import counted
from vlmds.errors import InputError
from vlmds.packing.manifest import ManifestRow
from vlmds.packing.video_facts import fingerprints, recorded


def with_val(
    out: Path, rows: list[ManifestRow], undecided: set[int], fraction: float, packed: dict[str, str]
) -> tuple[list[ManifestRow], list[str]]:
    """The rows, of which those without a split go to "val" for a `fraction` of the source videos.

    A video is identified by its content (:func:`fingerprints`), or by its name if it is a URL or the
    file is missing: spans and copies of one video are never in both splits. Rows without a split
    join rows of the same video that have one, or are `packed` (source -> split); for other videos a
    hash decides.

    Returns:
        the rows, and lines for the user
    """
    if not 0.0 <= fraction < 1.0:
        raise InputError(f"val_fraction: {fraction} is not in [0, 1)")
    if not fraction or not undecided:
        return rows, []
    videos = {row.source: row.video for row in rows}
    prints = recorded(out, ["sources", list(videos)], len(videos), lambda: fingerprints(list(videos.values())))
    content = dict(zip(videos, prints))
    splits = dict(packed)  # by source, and by content
    splits |= {content[source]: split for source, split in packed.items() if content.get(source)}
    for row in rows:
        if row.row not in undecided:
            splits.setdefault(row.source, row.split)
            splits.setdefault(content[row.source] or row.source, row.split)
    decided = []
    for row in rows:
        if row.row in undecided:
            name = content[row.source] or row.source
            hashed = "val" if _unit_interval(name) < fraction else "train"
            row = replace(row, split=splits.get(row.source) or splits.get(name) or hashed)
        decided.append(row)
    named = sum(found is None for found in prints)
    note = f"--val-fraction chose among {counted(len(videos), 'source video')}, identified by content"
    return decided, [note + (f", {named:,} of them by name (URLs, and files that are not there)" if named else "")]


def _unit_interval(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha1(text.encode()).digest()[:8], "big") / 2**64
