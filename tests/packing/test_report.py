"""`pack_report.html`: its figures, in both languages, and its safety."""

import base64
import hashlib
import html
import io
import re
import shutil
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.clips import write_manifest, write_video
from vlmds.data.index import ShardIndex
from vlmds.errors import InputError
from vlmds.packing import report
from vlmds.packing.pack import pack
from vlmds.packing.report import categories, histogram, write_report

HOSTILE = '</p><script>alert("x")</script><img src=x onerror=alert(1)>'


class Page(HTMLParser):
    """Tags with their attributes, and the text that is visible in one language."""

    def __init__(self, text: str, language: str = "en"):
        super().__init__()
        self.tags, self.text, self.hidden = [], "", False
        self.other = {"en": "ko", "ko": "en"}[language]
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.hidden |= tag == "span" and dict(attrs).get("lang") == self.other

    def handle_endtag(self, tag):
        self.hidden &= tag != "span"

    def handle_data(self, data):
        self.text += "" if self.hidden else data

    def images(self) -> list[Image.Image]:
        found = [a["src"] for tag, a in self.tags if tag == "img"]
        return [Image.open(io.BytesIO(base64.b64decode(src.split(",")[1]))) for src in found]


@pytest.fixture(scope="module", params=["video", "frames"])
def packed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for i in range(3):
        write_video(folder / f"v{i}.mp4", frames=12, fps=(5, 10, 10)[i], width=64 + 32 * (i == 2))
    rows = [
        {"video": "v0.mp4", "caption": HOSTILE},
        {"video": "v1.mp4", "caption": ["가나", "다"]},
        {"video": "v2.mp4", "caption": "라", "split": "val", "start": 0.5},
        {"video": "none.mp4", "caption": "마"},
        {"video": "v2.mp4", "id": "x", "caption": ""},
    ]
    out = folder / "out"
    pack(
        write_manifest(folder / "m.jsonl", rows),
        out,
        store=request.param,
        num_frames=6,
        image_size=32,
        shard_size=2,
        progress=False,
    )
    return out


def test_the_page_has_counts_rejects_and_captions(packed):
    page = Page(write_report(packed).read_text("utf-8"))
    text = re.sub(r"\s+", " ", page.text)
    for part in (
        "samples 3",
        "captions 4",
        "rejected rows 2",
        "file not found 1",
        "empty caption 1",
        "h264 3",
        "64 × 48 2",
        "96 × 48 1",
        HOSTILE,
        "val / v2",
        f"median 1.5, from 1 to {len(HOSTILE)};",
    ):
        assert part in text, part


def test_the_page_in_korean(packed):
    text = re.sub(r"\s+", " ", Page(write_report(packed).read_text("utf-8"), "ko").text)
    for part in ("샘플 3", "제외된 행 2", "파일을 찾을 수 없음 1", "빈 캡션 1", "64 × 48, 1.2초, h264", "중앙값 1.5,"):
        assert part in text, part
    for english in ("samples", "file not found", "median", "Resolution", "frame"):
        assert english not in text[text.index("패킹한 데이터셋") :].split('"use strict"')[0].replace("frames", ""), (
            english
        )


@pytest.mark.parametrize("store", ["video", "frames"])
def test_a_row_with_start_and_end_counts_for_its_span(tmp_path, store):
    """Not for the file that is kept of it."""
    write_video(tmp_path / "v.mp4", frames=40, fps=10)
    rows = [
        {"id": "part", "video": "v.mp4", "caption": "가", "start": 1.0, "end": 1.5},
        {"id": "tail", "video": "v.mp4", "caption": "나", "start": 3.0, "end": 9.0},
        {"id": "all", "video": "v.mp4", "caption": "다"},
    ]
    pack(
        write_manifest(tmp_path / "m.jsonl", rows),
        tmp_path / "out",
        store=store,
        num_frames=2,
        image_size=32,
        progress=False,
    )
    text = re.sub(r"\s+", " ", Page(write_report(tmp_path / "out").read_text("utf-8")).text)
    assert re.findall(r"train / (\w+) 64 × 48, ([\d.]+) s", text) == [
        ("part", "0.5"),
        ("tail", "1.0"),
        ("all", "4.0"),
    ], text
    assert "median 1, from 0.5 to 4;" in text
    assert "of video 6 s" in text, text


def test_the_page_asks_for_nothing_and_runs_its_own_script_alone(packed):
    text = write_report(packed).read_text("utf-8")
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert not {*tags} & {"link", "iframe", "object", "a"} and tags.count("script") == 1
    script = re.search(r"<script>(.*)</script>", text, re.DOTALL)[1]
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{hashed}'"
        in html.unescape(text)
    )
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name == "href" for name in attributes), tag
        assert attributes.get("src", "data:").startswith("data:image/jpeg;base64,") or tag != "img"
    assert "://" not in text and "url(" not in text
    assert "prefers-color-scheme: dark" in text


