"""The videos to caption, from names, a folder, a manifest or a packed dataset."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmds.data.dataset import Dataset, DatasetOrder, open_dataset
from vlmds.errors import InputError
from vlmds.files import absolute, as_path
from vlmds.packing.manifest import read_manifest
from vlmds.packing.tables import MANIFEST_SUFFIXES
from vlmds.video.pool import Clip

VIDEO_SUFFIXES = frozenset(
    """
    .3gp .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv
    .apng .gif .jpeg .jpg .png .webp
    """.split()
)
"""Of files in a folder that are videos. A still picture is a video of one frame."""


@dataclass(frozen=True)
class Item:
    """One video, or span of a video, to caption.

    id: unique among the items. video: its name in the output. clip: the file and span; None if there
    is a position. prompt: its own; None is the experiment's. position: in a packed dataset. problem:
    why it cannot be captioned.
    """

    id: str
    video: str
    clip: Clip | None = None
    prompt: str | None = None
    position: int | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Selection:
    """All items that one command captions.

    data: their origin as the settings record it. skipped: files of a folder that are not videos.
    dataset, split: of items with positions.
    """

    items: list[Item]
    data: str | None = None
    skipped: int = 0
    dataset: Dataset | None = None
    split: str | None = None


def select_items(videos: Sequence[str | Clip], data: str | Path | None, split: str | None = None) -> Selection:
    """The items that the command names.

    Args:
        videos: paths, URLs or clips; or, in their place,
        data: a folder of videos (all below it but hidden ones), a manifest or a packed dataset.
        split: of a packed dataset; default: val, or the only one.

    Raises:
        InputError: both or neither, no videos, or a split of data without splits.
    """
    if bool(videos) == (data is not None):
        raise InputError("give either videos or --data with a folder, a manifest or a dataset")
    if data is None:
        selection = _list(videos)
    elif (as_path(data) / "dataset.json").is_file():
        return _packed(data, split)
    elif as_path(data).suffix.lower() in MANIFEST_SUFFIXES:
        selection = _manifest(data)
    elif Path(data).is_dir():
        selection = _folder(Path(data))
    else:
        raise InputError(
            f"--data {data}: neither a folder, nor a manifest ({', '.join(MANIFEST_SUFFIXES)}), nor a packed dataset"
        )
    if split is not None:
        raise InputError(f"--split {split}: only a packed dataset has splits")
    if not selection.items:
        raise InputError(
            f"--data {data}: no videos in it ({selection.skipped} other files); known "
            f"are {' '.join(sorted(VIDEO_SUFFIXES))}"
        )
    return selection


def _list(videos: Sequence[str | Clip]) -> Selection:
    items: dict[Item, None] = {}
    for video in videos:
        clip = video if isinstance(video, Clip) else Clip(str(video))
        name = clip.video
        if (clip.start, clip.end) != (None, None):
            name += f"#t={clip.start or 0:g},{'' if clip.end is None else f'{clip.end:g}'}"
        items[Item(name, clip.video, clip)] = None
    return Selection(list(items))


def _folder(root: Path) -> Selection:
    items, skipped = [], 0
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            path = Path(folder, name)
            if name.startswith(".") or path.suffix.lower() not in VIDEO_SUFFIXES:
                skipped += 1
                continue
            shown, problem = path.relative_to(root).as_posix(), None
            try:
                shown.encode()
            except UnicodeEncodeError:
                shown = os.fsencode(shown).decode(errors="backslashreplace")
                problem = "file name is not UTF-8"
            items.append(Item(shown, shown, Clip(str(path)), problem=problem))
    return Selection(sorted(items, key=lambda item: item.id), absolute(root), skipped)


def _manifest(data: str | Path) -> Selection:
    manifest = read_manifest(data, captions=False)
    numbered = [
        (row.row, Item(row.id, row.source, Clip(row.video, row.start, row.end), row.prompt)) for row in manifest.rows
    ]
    numbered += [(bad.row, Item(f"row {bad.row}", bad.video or "", problem=bad.reason)) for bad in manifest.rejects]
    return Selection([item for _, item in sorted(numbered, key=lambda pair: pair[0])], absolute(data))


def _packed(data: str | Path, split: str | None) -> Selection:
    dataset = open_dataset(data)
    split = dataset.choose_split(split)
    order = DatasetOrder(dataset, split, shuffle=False)
    keys = [order.row(dataset, split, position).key for position in range(len(order))]
    items = [Item(key, key, position=position) for position, key in enumerate(keys)]
    return Selection(items, f"{dataset.fingerprint} {split}", dataset=dataset, split=split)
