"""Formats of captions."""

import csv
import io

import pytest

from vlmds.captioning.outputs import CaptionFile, find_paths, srt_files, timestamp, to_csv, to_srt, width, wrap
from vlmds.errors import InputError


def record(video, start=0.0, end=1.0, **more):
    return {
        "id": video,
        "video": video,
        "start": start,
        "end": end,
        "duration": 9.0,
        **({} if "error" in more else {"caption": "네"}),
        **more,
    }


def test_subtitles_have_times_and_lines_that_players_can_show():
    caption = "한 남자가 공원에서 강아지와 산책하고 있습니다.\n\n날씨가 --> 맑습니다."
    text = to_srt(
        [
            record("a", 0, 1.5, caption=caption),
            record("a", 1.5, 3, caption=" "),
            record("a", 3, 3601.0625, caption="끝"),
        ]
    )
    assert text == (
        "1\n00:00:00,000 --> 00:00:01,500\n한 남자가 공원에서 강아지와 산책하고\n"
        "있습니다. 날씨가 → 맑습니다.\n\n2\n00:00:03,000 --> 01:00:01,062\n끝\n"
    )
    assert timestamp(59.9996) == "00:01:00,000" and timestamp(360000) == "100:00:00,000"


def test_lines_are_broken_at_spaces_and_never_too_long():
    assert wrap("가나 다라 마바", 9) == ["가나 다라", "마바"]
    assert wrap("가나다라마바사 아", 6) == ["가나다", "라마바", "사 아"]
    assert wrap(" \n ", 6) == [] and width("e\u0301가a") == 4


def test_csv_opens_in_excel_and_comes_back():
    rows = [record('가, "나".mp4', caption="줄\n바꿈, 쉼표"), record("b", error="bad")]
    data = to_csv(rows).encode()
    assert data.startswith(b"\xef\xbb\xbfid,video,start")
    back = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline="")))
    assert (back[0]["video"], back[0]["caption"]) == (rows[0]["video"], rows[0]["caption"])
    assert (back[1]["caption"], back[1]["error"]) == ("", "bad")


def test_each_video_has_subtitles_under_a_name_that_no_other_has():
    names = srt_files(
        [
            record("x/a.mp4", 5, 6),
            record("x/a.mp4", 0, 5),
            record("b.mp4"),
            record("b.mkv"),
            record("/else/c.mp4"),
            record("../c.mov"),
            record("https://h/d.mp4?x=/1"),
            record("e.mp4", error="bad"),
        ]
    )
    assert list(names) == ["x/a.srt", "b.mp4.srt", "b.mkv.srt", "c.mp4.srt", "c.mov.srt", "d.srt"]
    assert [r["start"] for r in names["x/a.srt"]] == [0, 5]
    assert list(srt_files([record("/p/a.mp4"), record("/q/a.mp4")])) == ["a.mp4.srt", "a.mp4-2.srt"]


@pytest.mark.parametrize(
    ("out", "format", "message"),
    [
        ("captions", None, "end the name with .jsonl, .json, .csv, .srt, or give --format"),
        ("captions.csv", "srt", "--format srt: --out captions.csv is of another format"),
        ("s3://x/y.jsonl", None, "must be a local path"),
    ],
)
def test_a_target_that_cannot_be_is_refused(out, format, message):
    with pytest.raises(InputError, match=message):
        find_paths(out, format)


def test_captions_of_one_name_are_collected_in_one_file():
    for out, format, path, jsonl in (
        ("d/x.csv", None, "d/x.csv", "d/x.jsonl"),
        ("x", "json", "x", "x.jsonl"),
        ("x.y.srt", None, "x.y.srt", "x.y.jsonl"),
        ("d", "srt", "d", "d/captions.jsonl"),
    ):
        paths = find_paths(out, format)
        assert (str(paths.path), str(paths.jsonl)) == (path, jsonl)
        assert paths.folder == (out == "d")


def test_lines_with_any_character_come_back_and_half_a_line_does_not(tmp_path):
    file = CaptionFile(find_paths(tmp_path / "x.jsonl"))
    rows = [record("a", caption="줄\u2028\u0085\x0b바꿈"), record("b")]
    with file.appender(0) as appender:
        appender.add(rows)
    with file.appender(3) as appender:
        appender.add([record("c")])
    with file.paths.jsonl.open("a") as torn:
        torn.write('{"id": "d", "cap')
    with file.appender(0) as appender:  # after the half line
        appender.add([record("e")])
    assert file.read() == [*rows, record("e"), record("c")]
    file.keep(file.read())
    assert file.read() == [*rows, record("e"), record("c")] and len(list(tmp_path.iterdir())) == 1
