"""Caption files of one command in all formats, made with and without the model."""

import csv
import json
import subprocess
import sys

import av
import pytest

from tests.captioning.conftest import SAYINGS
from tests.captioning.test_run import ROOT, WINDOW, lines
from vlmds.captioning.job import caption_to_file
from vlmds.cli import main
from vlmds.errors import InputError
from vlmds.inference.video_captioner import VideoCaptioner


def test_one_record_gives_all_formats_without_the_model(artifact, folder, tmp_path, monkeypatch):
    options = {**WINDOW, "data": str(folder)}
    (folder / "bad.mp4").unlink()
    caption_to_file(artifact, tmp_path / "x.csv", **options)
    rows = lines(tmp_path / "x.jsonl")
    with (tmp_path / "x.csv").open(encoding="utf-8-sig", newline="") as file:
        assert [row["caption"] for row in csv.DictReader(file)] == [r["caption"] for r in rows]
    monkeypatch.setattr(VideoCaptioner, "from_pretrained", None)  # nothing is left to caption
    caption_to_file(artifact, tmp_path / "x.json", **options)
    assert json.loads((tmp_path / "x.json").read_text("utf-8")) == rows
    with pytest.raises(
        InputError,
        match=r"x.srt: is one file, but there are several videos"
        rf".*vlmds caption --from {tmp_path}/x.jsonl --out {tmp_path}/x --format srt",
    ):
        caption_to_file(artifact, tmp_path / "x.srt", **options)


def test_from_a_record_comes_any_format_without_a_model(artifact, folder, tmp_path, monkeypatch, capsys):
    record = tmp_path / "captions.jsonl"
    caption_to_file(artifact, record, data=str(folder), **WINDOW)
    caption_to_file(artifact, tmp_path / "subs", data=str(folder), format="srt", **WINDOW)
    before = record.read_bytes()
    monkeypatch.setattr(VideoCaptioner, "from_pretrained", None)

    def write(out, *more, source=record, code=0):
        capsys.readouterr()
        assert main(["caption", "--from", str(source), "--out", str(tmp_path / out), *more]) == code
        said = capsys.readouterr()
        assert said.err.count("\n") == (code == 2)
        return said.out + said.err

    assert "3 files" in write("new", "--format", "srt")
    for path in (tmp_path / "subs").rglob("*.srt"):
        assert (tmp_path / "new" / path.relative_to(tmp_path / "subs")).read_bytes() == (path.read_bytes())
    write("captions.csv"), write("captions.csv")  # beside its record: its own
    with (tmp_path / "captions.csv").open(encoding="utf-8-sig", newline="") as file:
        assert len([*csv.DictReader(file)]) == len(lines(record))
    # What lies elsewhere may be another record's.
    assert "is there already; --again replaces it" in write("new", "--format", "srt", code=2)
    write("new", "--format", "srt", "--again")
    assert f"--from {record} --out {tmp_path}/captions --format srt" in write("captions.srt", code=2)
    assert "no captions in it" in write("x.csv", source=tmp_path / "captions.csv", code=2)
    assert "no captions in it" in write("x.csv", source=tmp_path / "none.jsonl", code=2)
    assert "choose .json, .csv or .srt" in write("other.jsonl", code=2)
    assert "VIDEO: --from captions nothing" in write("x.csv", "v.mp4", code=2)
    assert "--window: --from captions nothing" in write("x.csv", "--window", "2s", code=2)
    assert record.read_bytes() == before


def test_a_record_is_written_in_another_format_without_pytorch(tmp_path):
    """So that it takes no seconds to start."""
    (tmp_path / "c.jsonl").write_text(
        json.dumps({"id": "a", "video": "a.mp4", "start": 0.0, "end": 1.5, "duration": 1.5, "caption": "가"})
    )
    code = (
        "import sys; from vlmds.captioning.outputs import write_from; "
        f"write_from({str(tmp_path / 'c.jsonl')!r}, {str(tmp_path / 'c.srt')!r}); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert (tmp_path / "c.srt").read_text("utf-8") == ("1\n00:00:00,000 --> 00:00:01,500\n가\n")


def test_subtitles_of_a_folder_and_of_a_video(artifact, folder, tmp_path):
    caption_to_file(artifact, tmp_path / "subs", data=str(folder), format="srt", **WINDOW)
    found = {str(p.relative_to(tmp_path / "subs")) for p in (tmp_path / "subs").rglob("*.srt")}
    assert found == {"a.srt", "b.srt", "c/a.srt"}
    one = tmp_path / "one.srt"
    caption_to_file(artifact, one, videos=[str(folder / "a.mp4")], **WINDOW)
    assert one.read_text("utf-8") == (tmp_path / "subs" / "a.srt").read_text("utf-8")
    with av.open(str(one), format="srt") as container:
        cues = [(p.pts, p.duration, bytes(p).decode().split()) for p in container.demux(subtitles=0) if p.size]
    assert [cue[:2] for cue in cues] == [(1000 * i, 1000) for i in range(4)]
    assert [cue[2][:4] for cue in cues] == [text.split() for text in SAYINGS]
