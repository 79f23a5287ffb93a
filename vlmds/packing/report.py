"""Report of a packed dataset: `pack_report.html` beside the shards, in English and Korean.

One file that loads nothing from the network. Its bytes depend on the dataset only: it contains no
date and no folder name. Columns come from the index; captions and pictures come from the shards, and
are read for a bounded number of samples.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from vlmds.console.text import size_text
from vlmds.data.coverage import coverage_lines
from vlmds.data.index import SampleRow, ShardIndex
from vlmds.data.stored import decode_stored, pixels_of, read_description, read_jpeg
from vlmds.errors import SampleError
from vlmds.files import write
from vlmds.packing.korean import REASONS
from vlmds.packing.near_duplicates import near_duplicate_lines
from vlmds.pages.render import Text, policy, render, source
from vlmds.video.fit import fit_of
from vlmds.video.jpeg import data_uri
from vlmds.video.pool import DecodePool
from vlmds.video.sampling import is_still

NAME = "pack_report.html"
CAPTION_ROWS = 2000  # samples whose captions are read
CAPTION_SHOWN = 500  # characters
SHEET_CLIPS = 24
SHEET_FRAMES = 4
SHEET_SIDE = 112  # pixels
SHEET_DEADLINE = 30.0  # seconds that the decoding of one clip of the sheet may take
MOST_BINS, MOST_BARS = 24, 12
KOREAN = {  # titles of charts
    "Duration, seconds": "길이(초)",
    "Frames per second": "초당 프레임 수",
    "Caption length, characters": "캡션 길이(글자 수)",
    "Codec": "코덱",
    "Resolution": "해상도",
}


@dataclass(frozen=True)
class Bar:
    """One bar of a chart. share: of the longest bar, 0 … 1. korean: the label in Korean."""

    label: str
    count: int
    share: float
    korean: str


@dataclass(frozen=True)
class Chart:
    """A histogram. columns: bars side by side, ordered by a quantity; otherwise categories, one per
    line. summary, note (what the chart leaves out): in English and Korean. ticks: (place in percent of the width,
    label) of the axis below columns."""

    title: str
    columns: bool
    bars: list[Bar]
    summary: Text = ("", "")
    note: Text = ("", "")
    ticks: Sequence[tuple[float, str]] = ()

    @property
    def most(self) -> int:
        return max(bar.count for bar in self.bars)


@dataclass(frozen=True)
class SheetClip:
    """An entry of the contact sheet. images: data URIs, none where `problem` says why."""

    key: str
    split: str
    caption: str
    facts: Text
    images: list[str]
    problem: str = ""


def write_report(out: Path) -> Path:
    """Write `pack_report.html` into the packed dataset `out` and return its path.

    Raises InputError if `out` contains no readable dataset.
    """
    index = ShardIndex.open(out)
    with (out / "index.parquet").open("rb") as file:
        table = pq.read_table(
            file,
            columns=[
                "num_captions",
                "frames",
                "duration",
                "start",
                "end",
                "fps",
                "width",
                "height",
                "codec",
                "decoder",
            ],
        )
    seconds = span_seconds(table)
    reasons = _reject_reasons(out / "ledger.jsonl")
    lengths, caption_rows = _caption_lengths(index)
    total = table.num_rows
    of_all = (
        f"of the captions of {caption_rows:,} evenly spread samples out of {total:,}",
        f"전체 {total:,}개 중 고르게 뽑은 샘플 {caption_rows:,}개의 캡션",
    )
    charts = [
        histogram("Duration, seconds", seconds),
        histogram("Frames per second", table["fps"].to_numpy()),
        histogram(
            "Caption length, characters",
            np.array(lengths, np.float64),
            whole=True,
            note=of_all if caption_rows < total else ("", ""),
        ),
        categories("Codec", Counter(_counts(table["codec"]))),
        categories("Resolution", Counter(_resolutions(table))),
    ]
    script = source("vlmds.pages", "switch.js")
    page = render(
        "vlmds.packing",
        "report.html.j2",
        title=("Packed dataset", "패킹한 데이터셋"),
        policy=policy(script),
        scripts=[script],
        facts=_facts(index, table, float(np.nansum(seconds))),
        splits=_splits(index),
        charts=charts,
        rejects=categories("", reasons, most=len(reasons) or 1, korean=REASONS).bars,
        rejected=index.meta["rejected"],
        unseen={"en": coverage_lines([index]), "ko": coverage_lines([index], korean=True)},
        near={"en": near_duplicate_lines(out), "ko": near_duplicate_lines(out, korean=True)},
        korean=KOREAN,
        clips=_contact_sheet(index),
        total=total,
        fingerprint=index.fingerprint,
    )
    write(out / NAME, page)
    return out / NAME


def span_seconds(table: pa.Table) -> np.ndarray:
    """float [N]: how long each sample is, which is less than its video's duration where the row has
    a start or an end; see :attr:`SampleRow.span`."""
    duration = table["duration"]
    end = pc.min_element_wise(pc.coalesce(table["end"], duration), duration)
    return pc.subtract(end, pc.fill_null(table["start"], 0.0)).to_numpy()


def histogram(title: str, values: np.ndarray, whole: bool = False, note: Text = ("", "")) -> Chart:
    """Equal bins with round limits; values above the 99th percentile are in the last bin.

    values: float [N]. whole: the values are integers, so no bin is narrower than 1.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        return Chart(title, True, [], note=("no values", "값 없음"))
    low, high = float(values.min()), float(np.quantile(values, 0.99, method="higher"))
    step = _round_step((high - low) / MOST_BINS, whole)
    first = math.floor(low / step)
    bins = min(math.floor(high / step) - first + 1, MOST_BINS)
    # The division may miss a limit by a rounding error, 0.3 / 0.1 for one.
    place = np.floor(values / step + 1e-9).astype(np.int64) - first
    cut = bool(place.max() >= bins)
    counts = np.bincount(np.clip(place, 0, bins - 1), minlength=bins)
    labels = [f"{(first + i) * step:g} – {(first + i + 1) * step:g}" for i in range(bins)]
    if whole and step == 1:
        labels = [f"{first + i:g}" for i in range(bins)]
    if cut:
        labels[-1] = f"≥ {(first + bins - 1) * step:g}"
    median, least, largest = (f"{value:.4g}" for value in (np.median(values), values.min(), values.max()))
    summary = (
        f"median {median}, from {least} to {largest}; the highest column is {counts.max():,}",
        f"중앙값 {median}, 범위 {least} ~ {largest}, 가장 높은 막대 {counts.max():,}",
    )
    edges = [f"{(first + i) * step:g}" for i in range(bins + 1)]
    ticks = _ticks(edges, centred=whole and step == 1, cut=cut)
    return Chart(title, True, _bars(zip(labels, counts.tolist())), summary, note, ticks)


