"""What is captioned, and how it is cut into windows."""

import os

import pytest

from tests.clips import write_manifest
from vlmds.captioning.sources import grouped, parse_seconds, select_items, spans
from vlmds.errors import InputError, SampleError
from vlmds.video.pool import Clip


def test_a_folder_gives_its_videos_in_order_and_counts_the_rest(folder):
    source = select_items((), str(folder))
    assert [item.id for item in source.items] == ["a.mp4", "b.mp4", "bad.mp4", "c/a.mkv"]
    assert source.items[3].clip == Clip(str(folder / "c" / "a.mkv"))
    assert source.skipped == 2


def test_a_file_name_that_is_not_utf8_is_a_problem_of_that_file_alone(folder):
    os.rename(os.fsencode(folder / "b.mp4"), os.fsencode(folder) + b"/\xff.mp4")
    items = select_items((), str(folder)).items
    assert [item.problem for item in items if item.problem] == ["file name is not UTF-8"]
    assert any(item.id == "\\xff.mp4" for item in items)


def test_a_manifest_needs_no_captions_and_keeps_its_bad_rows(tmp_path):
    manifest = write_manifest(
        tmp_path / "m.jsonl",
        [
            {"video": "a.mp4", "start": 1, "end": 2.5, "prompt": "무엇?"},
            {"video": "a.mp4", "start": 3, "end": 2},
            {"id": "z", "video": "https://x/y.mp4"},
        ],
    )
    items = select_items((), str(manifest)).items
    assert [(i.id, i.video, i.prompt) for i in items] == [
        ("a", "a.mp4", "무엇?"),
        ("row 2", "a.mp4", None),
        ("z", "https://x/y.mp4", None),
    ]
    assert items[0].clip == Clip(str(tmp_path / "a.mp4"), 1.0, 2.5)
    assert "is not after start" in items[1].problem


def test_the_same_video_named_twice_is_one_and_spans_have_names_of_their_own():
    videos = ["a.mp4", "a.mp4", Clip("a.mp4", 1.0), Clip("a.mp4", None, 2.5)]
    items = select_items(videos, None).items
    assert [item.id for item in items] == ["a.mp4", "a.mp4#t=1,", "a.mp4#t=0,2.5"]


@pytest.mark.parametrize(
    ("videos", "data", "split", "message"),
    [
        ([], None, None, "give either videos or --data"),
        (["a.mp4"], ".", None, "give either videos or --data"),
        ([], "nowhere", None, "--data nowhere: neither a folder, nor a manifest"),
        ([], "empty", None, "no videos in it \\(1 other files\\)"),
        (["a.mp4"], None, "val", "--split val: only a packed dataset"),
    ],
)
def test_nothing_to_caption_is_bad_input(videos, data, split, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.txt").touch()
    with pytest.raises(InputError, match=message) as caught:
        select_items(videos, data, split)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("clip", "duration", "expected"),
    [
        ((None, None), 60.0, [(0, 30), (30, 60)]),
        ((None, None), 65.0, [(0, 30), (30, 60), (60, 65)]),
        ((None, None), 62.9, [(0, 30), (30, 62.9)]),  # a rest below a tenth joins the last
        ((None, None), 10.0, [(0, 10)]),
        ((None, None), 1.0, [(0, 1)]),
        ((5.0, None), 60.0, [(5, 35), (35, 60)]),
        ((5.0, 41.0), 60.0, [(5, 35), (35, 41)]),
        ((None, 90.0), 60.0, [(0, 30), (30, 60)]),
    ],
)
def test_windows_cover_the_clip_once(clip, duration, expected):
    assert spans(Clip("v", *clip), duration, 30.0) == expected
    whole = spans(Clip("v", *clip), duration, None)
    assert whole == [(expected[0][0], expected[-1][1])]


def test_a_start_past_the_end_is_the_samples_error():
    with pytest.raises(SampleError, match="start past the end: 9 s of 5 s"):
        spans(Clip("v", 9.0), 5.0, None)


def test_a_window_of_nothing_is_refused():
    for window in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="must be 0.1 s or more"):
            spans(Clip("v"), 5.0, window)


def test_only_neighbours_of_full_length_are_read_together():
    todo = [(0, 2), (2, 4), (4, 6), (8, 10), (10, 12), (12, 13)]
    assert list(grouped(todo, 2.0, 2)) == [[(0, 2), (2, 4)], [(4, 6)], [(8, 10), (10, 12)], [(12, 13)]]
    assert list(grouped(todo, None, 9)) == [[span] for span in todo]


def test_lengths_are_written_as_people_do():
    for text, seconds in (
        ("30", 30),
        ("30s", 30),
        ("1m", 60),
        ("1m30s", 90),
        ("1h", 3600),
        ("2.5s", 2.5),
        ("1h1m1s", 3661),
    ):
        assert parse_seconds(text, "--window") == seconds
    for text in ("", "0", "-3", "5x", "1s1m", "nan", "0.01"):
        with pytest.raises(InputError, match="--window"):
            parse_seconds(text, "--window")
