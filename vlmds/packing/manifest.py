"""The manifest: the table of videos and captions that `vlmds pack` reads.

Besides vlmds's own columns it may have those of LLaVA (`video` or `image`, `conversations`) and
ms-swift (`videos` or `images`, `messages`), or be a Hugging Face folder with a metadata file.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmds.console.text import counted
from vlmds.errors import InputError
from vlmds.files import as_path, is_url, path_in
from vlmds.packing.cells import (
    MEDIA,
    BadRow,
    captions_of,
    first_turns,
    is_missing,
    keepable,
    media_of,
    plain,
    seconds_of,
    shown,
    text_of,
)
from vlmds.packing.tables import METADATA_COLUMNS, Columns, Record, find_table, read_table

COLUMNS = ("video", "caption", "id", "start", "end", "split", "prompt")
CONVERSATIONS = ("conversations", "messages")
SPLITS = {"validation": "val", "valid": "val", "dev": "val", "eval": "val"}
"""Other names of a split."""
NULLS = ("nan", "none", "null", "<na>")
"""Texts that other tools write for a missing value."""
MAX_KEY = 80  # characters; with the longest member extension a ustar name still fits in 99


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One usable row.

    row: 1-based data row (a CSV header is not counted).
    key: the id made safe for a tar member name, unique in the manifest, without dots.
    video: absolute path or URL. source: the same as the manifest writes it.
    start, end: seconds, or None for the whole video.
    kept: values of the columns that travel with the sample, or None.
    """

    row: int
    key: str
    id: str
    video: str
    source: str
    captions: list[str]
    start: float | None
    end: float | None
    split: str
    prompt: str | None
    kept: dict[str, Any] | None = None


@dataclass(frozen=True)
class Reject:
    """One row that cannot be used, and why. Reasons start with a fixed phrase, then a colon."""

    row: int
    id: str | None
    video: str | None
    reason: str
    split: str | None = None
    shard: int | None = None


@dataclass(frozen=True)
class Manifest:
    """Rows and rejects in manifest order. ignored_columns: those that are not used. undecided: the
    numbers of rows without a split (which have "train"). notes: lines for the user."""

    rows: list[ManifestRow]
    rejects: list[Reject]
    ignored_columns: list[str]
    undecided: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Known:
    """Rows of earlier manifests, as far as their shards record them. inputs: (source, start, end) ->
    the ids of the rows that have it, rejected ones too. ids, keys: of those that are packed."""

    inputs: dict[tuple, list[str]] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)

    def has(self, row: ManifestRow) -> bool:
        return row.id in self.inputs.get((row.source, row.start, row.end), ())


def read_manifest(
    path: str | Path,
    *,
    captions: bool = True,
    known: Known | None = None,
    columns: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
) -> Manifest:
    """All rows of a manifest; arguments and errors as of :class:`ManifestReader`."""
    reader = ManifestReader(path, captions=captions, known=known, columns=columns, keep=keep)
    rows, rejects = [], []
    for row in reader:
        if isinstance(row, Reject):
            rejects.append(row)
        else:
            rows.append(row)
    return Manifest(rows, rejects, reader.ignored_columns, reader.undecided, reader.notes())


