"""Evaluations of captions that vlmds did not train for: from a file, or by another model.

    outside.json                     what it is: name, kind, where the captions are from, revision, licence
    evaluation/SPLIT/metrics.json    as of a run, without the blind tests
    evaluation/SPLIT/predictions.jsonl

`vlmds compare` takes such a folder beside run folders.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vlmds.console.text import counted
from vlmds.data.dataset import Dataset, open_dataset
from vlmds.data.exact_reader import Unreadable
from vlmds.data.loader import SampleRows
from vlmds.errors import InputError
from vlmds.evaluation.metrics import tokenizers
from vlmds.evaluation.outside_record import FILE, RECORD, Outside, read_outside, write_outside
from vlmds.evaluation.results import begin, changed_since, save_results, scored
from vlmds.evaluation.scoring import ClipText, evaluated_positions, read_text, read_texts
from vlmds.experiments.schema import DataConfig
from vlmds.files import sha256_of
from vlmds.packing.tables import READERS, read_table
from vlmds.permissions import check_writable

NAMED = 10  # ids in a message
IDS = ("id", "key")
SPANS = ("start", "end")
NEAR = 0.05  # seconds, by which spans may differ: other tools round them


def outside_folder(name: str, output: Path | None) -> Path:
    """The folder of an outside evaluation: ``output``, or runs/NAME. Raises InputError: a bad name, or the folder
    of a run."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise InputError(f"--name {name}: must be one name, of letters, digits, - _ .")
    folder = output or Path("runs") / name
    if (folder / "run.json").is_file():
        raise InputError(f"{folder}: is a run; choose another --name, or --output")
    return folder


def outside_record(folder: Path, name: str, kind: str, source: str, **facts: str | None) -> Outside:
    """The record of a folder, with the id that it had. Raises InputError if it is another source's."""
    former = read_outside(folder) if (folder / RECORD).is_file() else None
    if former and (former.kind, former.source) != (kind, source):
        raise InputError(
            f"{folder}: has the captions of {former.source}, not of {source}; choose another --name, or --output"
        )
    return Outside(former.id if former else uuid.uuid4().hex, name, kind, source, **facts)


def evaluate_predictions(
    file: str | Path,
    *,
    name: str,
    data: str,
    split: str | None = None,
    output: Path | None = None,
    clips: int | None = None,
    again: bool = False,
) -> Path:
    """Score captions from a file; returns the folder of the results.

    Args:
        file: JSONL, JSON, CSV, TSV or Parquet with one row for each clip: "id" (or "key"), "caption". If a row also
            has "start" and "end", or "video" (or "source"), they must be the clip's.
        name: of the system, in comparisons. data: packed dataset. split: default: "val", or the only one.
        output: default: runs/NAME. clips: so many, evenly spaced, instead of all.
        again: replace an evaluation of another file or with other settings.

    Raises:
        InputError: the file cannot be read, lacks a column, or has other clips than the split: unknown, missing or
            repeated ids.
    """
    file = Path(file)
    folder = outside_folder(name, output)
    dataset = open_dataset(DataConfig(path=data))
    split = dataset.choose_split(split)
    rows = SampleRows(dataset, split, shuffle=False)
    positions = evaluated_positions(len(rows), clips)
    texts = read_texts(rows, positions)
    bad = _unreadable(rows, positions, texts)
    where = f"split {split} of {dataset.root}"
    captions = match_captions(file, read_rows(file), texts, where, [record["key"] for record in bad])
    digest = sha256_of(file)
    record = outside_record(folder, name, FILE, str(file), sha256=digest)
    settings = outside_settings(dataset, split, clips) | {"predictions_sha256": digest}
    place = folder / "evaluation" / split
    refuse_other(place, settings, again)
    result, lines = scored(texts, captions)
    result["unreadable"] = len(bad)
    write_outside(folder, record)
    begin(place, settings, afresh=False)
    save_results(place, settings, result, lines, bad)
    return folder