def _ticks(edges: list[str], centred: bool, cut: bool) -> list[tuple[float, str]]:
    """About five labels below the columns, whose limits are `edges`. centred: each column is one number. cut: the
    last column has all larger values."""
    bins = len(edges) - 1
    last = bins - 1 if centred or cut else bins
    every = max(1, math.ceil(last / 5))
    # The last limit is always labelled, and those just before it are not.
    chosen = [i for i in range(0, last, every) if last - i >= every / 2] + [last]
    shift = 0.5 if centred else 0.0
    return [(100 * (i + shift) / bins, f"≥ {edges[i]}" if cut and i == bins - 1 else edges[i]) for i in chosen]


def categories(
    title: str, counts: Counter[str], most: int = MOST_BARS, korean: Mapping[str, str] = MappingProxyType({})
) -> Chart:
    """A bar for each of the most frequent categories, and one for all others. korean: of categories."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown, others = ordered[:most], ordered[most:]
    if others:
        rest = f"{len(others):,} others"
        shown.append((rest, sum(count for _, count in others)))
        korean = {**korean, rest: f"그 외 {len(others):,}가지"}
    return Chart(title, False, _bars(shown, korean))


def _bars(counts: Iterable[tuple[str, int]], korean: Mapping[str, str] = MappingProxyType({})) -> list[Bar]:
    pairs = list(counts)
    longest = max((count for _, count in pairs), default=0) or 1
    return [Bar(label, count, count / longest, korean.get(label, label)) for label, count in pairs]


def _round_step(least: float, whole: bool) -> float:
    """The smallest of 1, 2, 5 × a power of ten that is at least `least` (1 for whole numbers)."""
    if whole:
        least = max(least, 1.0)
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= least * (1 - 1e-9))


def _facts(index: ShardIndex, table: pa.Table, seconds: float) -> list[tuple[Text, str | Text]]:
    """Label and value of each tile at the top. seconds: total length of the samples."""
    shards = index.meta["shards"]
    size = sum(shard["bytes"] for shard in shards)
    hours, whole = f"{seconds / 3600:,.1f}", f"{seconds:,.0f}"
    facts: list[tuple[Text, str | Text]] = [
        (("samples", "샘플"), f"{table.num_rows:,}"),
        (("captions", "캡션"), f"{pc.sum(table['num_captions']).as_py():,}"),
        (("rejected rows", "제외된 행"), f"{index.meta['rejected']:,}"),
        (("store", "저장 방식"), index.store),
        (("shards", "샤드"), f"{len(shards):,}"),
        (("total size", "전체 크기"), size_text(size)),
        (("size per sample", "샘플당 크기"), size_text(size / max(table.num_rows, 1))),
        (
            ("length of video", "영상 길이"),
            (f"{hours} h", f"{hours}시간") if seconds >= 3600 else (f"{whole} s", f"{whole}초"),
        ),
    ]
    if stills := sum(map(is_still, table["frames"].to_pylist())):
        facts.append((("still pictures", "정지 이미지"), f"{stills:,}"))
    if index.meta.get("num_frames"):
        facts.append((("frames per clip", "클립당 프레임"), str(index.meta["num_frames"])))
    if index.meta.get("image_size"):
        facts.append((("frame side", "프레임 한 변"), f"{index.meta['image_size']} px"))
    if index.store != "video":
        resizer = index.meta["resizer"]
        facts.append((("fit to the square", "정사각형 맞춤"), fit_of(resizer) or resizer))
    if index.store == "video":
        decoders = _counts(table["decoder"])
        facts.append(
            (("decoded by", "디코더"), ", ".join(f"{name} {count:,}" for name, count in sorted(decoders.items())))
        )
    return facts


def _splits(index: ShardIndex) -> list[tuple[str, int, int, str]]:
    """(name, samples, shards, bytes) of each split."""
    return [
        (
            split,
            index.count(split),
            len(index.shards(split)),
            size_text(sum(shard.bytes for shard in index.shards(split))),
        )
        for split in index.splits
    ]


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {str(pair["values"]): pair["counts"] for pair in pc.value_counts(column).to_pylist()}


def _resolutions(table: pa.Table) -> dict[str, int]:
    grouped = table.group_by(["width", "height"]).aggregate([([], "count_all")])
    return {f"{row['width']} × {row['height']}": row["count_all"] for row in grouped.to_pylist()}


def _reject_reasons(ledger: Path) -> Counter[str]:
    """Rejected rows by the fixed phrase that their reason starts with."""
    counts: Counter[str] = Counter()
    if ledger.is_file():
        with ledger.open(encoding="utf-8") as file:
            counts.update(json.loads(line)["reason"].split(":")[0] for line in file)
    return counts


def spread(index: ShardIndex, most: int) -> list[SampleRow]:
    """At most `most` samples, evenly spread over all splits and shards."""
    places = [
        (split, position, shard.count) for split in index.splits for position, shard in enumerate(index.shards(split))
    ]
    ends = np.cumsum([count for _, _, count in places])
    total = int(ends[-1])
    chosen = np.unique(np.linspace(0, total - 1, min(most, total)).round().astype(np.int64))
    rows = []
    for sample in chosen.tolist():
        at = int(np.searchsorted(ends, sample, side="right"))
        split, position, count = places[at]
        rows.append(index.row(split, position, sample - int(ends[at]) + count))
    return rows


def _captions(index: ShardIndex, row: SampleRow) -> list[str]:
    """Read without the sample's (large) other members. Raises SampleError."""
    only = tuple(member for member in row.members if member.ext == "json")
    return read_description(index.read(replace(row, members=only)))["captions"]


