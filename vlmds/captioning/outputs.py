"""What becomes of captions: the formats, and the file in which they are collected.

    captions.jsonl           the record of all: one line a caption, written as it is made
    captions.settings.json   what they were made with
    captions.jsonl.00001 …   what other ranks have made; gone when the command is done
    captions.csv, .json, .srt   written from captions.jsonl at the end, whole or not at all

A line has "id", "video", "start", "end", "duration" (seconds) and "caption", or "error" in its
place; "prompt", if the video has its own.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import shlex
import time
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from vlmds.errors import InputError
from vlmds.files import check_writable, is_url, path_in, sync_folder, write

if TYPE_CHECKING:  # which bring in PyTorch
    from vlmds.captioning.sources import Item, Span

FORMATS = ("jsonl", "json", "csv", "srt")
RECORD = frozenset(("id", "video", "start", "end"))  # what every line has
CSV_COLUMNS = ("id", "video", "start", "end", "duration", "prompt", "caption", "error")
SYNC_SECONDS = 10.0  # what a power cut may cost
SRT_COLUMNS = 42  # of a subtitle's line; a Hangul syllable takes two

Record = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """Where captions go. path: the file, or of several videos' subtitles the folder."""

    format: str
    path: Path
    jsonl: Path
    settings: Path

    @property
    def folder(self) -> bool:
        return self.format == "srt" and self.path.suffix.lower() != ".srt"


def find_target(out: str | Path, format: str | None = None) -> Target:
    """What ``--out`` and ``--format`` mean; the format is the suffix's where none is given.

    Raises:
        InputError: no format, two that differ, or a URL.
    """
    path = Path(out)
    if is_url(out):
        raise InputError(f"--out {out}: must be a local path")
    suffix = path.suffix.lower()[1:]
    known = suffix if suffix in FORMATS else None
    if format is None and known is None:
        raise InputError(f"--out {out}: end the name with {', '.join('.' + f for f in FORMATS)}, or give --format")
    if None not in (format, known) and format != known:
        raise InputError(f"--format {format}: --out {out} is of another format; change one of them")
    format = format or known
    if format == "srt" and not known:
        base = path / "captions"
    else:
        base = path.with_suffix("") if known else path
    return Target(format, path, Path(f"{base}.jsonl"), Path(f"{base}.settings.json"))


