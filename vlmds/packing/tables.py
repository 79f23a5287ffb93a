"""Readers of manifest files, and their suffixes: CSV, TSV, JSON, JSON lines and Parquet.

A reader yields one dict for each row and enters the column names into `columns`. A file is read
twice, once for its columns and ids and once for its rows; only a JSON array and the lines of a TSV
are in memory as a whole.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from vlmds.errors import InputError
from vlmds.files import is_url

Record = dict[Any, Any]
Columns = dict[str, None]

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
METADATA_COLUMNS = {"video": "file_name", "caption": "text"}
"""Of a Hugging Face dataset folder, whose table is one of METADATA: our column -> its column."""

LONGEST_CELL = 1000  # lines of a quoted cell of a TSV


def find_table(path: Path) -> Path:
    """The manifest's file: for a folder, its metadata file. Raises InputError if there is none."""
    named = path.suffix.lower() in READERS and is_url(path)  # web servers cannot list folders
    if named or not path.is_dir():
        return path
    for name in METADATA:
        if (path / name).is_file():
            return path / name
    raise InputError(f"{path}: a folder without {', '.join(METADATA)}; name the manifest's file")


def read_table(path: Path, columns: Columns) -> Iterator[Record]:
    """One dict for each row, by column; cells without a column are listed under None.

    Raises InputError for a file that cannot be read, with the line if it has lines.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: unknown extension; use {', '.join(READERS)}")
    try:
        yield from reader(path, columns)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8; save it as UTF-8") from None


def _read_csv(path: Path, columns: Columns) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from _records(path, _csv_rows(path, file), columns)


def _csv_rows(path: Path, file: TextIO) -> Iterator[list[str]]:
    reader = csv.reader(file, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(
                f"{path}: line {line}: {error}; close the quote, and write a quote inside a quoted cell twice"
            ) from None
        yield row


def _read_tsv(path: Path, columns: Columns) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from _records(path, _tsv_rows(file), columns)


def _tsv_rows(file: Iterable[str]) -> Iterator[list[str]]:
    """Rows of a TSV, in which a quote is a text's own unless it opens and closes a cell.

    A quoted cell may contain line breaks, but a line is only joined with the next one if that is no
    row of its own.
    """
    lines = [line.rstrip("\r\n") for line in file]
    tabs = lines[0].count("\t") if lines else 0
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        row = _quoted(line) if '"' in line else line.split("\t")
        if row is None:  # a quote is left open
            end = number
            while row is None and end < min(len(lines), number + LONGEST_CELL):
                if line.count("\t") >= tabs and lines[end].count("\t") >= tabs:
                    break  # two whole rows
                end += 1
                row = _quoted("\n".join(lines[number - 1 : end]))
            if row and len(row) == tabs + 1:
                number = end
            else:
                row = line.split("\t")
        yield row or line.split("\t")


def _quoted(text: str) -> list[str] | None:
    """The cells of a row with quotes; none if a quote is text, and None if one is not closed."""
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True))
    except csv.Error as error:
        return None if "unexpected end" in str(error) else []
    return rows[0] if len(rows) == 1 else []


def _records(path: Path, rows: Iterator[list[str]], columns: Columns) -> Iterator[Record]:
    names = next(rows, [])
    check_unique(path, names)
    columns.update(dict.fromkeys(names))
    for row in rows:
        if not row or row == [""]:
            continue
        record: Record = dict(zip(names, row))
        if len(row) > len(names):
            record[None] = row[len(names) :]
        yield record


def _read_json(path: Path, columns: Columns) -> Iterator[Record]:
    """A JSON array, or one JSON object on each line."""
    with path.open(encoding="utf-8-sig") as file:
        first = ""
        found: Iterator[tuple[int, Any]]
        while not first.strip():  # blank lines before an array
            first = file.readline()
            if not first:
                return
        file.seek(0)
        if first.lstrip().startswith("["):
            place, found = "entry", iter(enumerate(_array(path, file.read()), 1))
        else:
            place, found = "line", _lines(path, file)
        for number, row in found:
            if not isinstance(row, dict):
                raise InputError(f"{path}: {place} {number}: not a JSON object")
            columns.update(dict.fromkeys(row))
            yield row


def _lines(path: Path, file: TextIO) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}: line {number}: not JSON: {error}") from None


def _array(path: Path, text: str) -> list[Any]:
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None


def _read_parquet(path: Path, columns: Columns) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as file:
            table = pq.ParquetFile(file)
            names = table.schema_arrow.names
            check_unique(path, names)
            columns.update(dict.fromkeys(names))
            for batch in table.iter_batches():
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a Parquet file: {error}".splitlines()[0]) from None


def check_unique(path: Path, names: list[str]) -> None:
    """Raise InputError if two columns have one name."""
    twice = {name for name in names if name and names.count(name) > 1}
    if twice:
        raise InputError(f"{path}: several columns are called {min(twice)!r}; rename or remove all but one")


READERS: dict[str, Callable[[Path, Columns], Iterator[Record]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
}
MANIFEST_SUFFIXES = tuple(READERS)
