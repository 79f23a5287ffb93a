"""Benchmarks on small work: the figures that do not depend on the machine."""

import json

import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from tests.training.launch import forked
from vlmds.bench import data, measure
from vlmds.bench.data import bench_data
from vlmds.bench.generate import bench_generate
from vlmds.bench.large_index import bench_scale


def curves(path) -> set[int]:
    """Numbers of matplotlib's colours (7 is grey, as text is) in a picture: one for each curve."""
    found = {pixel for _, pixel in Image.open(path).convert("RGB").getcolors(1 << 24)}
    return {number for number in range(7) if tuple(round(255 * c) for c in to_rgb(f"C{number}")) in found}


def test_jobs_run_in_turns_and_the_least_time_of_each_counts(monkeypatch):
    now, ran = [0.0], []
    costs = {"a": iter((3.0, 1.0, 2.0)), "b": iter((4.0, 6.0, 5.0))}

    def run(name):
        ran.append(name)
        now[0] += next(costs[name])

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    assert measure.in_turns({name: lambda name=name: run(name) for name in costs}, 3) == {"a": 1.0, "b": 4.0}
    assert ran == ["a", "b"] * 3


def test_scale(tmp_path, capsys):
    rows = bench_scale(tmp_path, (1_000, 10_000))
    assert [row["shards"] for row in rows] == [10, 100]
    assert rows[1]["index_bytes"] > 5 * rows[0]["index_bytes"]
    assert "| 10,000 | 100 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "scale.json").read_text())["rows"] == rows
    assert curves(tmp_path / "scale.png") == {0, 1, 2, 3}


def test_data(tmp_path, capsys, monkeypatch):
    """Every job runs once; the first of a table, the baseline, gets one second, the next two, …"""

    def in_turns(jobs, repeats):
        for job in jobs.values():
            job()
        return {name: float(number) for number, name in enumerate(jobs, 1)}

    monkeypatch.setattr(data, "PACKED", 1e6)
    monkeypatch.setattr(data, "in_turns", in_turns)
    result = bench_data(tmp_path, clips=2, repeats=3)
    packing, loading = result["packing"], result["loading, a sample"]
    assert packing == {
        "tar + sha256sum": 1,
        "webdataset ShardWriter (no checks)": 2,
        "vlmds pack --no-verify": 3,
        "vlmds pack": 4,
    }
    assert list(loading)[:2] == ["bare decode", "bare probe and decode"]
    assert list(loading)[-3:] == [f"vlmds, {store} store" for store in ("video", "frames", "features")]
    assert list(loading.values()) == list(range(1, len(loading) + 1))
    assert "| vlmds pack | 4 x |" in capsys.readouterr().out
    assert json.loads((tmp_path / "data.json").read_text())["ratios"] == result


def test_checkpoint(tmp_path):
    """In a process of its own, because it makes a process group."""
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path; from vlmds.bench.checkpoint import bench_checkpoint; "
        f"bench_checkpoint(Path({str(tmp_path)!r}), steps=4, every=2, rounds=1)"
    )
    forked(0, str(script), log=tmp_path / "log")
    found = json.loads((tmp_path / "checkpoint.json").read_text())
    relative = found["relative_step"]
    assert list(relative) == ["no checkpoints", "in the background", "in place"]
    assert relative["no checkpoints"] == 1 and (found["steps"], found["every"]) == (4, 2)
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