class CaptionFile:
    """The record of all captions, which a stopped command goes on with. Use as a context manager,
    which keeps other commands off."""

    def __init__(self, target: Target):
        self.target = target
        self._locks: list[IO] = []

    def begin(self, settings: dict[str, Any], again: bool) -> list[Record]:
        """Make ready, on one rank; returns the captions that are there already.

        Raises:
            InputError: made with other settings, or by something else; or another command is at it.
        """
        target = self.target
        check_writable(target.settings.parent, "--out", (target.settings.name, target.jsonl.name))
        if target.settings.is_file():
            self._lock()
            if again:
                for path in (target.jsonl, *self._parts()):
                    path.unlink(missing_ok=True)
            else:
                self._check(settings)
        else:
            found = [p for p in (target.jsonl, target.path) if p.is_file()]
            if target.folder:
                found += sorted(target.path.rglob("*.srt"))[:1]
            if found:
                raise InputError(
                    f"{found[0]}: was not made by vlmds caption (there is no {target.settings}); choose another --out"
                )
        try:
            write(target.settings, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise InputError(f"--out {target.path}: cannot be written: {error.strerror}") from None
        self._lock()  # writing has put a new file in the old one's place
        return [record for record in self.read() if "caption" in record]

    def _lock(self) -> None:
        """Two commands at one file would lose what the other has written."""
        file = self.target.settings.open("r+")
        self._locks.append(file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{self.target.jsonl}: another vlmds caption is at it; wait until it is done, or choose another --out"
            ) from None
        except OSError:
            pass  # a file system without locks

    def __enter__(self) -> CaptionFile:
        return self

    def __exit__(self, *_) -> None:
        for file in self._locks:
            file.close()

    def _check(self, settings: dict[str, Any]) -> None:
        from vlmds.experiments.differences import flat_settings

        path = self.target.settings
        try:
            old = flat_settings(json.loads(path.read_text(encoding="utf-8")))
        except ValueError:
            raise InputError(f"{path}: damaged; --again starts anew") from None
        new = flat_settings(settings)
        changed = [
            f"{key} {old.get(key)!r} -> {new.get(key)!r}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
        if changed:
            raise InputError(
                f"{self.target.jsonl}: was made with other settings "
                f"({'; '.join(changed)}); choose another --out, or start anew with "
                "--again"
            )

    def keep(self, records: Iterable[Record]) -> None:
        """These, and nothing else, are what is there. Ends the other ranks' files."""
        write(self.target.jsonl, "".join(map(_line, records)))
        for path in self._parts():
            path.unlink()
        sync_folder(self.target.jsonl.parent)

    def read(self) -> list[Record]:
        """All ranks' records; a line that a kill cut short is left out."""
        records = []
        for path in (self.target.jsonl, *self._parts()):
            if not path.is_file():
                continue
            # Not splitlines(), which also splits where a caption has U+2028.
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                with suppress(ValueError):
                    records.append(json.loads(line))
        return records

    def appender(self, rank: int) -> Appender:
        jsonl = self.target.jsonl
        return Appender(jsonl.with_name(f"{jsonl.name}.{rank:05d}") if rank else jsonl)

    def _parts(self) -> list[Path]:
        jsonl = self.target.jsonl
        return sorted(
            p
            for p in jsonl.parent.glob("*")
            if p.name.startswith(f"{jsonl.name}.") and p.name.removeprefix(f"{jsonl.name}.").isdigit()
        )


class Appender:
    """Adds lines to a file, on disk every ``SYNC_SECONDS``. Use as a context manager."""

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")
        self._synced = time.monotonic()

    def add(self, records: Iterable[Record]) -> None:
        self._file.writelines(map(_line, records))
        self._file.flush()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def __enter__(self) -> Appender:
        return self

    def __exit__(self, *_) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def in_order(records: Iterable[Record], items: Sequence[Item]) -> tuple[list[Record], list[Record]]:
    """(records of the items, in their order and by time; those of others). Of two for the same
    span the later one counts."""
    by_id: dict[str, dict[Span, Record]] = {}
    for record in records:
        by_id.setdefault(record["id"], {})[record["start"], record["end"]] = record
    asked = []
    for item in items:
        found = by_id.pop(item.id, {})
        # Of what cannot be read there is no time.
        asked += [found[span] for span in sorted(found, key=lambda s: s[0] or 0.0)]
    return asked, [record for found in by_id.values() for record in found.values()]


def write_format(target: Target, records: Sequence[Record]) -> None:
    """Write the records in a format other than JSONL."""
    if target.format == "json":
        write(target.path, json.dumps(records, indent=2, ensure_ascii=False) + "\n")
    elif target.format == "csv":
        write(target.path, to_csv(records))
    elif target.folder:
        for name, cues in srt_files(records).items():
            write(target.path / name, to_srt(cues))
    elif target.format == "srt":
        write(target.path, to_srt(records))


def write_from(record: str | Path, out: str | Path, format: str | None = None, again: bool = False) -> list[Path]:
    """Write the captions that are collected in a .jsonl in another format, without a model; returns
    the files written.

    Args:
        record: the .jsonl beside what :func:`vlmds.caption_to_file` wrote.
        out, format: as there. again: replace files that are there and belong to another record.

    Raises:
        InputError: nothing to read, one .srt for several videos, or files that are there.
    """
    target, record = find_target(out, format), Path(record)
    if target.format == "jsonl":
        raise InputError(
            f"--out {out}: the captions are in {record} as JSONL; choose .json, .csv or .srt, or --format srt"
        )
    source = CaptionFile(Target("jsonl", record, record, record.with_suffix(".settings.json")))
    found = {(r["id"], r["start"], r["end"]): r for r in source.read() if {*r} >= RECORD}
    if not found:
        raise InputError(f"--from {record}: no captions in it; give the .jsonl that vlmds caption --out writes")
    records = list(found.values())
    check_one_video(target, {r["video"] for r in records}, record)
    paths = [target.path]
    if target.folder:
        paths = [target.path / name for name in srt_files(records)]
    if not again and target.jsonl.resolve() != record.resolve():
        for path in paths:
            if path.exists():
                raise InputError(f"--out: {path} is there already; --again replaces it")
    write_format(target, records)
    return paths


def check_one_video(target: Target, videos: Collection[str], record: Path) -> None:
    """Raise InputError, naming the command that helps, if the target is one file of subtitles, but
    there are several videos."""
    if target.format == "srt" and not target.folder and len(videos) > 1:
        how = "name a folder and give --format srt"
        if record.is_file():
            folder = target.path.with_suffix("")
            how = "subtitles of what is captioned already: " + shlex.join(
                ["vlmds", "caption", "--from", str(record), "--out", str(folder), "--format", "srt"]
            )
        raise InputError(f"--out {target.path}: is one file, but there are several videos; {how}")


def to_csv(records: Iterable[Record]) -> str:
    """With a byte order mark, without which Excel takes Korean for something else; Python reads it
    as "utf-8-sig", pandas by itself."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(records)
    return "\ufeff" + text.getvalue()


def srt_files(records: Iterable[Record]) -> dict[str, list[Record]]:
    """{name relative to the folder: the captions of one video}; a.mp4 gives a.srt, or a.mp4.srt
    where there is an a.mkv, too. Videos outside a common folder are named by their last part."""
    videos: dict[str, list[Record]] = {}
    for record in records:
        if "caption" in record:
            videos.setdefault(record["video"], []).append(record)
    names: dict[str, list[Record]] = {}
    paths = {video: _relative(video) for video in videos}
    stems = [str(path.with_suffix("")) for path in paths.values()]
    for (video, path), stem in zip(paths.items(), stems):
        base = stem if stems.count(stem) == 1 else str(path)
        name, number = f"{base}.srt", 1
        while name in names:
            number += 1
            name = f"{base}-{number}.srt"
        names[name] = sorted(videos[video], key=lambda record: record["start"])
    return names


def _relative(video: str) -> PurePosixPath:
    path = path_in(video)
    outside = is_url(video) or path.is_absolute() or ".." in path.parts
    return PurePosixPath(path.name or "video") if outside else path


def to_srt(records: Iterable[Record]) -> str:
    """Subtitles, a cue for each caption that is not empty."""
    cues = []
    for record in records:
        lines = wrap(record.get("caption", "").replace("-->", "→"), SRT_COLUMNS)
        if lines:
            cues.append(
                f"{len(cues) + 1}\n{timestamp(record['start'])} --> "
                f"{timestamp(record['end'])}\n" + "\n".join(lines) + "\n"
            )
    return "\n".join(cues)


def timestamp(seconds: float) -> str:
    """HH:MM:SS,mmm"""
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d},{milliseconds % 1000:03d}"


def wrap(text: str, columns: int) -> list[str]:
    """Lines of at most so many terminal columns, broken at spaces, and inside a word that is longer
    than a line."""
    lines, line = [], ""
    for word in text.split():
        if line and width(line) + 1 + width(word) > columns:
            lines.append(line)
            line = ""
        line = f"{line} {word}" if line else word
        while width(line) > columns:
            cut = next(i for i in range(len(line), 0, -1) if width(line[:i]) <= columns)
            lines.append(line[:cut])
            line = line[cut:]
    return [*lines, line] if line else lines


def width(text: str) -> int:
    """Terminal columns: two for a wide character, none for one that combines with the last."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
