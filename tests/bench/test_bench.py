"""Benchmarks run to the end on small work and give figures; what they are is for a person to read."""

import json

from vlmds.bench import data
from vlmds.bench.data import bench_data
from vlmds.bench.scale import bench_scale


def test_scale(tmp_path, capsys):
    rows = bench_scale(tmp_path, (1_000, 10_000))
    assert [row["shards"] for row in rows] == [10, 100]
    assert rows[1]["index_bytes"] > 5 * rows[0]["index_bytes"]
    assert "| 10,000 | 100 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "scale.json").read_text())["rows"] == rows
    assert (tmp_path / "scale.png").stat().st_size > 5_000


def test_data(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "PACKED", 1e6)
    result = bench_data(tmp_path, clips=2, repeats=1)
    assert result["packing"]["tar + sha256sum"] == result["loading, a sample"]["bare decode"] == 1
    loading = result["loading, a sample"]
    assert loading["vlmds, frames store"] < loading["vlmds, video store"]
    assert "| vlmds pack |" in capsys.readouterr().out