def _caption_lengths(index: ShardIndex) -> tuple[list[int], int]:
    """Characters of each caption of at most CAPTION_ROWS samples, and the number of samples."""
    lengths, rows = [], 0
    for row in spread(index, CAPTION_ROWS):
        try:
            captions = _captions(index, row)
        except SampleError:
            continue  # damaged since it was packed; training reports it
        rows += 1
        lengths += [len(caption) for caption in captions]
    return lengths, rows


def _contact_sheet(index: ShardIndex) -> list[SheetClip]:
    rows = spread(index, SHEET_CLIPS)
    pictures = _video_pictures if index.store == "video" else _stored_pictures
    clips = []
    for row, found in zip(rows, pictures(index, rows), strict=True):
        try:
            caption = _captions(index, row)[0]
            if len(caption) > CAPTION_SHOWN:
                caption = caption[:CAPTION_SHOWN] + "…"
        except SampleError as error:
            caption, found = "", error
        images, problem = ([], str(found)) if isinstance(found, SampleError) else (found, "")
        start, end = row.span
        facts = (
            f"{row.width} × {row.height}, {end - start:.1f} s, {row.codec}",
            f"{row.width} × {row.height}, {end - start:.1f}초, {row.codec}",
        )
        clips.append(SheetClip(row.key, row.split, caption, facts, images, problem))
    return clips


