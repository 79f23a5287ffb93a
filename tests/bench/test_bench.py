"""Benchmarks run to the end on small work and give figures; what they are is for a person to read."""

import json

import pytest

from tests.training.launch import forked
from vlmds.bench import data
from vlmds.bench.data import bench_data
from vlmds.bench.generate import bench_generate
from vlmds.bench.large_index import bench_scale


def test_scale(tmp_path, capsys):
    rows = bench_scale(tmp_path, (1_000, 10_000))
    assert [row["shards"] for row in rows] == [10, 100]
    assert rows[1]["index_bytes"] > 5 * rows[0]["index_bytes"]
    assert "| 10,000 | 100 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "scale.json").read_text())["rows"] == rows
    assert (tmp_path / "scale.png").stat().st_size > 5_000


def test_data(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "PACKED", 1e6)
    result = bench_data(tmp_path, clips=2, repeats=3)  # the least time of each counts
    assert result["packing"]["tar + sha256sum"] == result["loading, a sample"]["bare decode"] == 1
    loading = result["loading, a sample"]
    assert loading["vlmds, frames store"] < loading["vlmds, video store"]
    assert "| vlmds pack |" in capsys.readouterr().out


def test_checkpoint(tmp_path):
    """In a process of its own, for it makes a process group."""
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path; from vlmds.bench.checkpoint import bench_checkpoint; "
        f"bench_checkpoint(Path({str(tmp_path)!r}), steps=4, every=2, rounds=1)"
    )
    forked(0, str(script), log=tmp_path / "log")
    found = json.loads((tmp_path / "checkpoint.json").read_text())
    relative = found["relative_step"]
    assert list(relative) == ["no checkpoints", "in the background", "in place"]
    assert relative["no checkpoints"] == 1 and min(relative.values()) > 0
    # A weight and two moments in fp32 for each trainable (MLP and LoRA), and the file's header.
    trained = 256 * 512 + 512 + 512 * 512 + 512 + 4 * 16 * (3 * 1536 + 2 * 1024 + 2 * 768)
    assert 12 * trained < found["bytes"] < 12 * trained + 60_000


def test_generate(tmp_path, capsys):
    ways = bench_generate(tmp_path, "e5", tiny=True, tokens=4, batches=(2,), repeats=1)
    assert list(ways) == ["one by one, no KV cache", "one by one", "batches of 2"]
    assert ways["one by one"]["ratio"] == 1
    for way in ways.values():
        assert way["same_captions"] == 1
        assert way["vision"] + way["prefill"] + way["decode"] == pytest.approx(1)
        assert way["tokens_per_s"] == pytest.approx(4 * way["captions_per_s"])
    assert "| batches of 2 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "generate.json").read_text())["ways"] == ways