def test_the_sheet_shows_the_frames(packed):
    page = Page(write_report(packed).read_text("utf-8"))
    images = page.images()
    assert len(images) == 3 * report.SHEET_FRAMES
    assert {image.size for image in images} == {(report.SHEET_SIDE,) * 2}
    first, last = np.asarray(images[0], int), np.asarray(images[3], int)
    # The grey of the square in the upper left corner, below the bar of padding, is the frame's number times 4.
    assert 0 <= first[20:45, 10:40].mean() < last[20:45, 10:40].mean() <= 48


def test_the_bytes_do_not_depend_on_when_and_where(packed, tmp_path):
    before = write_report(packed).read_bytes()
    shutil.copytree(packed, tmp_path / "elsewhere")
    assert write_report(tmp_path / "elsewhere").read_bytes() == before


def test_only_a_bounded_number_of_samples_is_opened(packed, monkeypatch):
    monkeypatch.setattr(report, "CAPTION_ROWS", 2)
    monkeypatch.setattr(report, "SHEET_CLIPS", 1)
    monkeypatch.setattr(report, "CAPTION_SHOWN", 10)
    page = Page(write_report(packed).read_text("utf-8"))
    assert len(page.images()) == report.SHEET_FRAMES
    assert HOSTILE[:10] + "…" in page.text and HOSTILE[:11] not in page.text
    assert "of the captions of 2 evenly spread samples out of 3" in page.text


def test_a_damaged_sample_costs_its_picture_alone(packed, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(packed, copy)
    tar = copy / "val/000000.tar"
    data = bytearray(tar.read_bytes())
    data[530] ^= 255
    tar.write_bytes(data)
    page = Page(write_report(copy).read_text("utf-8"))
    assert len(page.images()) == 2 * report.SHEET_FRAMES
    assert "not shown: val/000000.tar" in page.text


@pytest.mark.parametrize(
    "name, data",
    [
        ("json", b'{"captions": []}'),
        ("mp4", b"v=0\nc=IN IP4 127.0.0.1\nt=0 0\n"),
        *((f"{i}.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 28\n") for i in range(6)),
    ],
)
def test_a_sample_that_is_not_what_a_store_contains_costs_its_picture_alone(packed, monkeypatch, name, data):
    read = ShardIndex.read
    monkeypatch.setattr(
        ShardIndex,
        "read",
        lambda index, row: {k: data if k == name and row.key == "v1" else v for k, v in read(index, row).items()},
    )
    shown = len(Page(write_report(packed).read_text("utf-8")).images())
    asked = any(member.ext == name for member in ShardIndex.open(packed).row("train", 0, 1).members)
    asked = asked and name not in ("1.jpg", "4.jpg")  # of six, four are shown
    assert shown == (2 if asked else 3) * report.SHEET_FRAMES


def test_no_dataset_no_page(tmp_path):
    with pytest.raises(InputError, match="dataset.json"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


@given(st.lists(st.floats(0, 1e6) | st.integers(0, 400).map(float), min_size=1), st.booleans())
def test_a_histogram_loses_no_value(values, whole):
    if whole:
        values = [float(round(v)) for v in values]
    chart = histogram("x", np.array(values), whole)
    assert sum(bar.count for bar in chart.bars) == len(values)
    assert 1 <= len(chart.bars) <= report.MOST_BINS
    assert max(bar.share for bar in chart.bars) == 1


def test_histogram_limits():
    assert [(b.label, b.count) for b in histogram("x", np.array([3.0, 3, 5]), True).bars] == [
        ("3", 2),
        ("4", 0),
        ("5", 1),
    ]
    bars = histogram("x", np.array([0.0] * 500 + [240.0] * 500 + [9000.0])).bars
    assert bars[0].label == "0 – 10" and bars[0].count == 500
    assert bars[-1].label == "≥ 230" and bars[-1].count == 501
    ticks = histogram("x", np.array([0.0] * 500 + [240.0] * 500 + [9000.0])).ticks
    assert ticks[0] == (0.0, "0") and ticks[-1][1] == "≥ 230" and len(ticks) <= 6
    assert histogram("x", np.array([3.0, 3, 5]), True).ticks == [(100 * (i + 0.5) / 3, str(3 + i)) for i in range(3)]


def test_categories_sum_up_the_rest():
    counts = Counter({f"{i:02d}": 20 - i for i in range(20)})
    bars = categories("x", counts).bars
    assert [b.label for b in bars[:2]] == ["00", "01"]
    assert (bars[-1].label, bars[-1].korean) == ("8 others", "그 외 8가지")
    assert bars[-1].count == sum(20 - i for i in range(12, 20))