def _stored_pictures(index: ShardIndex, rows: Sequence[SampleRow]) -> list[list[str] | SampleError]:
    """A few of the JPEGs of each sample, made small; none from a features store."""
    results: list[list[str] | SampleError] = []
    for row in rows:
        numbers = _evenly(sum(member.ext.endswith(".jpg") for member in row.members))
        names = {f"{number}.jpg" for number in numbers}
        wanted = tuple(member for member in row.members if member.ext in names)
        try:
            data = index.read(replace(row, members=wanted))
            results.append([data_uri(_small(read_jpeg(data, i, index.meta["image_size"]))) for i in numbers])
        except SampleError as error:
            results.append(error)
    return results


def _video_pictures(index: ShardIndex, rows: Sequence[SampleRow]) -> list[list[str] | SampleError]:
    """A few frames of each video, decoded by child processes with a deadline."""
    results: list[list[str] | SampleError] = []
    with DecodePool(min(len(rows), len(os.sched_getaffinity(0))), SHEET_DEADLINE) as pool:
        for reply in decode_stored(index, rows, pool, store="pixels", num_frames=SHEET_FRAMES, image_size=SHEET_SIDE):
            frames = pixels_of(reply, SHEET_SIDE)
            if isinstance(frames, SampleError):
                results.append(frames)
            else:
                results.append([data_uri(_small(frame)) for frame in frames])
    return results


def _evenly(count: int) -> list[int]:
    """At most SHEET_FRAMES of the numbers below `count`, at the centres of equal spans."""
    wanted = min(SHEET_FRAMES, count)
    return [int((i + 0.5) * count / wanted) for i in range(wanted)]


def _small(frame: np.ndarray) -> np.ndarray:
    """uint8 [3, S, S] -> [3, SHEET_SIDE, SHEET_SIDE]"""
    image = Image.fromarray(frame.transpose(1, 2, 0))
    return np.asarray(image.resize((SHEET_SIDE, SHEET_SIDE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
