"""Caption files: the formats, and the JSONL in which captions are collected.

    captions.jsonl           all captions: one line each, written as it is made
    captions.settings.json   the settings they were made with
    captions.jsonl.00001 …   captions of other ranks; removed when the command is done
    captions.csv, .json, .srt   written from captions.jsonl at the end, whole or not at all

A line has "id", "video", "start", "end", "duration" (seconds) and "caption", or "error" in its
place; "prompt", if the video has its own.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import shlex
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from vlmds.errors import InputError
from vlmds.files import is_url, path_in, write
from vlmds.permissions import check_writable
from vlmds.runs.rank_jsonl import Appender, RankJsonl, Record

if TYPE_CHECKING:  # it imports PyTorch
    from vlmds.captioning.sources import Item
    from vlmds.captioning.windows import Span

FORMATS = ("jsonl", "json", "csv", "srt")
RECORD = frozenset(("id", "video", "start", "end"))  # fields of every line
CSV_COLUMNS = ("id", "video", "start", "end", "duration", "prompt", "caption", "error")
SRT_COLUMNS = 42  # of a subtitle's line; a Hangul syllable takes two


@dataclass(frozen=True)
class CaptionPaths:
    """Where captions are written. path: the file, or for subtitles of several videos the folder."""

    format: str
    path: Path
    jsonl: Path
    settings: Path

    @property
    def folder(self) -> bool:
        return self.format == "srt" and self.path.suffix.lower() != ".srt"


def find_paths(out: str | Path, format: str | None = None) -> CaptionPaths:
    """The paths that ``--out`` and ``--format`` mean; without a format, the suffix decides.

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
    format = format or known or ""
    if format == "srt" and not known:
        base = path / "captions"
    else:
        base = path.with_suffix("") if known else path
    return CaptionPaths(format, path, Path(f"{base}.jsonl"), Path(f"{base}.settings.json"))


