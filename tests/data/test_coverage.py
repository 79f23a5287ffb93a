"""Messages about the edges that are cropped away and the time between frames."""

import pytest

from tests.clips import write_manifest, write_video
from vlmds.cli import main
from vlmds.data.coverage import coverage_lines
from vlmds.data.index import ShardIndex
from vlmds.packing.pack import pack


@pytest.fixture
def packed(tmp_path):
    """Of a second each: one square, two landscape (a quarter and a half lost), one portrait; and
    of 40 s one whole, one by a span of 20 s, and one by a span of 10 s."""
    rows = []
    for name, width, height in (("a", 64, 64), ("b", 64, 48), ("c", 96, 48), ("d", 48, 64)):
        write_video(tmp_path / f"{name}.mp4", frames=10, width=width, height=height)
        rows.append({"video": f"{name}.mp4", "caption": name})
    write_video(tmp_path / "long.mp4", frames=40, fps=1, width=64, height=64)
    for number, span in enumerate(({}, {"start": 10, "end": 30}, {"start": 30})):
        rows.append({"id": f"long{number}", "video": "long.mp4", "caption": "long", **span})
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    pack(manifest, tmp_path / "out", progress=False, verify=False, shard_size=3)
    return tmp_path / "out"


def test_cropped_and_sparsely_sampled_clips_are_counted(packed):
    index = ShardIndex.open(packed)
    assert coverage_lines([index], 8, "crop") == [
        "centre crop: 2 landscape clips lose 38% of the picture, 1 portrait clip loses 25% of the picture",
        "sampling: 2 clips longer than 16 s get 8 frames, one every 3.8 s (median; 5.0 s in the longest)",
    ]
    assert coverage_lines([index], 8) == coverage_lines([index], 8, "crop")[1:]  # by default nothing is cut
    assert coverage_lines([index, index], 16, "crop")[1] == (
        "sampling: 2 clips longer than 32 s get 16 frames, one every 2.5 s (median; 2.5 s in the longest)"
    )
    assert len(coverage_lines([index], 20, "crop")) == 1


def test_nothing_is_said_where_nothing_is_lost(tmp_path):
    write_video(tmp_path / "v.mp4", frames=10, width=64, height=64)
    manifest = write_manifest(tmp_path / "m.jsonl", [{"video": "v.mp4", "caption": "v"}])
    pack(manifest, tmp_path / "out", progress=False)
    assert coverage_lines([ShardIndex.open(tmp_path / "out")]) == []


def test_pack_and_its_report_and_plan_say_it(tmp_path, capsys):
    write_video(tmp_path / "tall.mp4", frames=34, fps=1, width=36, height=64)
    manifest = write_manifest(tmp_path / "m.jsonl", [{"video": "tall.mp4", "caption": "tall"}])
    lines = [
        "centre crop: 1 portrait clip loses 44% of the picture",
        "sampling: 1 clip longer than 16 s gets 8 frames, one every 4.2 s (median; 4.2 s in the longest)",
    ]
    out = tmp_path / "out"
    assert main(["pack", str(manifest), str(out), "--no-verify"]) == 0
    page = (out / "pack_report.html").read_text()
    said = capsys.readouterr().out
    assert main(["plan", "--exp", "e7", "--data", str(out)]) == 0
    planned = capsys.readouterr().out
    assert lines[1] in said and lines[1] in page and lines[1] in planned
    assert not any("crop:" in text for text in (said, page, planned))
    assert main(["plan", "--exp", "e7", "--data", str(out), "--set", "data.fit=crop"]) == 0
    assert lines[0] in capsys.readouterr().out
    frames = tmp_path / "frames"
    assert main(["pack", str(manifest), str(frames), "--store", "frames", "--fit", "crop", "--image-size", "32"]) == 0
    for text in (capsys.readouterr().out, (frames / "pack_report.html").read_text()):
        assert lines[0] in text and lines[1] in text
    # 32 frames are a second apart.
    assert main(["plan", "--exp", "e7", "--data", str(out), "--set", "data.num_frames=32"]) == 0
    assert "sampling:" not in capsys.readouterr().out
