"""The videos to caption, from each kind of source."""

import os

import pytest

from tests.clips import write_manifest
from vlmds.captioning.sources import select_items
from vlmds.errors import InputError
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