def _unreadable(rows: SampleRows, positions: Sequence[int], texts: Sequence[ClipText]) -> list[dict[str, Any]]:
    """Records of the clips whose descriptions cannot be read."""
    read = {text.position for text in texts}
    found = (read_text(rows, position) for position in positions if position not in read)
    return [
        {"position": clip.position, "key": clip.key, "unreadable": clip.reason}
        for clip in found
        if isinstance(clip, Unreadable)
    ]


def outside_settings(dataset: Dataset, split: str, clips: int | None) -> dict[str, Any]:
    """The settings that an evaluation of any captions of this data has."""
    return {
        "data": str(dataset.root),
        "data_fingerprint": dataset.fingerprint,
        "split": split,
        "clips": clips,
        "tokenisation": [level.name for level in tokenizers()],
    }


def refuse_other(place: Path, settings: dict[str, Any], again: bool) -> None:
    """Raise InputError if the folder of an evaluation has one with other settings, which --again replaces."""
    check_writable(place, "--output", ("parts", "thumbnails"))
    changed = None if again else changed_since(place, settings)
    if not changed:
        return
    changed.pop("data", None)  # may be written in several ways; the fingerprint decides
    if changed:
        raise InputError(
            f"{place}: was evaluated with other settings ({'; '.join(changed.values())}); "
            "choose another --name, or replace it with --again"
        )


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of predictions. Raises InputError: it cannot be read, or lacks ids or captions."""
    if file.suffix.lower() not in READERS:
        raise InputError(f"--predictions {file}: unknown extension; use {', '.join(READERS)}")
    columns: dict[Any, None] = {}
    rows = list(read_table(file, columns))
    if not any(name in columns for name in IDS) or "caption" not in columns:
        raise InputError(
            f"--predictions {file}: needs the columns id and caption; it has {', '.join(map(str, columns)) or 'none'}"
        )
    return rows


def match_captions(
    file: Path, rows: Iterable[dict[str, Any]], texts: Sequence[ClipText], where: str, unreadable: Sequence[str] = ()
) -> list[str]:
    """The caption of each clip, in the order of ``texts``.

    Args:
        where: what the clips are, for messages. unreadable: keys of clips whose rows are left out.

    Raises:
        InputError: unknown, missing or repeated ids, all named up to ten; a clip's row has another video or span;
            a caption that is no text.
    """
    clips = {text.key: text for text in texts} | {text.id: text for text in texts}
    found: dict[str, str] = {}
    unknown, repeated, other = [], [], []
    for number, row in enumerate(rows, 1):
        given = next((row[name] for name in IDS if row.get(name) not in (None, "")), None)
        if given is None:
            raise InputError(f"--predictions {file}: row {number} has no id")
        text = clips.get(str(given))
        if text is None:
            if str(given) not in unreadable:
                unknown.append(str(given))
            continue
        if not isinstance(row.get("caption"), str):
            raise InputError(f"--predictions {file}: row {number}, {given}: the caption is not a text")
        if text.key in found:
            repeated.append(str(given))
        if problem := _other_clip(row, text):
            other.append(f"{given} ({problem})")
        found[text.key] = row["caption"].strip()
    missing = [text.id for text in texts if text.key not in found]
    problems = [
        f"{counted(len(names), noun)} {what}: {_listed(names)}"
        for names, noun, what in (
            (unknown, "id", "that the data does not have"),
            (missing, "clip", "without a caption"),
            (repeated, "id", "more than once"),
            (other, "clip", "of another video or span"),
        )
        if names
    ]
    if problems:
        raise InputError(f"--predictions {file}: does not fit {where}: {'; '.join(problems)}")
    return [found[text.key] for text in texts]


def _other_clip(row: dict[str, Any], text: ClipText) -> str | None:
    """Why a row is of another clip than the one with its id, as far as it says what it is of."""
    for name in ("video", "source"):
        given = row.get(name)
        if isinstance(given, str) and given and Path(given).name != Path(text.source).name:
            return f"{name} {given}, not {text.source}"
    for name, own in zip(SPANS, text.span, strict=True):
        given = row.get(name)
        if given in (None, "") or own is None and name == "end":
            continue
        try:
            near = abs(float(given) - (own or 0.0)) <= NEAR
        except (TypeError, ValueError):
            near = False
        if not near:
            return f"{name} {given}, not {own or 0.0:g}"
    return None


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