class ManifestReader:
    """The rows of a manifest (UTF-8; the suffix says of which kind), read one after another.

    Rows without a split get "train" and are `undecided`. Whether a video exists is found out when it
    is packed.

    Args:
        path: a file or URL, or a folder with a metadata file.
        captions: false reads no captions, which rows then need not have.
        known: rows that have an id from before keep it, and no other row gets the id or the key of
            one that is packed.
        columns: our column -> the file's, where they differ.
        keep: columns of the file whose values travel with the sample.

    Raises:
        InputError: the file cannot be read, or lacks a column that is needed or named.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        captions: bool = True,
        known: Known | None = None,
        columns: Mapping[str, str] | None = None,
        keep: Sequence[str] = (),
    ):
        self.path = find_table(as_path(path))
        self.undecided: set[int] = set()
        self._captioned, self._keep = captions, tuple(keep)
        self._null_texts, self._further, self._conversations = 0, 0, 0
        found: Columns = {}
        renamed = dict(columns or {})
        for name in renamed:
            if name not in COLUMNS:
                raise InputError(f"--columns {name}=…: there is no {name}; known are {', '.join(COLUMNS)}")
        given = renamed.get("id", "id")
        ids = {plain(record[given]) for record in read_table(self.path, found) if not is_missing(record.get(given))}
        for name in (*renamed.values(), *keep):
            if name not in found:
                raise InputError(f"{self.path}: no column {name!r}; it has {_listed(found)}")
        if self.path.stem == "metadata":
            others = {ours: theirs for ours, theirs in METADATA_COLUMNS.items() if ours not in found}
            renamed = {ours: theirs for ours, theirs in others.items() if theirs in found} | renamed
        self._renamed = renamed
        has = {*found, *renamed}
        needed = {"video": MEDIA, "caption": ("caption", *CONVERSATIONS)} if captions else {"video": MEDIA}
        for name, names in needed.items():
            if not has.intersection(names):
                raise InputError(
                    f"{self.path}: no column {name!r}; it has {_listed(found)}; "
                    f"--columns {name}=NAME names the one that stands for it"
                )
        used = {*COLUMNS, *MEDIA, *CONVERSATIONS, *keep} - {*renamed} | {*renamed.values()}
        self.ignored_columns = [shown(column) or "" for column in found if column and column not in used]
        self._folder = self.path.parent if is_url(self.path) else self.path.resolve().parent
        self._ids = _Ids(ids, known or Known())

    def __iter__(self) -> Iterator[ManifestRow | Reject]:
        for number, record in enumerate(read_table(self.path, {}), 1):
            record |= {ours: record.get(theirs) for ours, theirs in self._renamed.items()}
            try:
                yield self._row(number, record)
            except BadRow as bad:
                video = next((record[name] for name in MEDIA if not is_missing(record.get(name))), None)
                yield Reject(number, shown(record.get("id")), shown(video), shown(str(bad)) or "")

    def notes(self) -> list[str]:
        """What was found in the rows that the user should know of, a line each."""
        notes = []
        if self._null_texts:
            notes.append(
                f"{counted(self._null_texts, 'caption')} with the text of a missing value ({', '.join(NULLS)}): "
                "if that is not meant, leave the cell empty"
            )
        if self._further:
            notes.append(
                f"{counted(self._conversations, 'conversation')} with more than one answer: "
                f"{counted(self._further, 'further turn')} not used"
            )
        return notes

    def _row(self, number: int, record: Record) -> ManifestRow:
        if None in record:  # cells without a column
            raise BadRow("too many cells: quote a caption that contains the delimiter")
        source = media_of(record)
        prompt = text_of(record, "prompt")
        prompt, captions = self._prompt_and_captions(record, prompt) if self._captioned else (prompt, [])
        start, end = seconds_of(record, "start"), seconds_of(record, "end")
        if end is not None and end <= (start or 0.0):
            raise BadRow(f"bad start or end: end {end:g} is not after start {start or 0.0:g}")
        split = text_of(record, "split")
        if split is not None and not re.fullmatch(r"[0-9A-Za-z_-]+", split):
            raise BadRow(f"bad split: {split!r}; use letters, digits, - and _")
        kept = {name: keepable(record.get(name), name) for name in self._keep} or None

        video = source if is_url(source) else str(self._folder / source)
        sample_id = self._ids.claim(number, text_of(record, "id"), video, (source, start, end))
        if split is None:
            self.undecided.add(number)
        split = "train" if split is None else SPLITS.get(split.lower(), split)
        self._null_texts += sum(caption.lower() in NULLS for caption in captions)
        key = self._ids.key(sample_id)
        return ManifestRow(number, key, sample_id, video, source, captions, start, end, split, prompt, kept)

    def _prompt_and_captions(self, record: Record, prompt: str | None) -> tuple[str | None, list[str]]:
        """From the row's own columns, or where it has no caption, from its conversation."""
        turns = next((record[name] for name in CONVERSATIONS if not is_missing(record.get(name))), None)
        if turns is None or not is_missing(record.get("caption")):
            return prompt, captions_of(record.get("caption"))
        asked, answer, further = first_turns(turns)
        self._further += further
        self._conversations += further > 0
        return prompt or asked or None, captions_of([answer])


class _Ids:
    """Gives every row an id and a key that no other row has, but a known row its former id."""

    def __init__(self, explicit: set[str], known: Known):
        self._explicit = explicit  # of the whole manifest: no default id may be one
        self._known = known
        self._former = {sample_id for ids in known.inputs.values() for sample_id in ids}
        self._rows: dict[str, int] = {}
        self._spans: dict[Any, str] = {}  # of rows with a default id: their id by video and span
        self._stems: dict[str, int] = {}  # the last suffix tried
        self._keys = set(known.keys)

    def claim(self, row: int, explicit: str | None, video: str, named: tuple) -> str:
        """The row's id: its own, or the one it had, or the stem of its video made unique by -2,
        -3, … named: (source, start, end)."""
        source, span = named[0], video if named[1:] == (None, None) else (video, *named[1:])
        former = self._known.inputs.get(named, ())
        if explicit is None:
            if span in self._spans:
                raise BadRow(self._duplicate(self._spans[span]))
            sample_id = next((i for i in former if i not in self._explicit), None) or next(
                i for i in self._defaults(source) if not (i in self._rows or i in self._explicit or i in self._former)
            )
            self._spans[span] = sample_id
        elif explicit in self._rows:
            raise BadRow(self._duplicate(explicit))
        elif explicit in self._known.ids and explicit not in former:
            raise BadRow(f"duplicate id: {explicit!r} is packed, with another video, start or end; give another id")
        else:
            sample_id = explicit
        self._rows[sample_id] = row
        return sample_id

    def key(self, sample_id: str) -> str:
        """The id with unsafe characters replaced, and a hash where that changed it."""
        key = re.sub(r"[^0-9A-Za-z_-]", "_", sample_id)
        if key != sample_id or len(key) > MAX_KEY or key in self._keys:
            digest = hashlib.sha1(sample_id.encode()).hexdigest()
            safe = key
            # Ids in Korean differ by their hash alone, and 32 bits collide at some 100,000 rows.
            for length in range(8, len(digest) + 1, 8):
                key = f"{safe[: MAX_KEY - 1 - length]}-{digest[:length]}"
                if key not in self._keys:
                    break
        self._keys.add(key)
        return key

    def _defaults(self, source: str) -> Iterator[str]:
        stem = path_in(source).stem
        if stem not in self._stems:
            self._stems[stem] = 1
            yield stem
        while True:
            self._stems[stem] += 1
            yield f"{stem}-{self._stems[stem]}"

    def _duplicate(self, sample_id: str) -> str:
        row = self._rows[sample_id]
        return f"duplicate id: {sample_id!r} is row {row}'s; list several captions in one row, or give ids"


def _listed(columns: Columns) -> str:
    return ", ".join(shown(name) or "''" for name in columns) or "none"