class CaptionFile:
    """The file in which captions are collected, and which a stopped command goes on with. Use as a
    context manager, which keeps other commands off."""

    def __init__(self, paths: CaptionPaths):
        self.paths = paths
        self._lines = RankJsonl(paths.jsonl, f"{paths.jsonl.name}.")
        self._locks: list[IO] = []

    def begin(self, settings: dict[str, Any], again: bool) -> list[Record]:
        """Prepare the file, on one rank; returns the captions that are there already.

        Raises:
            InputError: made with other settings, or by another program; or another command is
                writing to it.
        """
        paths = self.paths
        check_writable(paths.settings.parent, "--out", (paths.settings.name, paths.jsonl.name))
        if paths.settings.is_file():
            self._lock()
            if again:
                self._lines.remove()
            else:
                self._check(settings)
        else:
            found = [p for p in (paths.jsonl, paths.path) if p.is_file()]
            if paths.folder:
                found += sorted(paths.path.rglob("*.srt"))[:1]
            if found:
                raise InputError(
                    f"{found[0]}: was not made by vlmds caption (there is no {paths.settings}); choose another --out"
                )
        try:
            write(paths.settings, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise InputError(f"--out {paths.path}: cannot be written: {error.strerror}") from None
        self._lock()  # writing has put a new file in the old one's place
        return [record for record in self.read() if "caption" in record]

    def _lock(self) -> None:
        """Two commands that write to one file would lose captions."""
        file = self.paths.settings.open("r+")
        self._locks.append(file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{self.paths.jsonl}: another vlmds caption is writing to it; "
                "wait until it is done, or choose another --out"
            ) from None
        except OSError:
            pass  # a file system without locks

    def __enter__(self) -> CaptionFile:
        return self

    def __exit__(self, *_) -> None:
        for file in self._locks:
            file.close()

    def _check(self, settings: dict[str, Any]) -> None:
        from vlmds.experiments.differences import changed_settings

        path = self.paths.settings
        try:
            changed = changed_settings(json.loads(path.read_text(encoding="utf-8")), settings)
        except ValueError:
            raise InputError(f"{path}: damaged; --again starts over") from None
        if changed:
            raise InputError(
                f"{self.paths.jsonl}: was made with other settings "
                f"({'; '.join(changed.values())}); choose another --out, or start over with --again"
            )

    def keep(self, records: Iterable[Record]) -> None:
        """Make these the only records. Removes the other ranks' files."""
        self._lines.replace(records)

    def read(self) -> list[Record]:
        """All ranks' records; a line that a kill cut short is left out."""
        return self._lines.read()

    def appender(self, rank: int) -> Appender:
        return self._lines.appender(rank)


def in_order(records: Iterable[Record], items: Sequence[Item]) -> tuple[list[Record], list[Record]]:
    """(records of the items, in their order and by time; records of other videos). Of two records of
    the same span, the later one counts."""
    by_id: dict[str, dict[Span, Record]] = {}
    for record in records:
        by_id.setdefault(record["id"], {})[record["start"], record["end"]] = record
    asked = []
    for item in items:
        found = by_id.pop(item.id, {})
        # An unreadable video has no times.
        asked += [found[span] for span in sorted(found, key=lambda s: s[0] or 0.0)]
    return asked, [record for found in by_id.values() for record in found.values()]


def write_format(paths: CaptionPaths, records: Sequence[Record]) -> None:
    """Write the records in a format other than JSONL."""
    if paths.format == "json":
        write(paths.path, json.dumps(records, indent=2, ensure_ascii=False) + "\n")
    elif paths.format == "csv":
        write(paths.path, to_csv(records))
    elif paths.folder:
        for name, cues in srt_files(records).items():
            write(paths.path / name, to_srt(cues))
    elif paths.format == "srt":
        write(paths.path, to_srt(records))


def write_from(record: str | Path, out: str | Path, format: str | None = None, again: bool = False) -> list[Path]:
    """Write the captions of a .jsonl in another format, without a model; returns
    the files written.

    Args:
        record: the .jsonl beside what :func:`vlmds.caption_to_file` wrote.
        out, format: as there. again: replace existing files of other captions.

    Raises:
        InputError: no captions, one .srt for several videos, or existing files.
    """
    paths, record = find_paths(out, format), Path(record)
    if paths.format == "jsonl":
        raise InputError(
            f"--out {out}: the captions are in {record} as JSONL; choose .json, .csv or .srt, or --format srt"
        )
    source = CaptionFile(CaptionPaths("jsonl", record, record, record.with_suffix(".settings.json")))
    found = {(r["id"], r["start"], r["end"]): r for r in source.read() if {*r} >= RECORD}
    if not found:
        raise InputError(f"--from {record}: no captions in it; give the .jsonl that vlmds caption --out writes")
    records = list(found.values())
    check_one_video(paths, {r["video"] for r in records}, record)
    files = written_files(paths, records)
    if not again and paths.jsonl.resolve() != record.resolve():
        for path in files:
            if path.exists():
                raise InputError(f"--out: {path} is there already; --again replaces it")
    write_format(paths, records)
    return files


def written_files(paths: CaptionPaths, records: Sequence[Record]) -> list[Path]:
    """The files that :func:`write_format` writes."""
    return [paths.path / name for name in srt_files(records)] if paths.folder else [paths.path]


def check_one_video(paths: CaptionPaths, videos: Collection[str], record: Path) -> None:
    """Raise InputError, naming the command that helps, if the output is one file of subtitles, but
    there are several videos."""
    if paths.format == "srt" and not paths.folder and len(videos) > 1:
        how = "name a folder and give --format srt"
        if record.is_file():
            folder = paths.path.with_suffix("")
            how = "subtitles of these captions: " + shlex.join(
                ["vlmds", "caption", "--from", str(record), "--out", str(folder), "--format", "srt"]
            )
        raise InputError(f"--out {paths.path}: is one file, but there are several videos; {how}")


def to_csv(records: Iterable[Record]) -> str:
    """With a byte order mark, which Excel needs to read Korean; in Python the encoding is
    "utf-8-sig", and pandas detects it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(records)
    return "\ufeff" + text.getvalue()


def srt_files(records: Iterable[Record]) -> dict[str, list[Record]]:
    """{name relative to the folder: the captions of one video}; a.mp4 gives a.srt, or a.mp4.srt
    if there is an a.mkv too. Videos outside a common folder are named by their last part."""
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
    """Subtitles with a cue for each caption that is not empty."""
    cues: list[str] = []
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
    """Lines of at most ``columns`` terminal columns, broken at spaces, or inside a word that is longer
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
    """Terminal columns: two for a wide character, none for a combining one."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
