"""Checkpoints: when they are written, and which are kept."""

import json
import math
import os

import pytest

from vlmds.runs.journal import Journal
from vlmds.training import checkpoint


def make(root, step, score):
    folder = root / checkpoint.checkpoint_name("align", step)
    folder.mkdir(parents=True)
    (folder / "checkpoint.json").write_text(json.dumps({"state": {"score": score}}))
    return folder


def left(root):
    return [int(path.name.removeprefix("align-")) for path in checkpoint.checkpoints(root, "align")]


@pytest.mark.parametrize(
    "scores, expected",
    [
        ([-3.0, -1.0, -2.0, -2.5], [800, 600, 400]),
        ([math.nan, -1.0, -2.0, -3.0], [800, 600, 400]),  # which is no score
        ([None, None, None, None], [800, 600]),
    ],
)
def test_the_newest_and_the_best_stay(tmp_path, scores, expected):
    for step, score in zip((200, 400, 600, 800), scores, strict=True):
        make(tmp_path, step, score)
    checkpoint.prune(tmp_path, "align", 2)
    assert left(tmp_path) == expected


def test_a_damaged_checkpoint_goes_when_it_is_old(tmp_path):
    for step in (200, 400, 600):
        make(tmp_path, step, -float(step))
    (tmp_path / "align-0000200" / "checkpoint.json").write_text("{")
    checkpoint.prune(tmp_path, "align", 1)
    assert left(tmp_path) == [600, 400]


def test_a_checkpoint_without_another_nodes_file_gets_no_name(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARED_SECONDS", 0.0)
    folder = tmp_path / "align-0000200"
    temporary = checkpoint.temporary_name(folder)
    temporary.mkdir()
    (temporary / "rank-00000.safetensors").write_bytes(b"123")
    entries = [{"file": f"rank-0000{rank}.safetensors", "bytes": 3, "sha256": ""} for rank in (0, 1)]
    with pytest.raises(OSError, match="rank-00001.safetensors is not in .* that all nodes share"):
        checkpoint.publish(temporary, folder, {}, entries)
    assert not folder.exists()
    (temporary / "rank-00001.safetensors").write_bytes(b"123")
    checkpoint.publish(temporary, folder, {}, entries)
    assert (folder / "checkpoint.json").is_file()


def test_a_journal_keeps_what_a_full_disk_does_not_take(tmp_path, monkeypatch, capsys):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.add([{"step": 1}])
    write = os.write

    def full(file, data):
        if len(data) > 4:
            return write(file, data[:4])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for step in (2, 3):
            journal.add([{"step": step}])
    assert journal.path.read_text() == '{"step": 1}\n'
    journal.add([{"step": 4}])
    assert [json.loads(line)["step"] for line in journal.path.read_text().splitlines()] == [1, 2, 3, 4]
    assert capsys.readouterr().out.count("WARNING") == 1
