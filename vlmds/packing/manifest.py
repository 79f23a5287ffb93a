"""Read a manifest: the table of videos and captions that `vlmds pack` starts from."""

import csv
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmds.errors import InputError
from vlmds.files import as_path, is_url, path_in

COLUMNS = ("video", "caption", "id", "start", "end", "split", "prompt")
MAX_KEY = 80  # characters; with the longest member extension a ustar name still fits in 99


@dataclass(frozen=True)
class ManifestRow:
    """One usable row.

    row: 1-based data row (a CSV header is not counted).
    key: the id made safe for a tar member name, unique in the manifest, without dots.
    video: absolute path or URL. source: the same as the manifest writes it.
    start, end: seconds, or None for the whole video.
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
    """Rows and rejects in manifest order, and the columns that vlmds does not know."""

    rows: list[ManifestRow]
    rejects: list[Reject]
    ignored_columns: list[str]


@dataclass(frozen=True)
class Known:
    """Rows of earlier manifests, as far as their shards tell them. inputs: (source, start, end) ->
    the ids of the rows that have it, rejected ones too. ids, keys: of those that are packed."""

    inputs: dict[tuple, list[str]] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)

    def has(self, row: ManifestRow) -> bool:
        return row.id in self.inputs.get((row.source, row.start, row.end), ())


class _BadRow(Exception):
    """Why one row is rejected."""


def read_manifest(
    path: str | Path, val_fraction: float = 0.0, *, captions: bool = True, known: Known | None = None
) -> Manifest:
    """Read a CSV, TSV, JSONL or Parquet manifest (UTF-8, told apart by extension).

    Rows without a split go to "train", or, for a `val_fraction` share of the ids, to "val";
    which ones depends on the id alone. Whether a video exists is found out when it is packed.
    captions: false reads no captions, which rows then need not have. known: rows that have an id
    from before keep it, and no other row gets the id or the key of one that is packed.

    Raises InputError if the file cannot be read or lacks the column `video` or `caption`.
    """
    path = as_path(path)
    if not 0.0 <= val_fraction < 1.0:
        raise InputError(f"val_fraction: {val_fraction} is not in [0, 1)")
    columns, records = _read_table(path)
    for name in ("video", "caption") if captions else ("video",):
        if name not in columns:
            raise InputError(f"{path}: no column {name!r}; it has {', '.join(columns) or 'none'}")

    folder = path.parent if is_url(path) else path.resolve().parent
    ids = _Ids({str(r["id"]) for r in records if not _is_missing(r.get("id"))}, known or Known())
    rows, rejects = [], []
    for number, record in enumerate(records, 1):
        try:
            rows.append(_row(number, record, folder, ids, val_fraction, captions))
        except _BadRow as bad:
            rejects.append(Reject(number, _text(record, "id"), _text(record, "video"), str(bad)))
    return Manifest(rows, rejects, [c for c in columns if c not in COLUMNS])


def _read_table(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Column names in file order, and one dict per row."""
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: unknown extension; use {', '.join(readers)}")
    try:
        return reader(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8; save it as UTF-8") from None


def _read_csv(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        try:
            rows = list(reader)
        except csv.Error as error:
            raise InputError(f"{path}: line {reader.line_num}: {error}") from None
        return list(reader.fieldnames or []), rows


def _read_jsonl(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    columns: dict[str, None] = {}
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for line_number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}: line {line_number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}: line {line_number}: not a JSON object")
            columns.update(dict.fromkeys(row))
            rows.append(row)
    return list(columns), rows


def _read_parquet(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as file:
            table = pq.ParquetFile(file).read()
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a Parquet file: {error}".splitlines()[0]) from None
    return table.column_names, table.to_pylist()


def _row(
    number: int, record: dict[str, Any], folder: Path, ids: "_Ids", val_fraction: float, captioned: bool
) -> ManifestRow:
    if None in record:  # where csv.DictReader puts the cells that have no column
        raise _BadRow("too many cells: quote a caption that contains the delimiter")
    source = _text(record, "video")
    if source is None:
        raise _BadRow("no video")
    captions = _captions(record.get("caption")) if captioned else []
    start, end = _seconds(record, "start"), _seconds(record, "end")
    if end is not None and end <= (start or 0.0):
        raise _BadRow(f"bad start or end: end {end:g} is not after start {start or 0.0:g}")
    split = _text(record, "split")
    if split is not None and not re.fullmatch(r"[0-9A-Za-z_-]+", split):
        raise _BadRow(f"bad split: {split!r}; use letters, digits, - and _")

    video = source if is_url(source) else str(folder / source)
    sample_id = ids.claim(number, _text(record, "id"), video, (source, start, end))
    if split is None:
        split = "val" if _unit_interval(sample_id) < val_fraction else "train"
    prompt = _text(record, "prompt")
    key = ids.key(sample_id)
    return ManifestRow(number, key, sample_id, video, source, captions, start, end, split, prompt)


class _Ids:
    """Gives every row an id and a key that no other row has, but a known row its former id."""

    def __init__(self, explicit: set[str], known: Known):
        self._explicit = explicit  # of the whole manifest, so that no default id takes one
        self._known = known
        self._former = {sample_id for ids in known.inputs.values() for sample_id in ids}
        self._rows: dict[str, int] = {}
        self._spans: dict[tuple, tuple[str, int]] = {}  # of rows with a default id
        self._stems: dict[str, int] = {}  # the last suffix tried
        self._keys = set(known.keys)

    def claim(self, row: int, explicit: str | None, video: str, named: tuple) -> str:
        """The row's id: its own, or the one it had, or the stem of its video made unique by -2,
        -3, … named: (source, start, end)."""
        source, span = named[0], (video, *named[1:])
        former = self._known.inputs.get(named, ())
        if explicit is None:
            if span in self._spans:
                raise _BadRow(self._duplicate(*self._spans[span]))
            sample_id = next((i for i in former if i not in self._explicit), None) or next(
                i for i in self._defaults(source) if not (i in self._rows or i in self._explicit or i in self._former)
            )
            self._spans[span] = (sample_id, row)
        elif explicit in self._rows:
            raise _BadRow(self._duplicate(explicit, self._rows[explicit]))
        elif explicit in self._known.ids and explicit not in former:
            raise _BadRow(f"duplicate id: {explicit!r} is packed, with another video, start or end; give another id")
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

    @staticmethod
    def _duplicate(sample_id: str, row: int) -> str:
        return f"duplicate id: {sample_id!r} is row {row}'s; list several captions in one row, or give ids"


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or isinstance(value, float) and math.isnan(value)


def _text(record: dict[str, Any], column: str) -> str | None:
    value = record.get(column)
    return None if _is_missing(value) else str(value).strip() or None


def _captions(value: Any) -> list[str]:
    """Captions from a string, a list, or (all that a CSV cell can hold) a list as JSON."""
    if _is_missing(value) and value != "":
        raise _BadRow("no caption")
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            pass  # a caption that begins with a bracket
    captions = value if isinstance(value, list) else [value]
    if not all(isinstance(caption, str) for caption in captions):
        raise _BadRow("bad caption: not a string or a list of strings")
    captions = [caption.strip() for caption in captions]
    if not captions or not all(captions):
        raise _BadRow("empty caption")
    return captions


def _seconds(record: dict[str, Any], column: str) -> float | None:
    value = record.get(column)
    if _is_missing(value):
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise _BadRow(f"bad start or end: {column} is {value!r}, not seconds")
    return seconds


def _unit_interval(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha1(text.encode()).digest()[:8], "big") / 2**64
