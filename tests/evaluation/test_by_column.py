"""Kept columns: from the manifest into predictions.jsonl and the comparison; captions that ended at max_new_tokens."""

import json

import numpy as np
import pytest
import torch

from tests import tiny
from tests.clips import write_manifest, write_video
from tests.evaluation.conftest import make_run
from tests.evaluation.planted import METRICS, plant
from tests.evaluation.test_compare import rewrite
from vlmds.cli import main
from vlmds.errors import InputError
from vlmds.evaluation.by_column import MOST_VALUES, by_columns
from vlmds.evaluation.compare import compare
from vlmds.evaluation.evaluated_runs import load_run
from vlmds.evaluation.saved import read_captions, read_evaluation
from vlmds.evaluation.unfinished import unfinished_captions, unfinished_warning
from vlmds.inference.generation import generate_batch
from vlmds.inference.options import GenerationOptions
from vlmds.inference.video_captioner import VideoCaptioner

METRIC = METRICS[0]


def planted(tmp_path, change, names=("e3", "e7")):
    folders = [plant(tmp_path / name, name) for name in names]
    for folder in folders:
        rewrite(folder, change)
    return folders


def test_each_value_has_its_own_metric_counts_and_intervals(tmp_path):
    kinds = ("요리", "운동", "동물")
    folders = planted(tmp_path, lambda i, line: line | {"columns": {"category": kinds[i % 3], "id": i}})
    found = compare([load_run(folder) for folder in folders])["columns"]
    assert [column["column"] for column in found] == ["category"]  # id has too many values
    for row in found[0]["values"]:
        place = kinds.index(row["value"])
        assert (row["clips"], row["sources"]) == (20, 20)
        for folder, cell in zip(folders, row["cells"], strict=True):
            own = [
                json.loads(line)["scores"][METRIC]
                for line in (folder / "evaluation" / "val" / "predictions.jsonl").read_text().splitlines()[place::3]
            ]
            assert cell["value"] == pytest.approx(np.mean(own))
            error = np.std(own, ddof=1) / 20**0.5
            assert cell["high"] - cell["low"] == pytest.approx(2 * 2.093 * error, rel=1e-3)  # t of 19 degrees


def test_values_that_are_missing_rare_or_of_one_video():
    lines = [{"columns": {"tag": f"t{i // 3}" if i < 48 else ["a", 1]}} for i in range(50)] + [{}, {"columns": {}}]
    scores = [[np.arange(52.0)[:, None]]]
    sources = [f"v{i // 3}" for i in range(52)]
    assert by_columns(lines, scores, METRIC, sources) == []
    (found,) = by_columns(lines, scores, METRIC, sources, ["tag"])
    rows = found["values"]
    assert found["missing"] == 2 and len(rows) == MOST_VALUES and rows[-1]["value"] is None
    assert rows[0]["cells"][0] == {"value": 1.0, "low": None, "high": None}
    assert sum(row["clips"] for row in rows) == 50
    with pytest.raises(InputError, match="--breakdown kind: the clips have no such column; they have tag"):
        by_columns(lines, scores, METRIC, sources, ["kind"])


def test_the_report_shows_columns_and_unfinished_captions_in_both_languages(tmp_path, capsys):
    folders = planted(tmp_path, lambda i, line: line | {"columns": {"<b>분류</b>": f"{i % 2}번 & <i>"}})
    path = folders[0] / "evaluation" / "val" / "metrics.json"
    metrics = json.loads(path.read_text())
    path.write_text(json.dumps(metrics | {"unfinished": {"captions": 9, "share": 0.15, "max_new_tokens": 64}}))
    out = tmp_path / "report.html"
    command = ["compare", *map(str, folders), "-o", str(out), "--json", str(tmp_path / "all.json")]
    assert main([*command, "--breakdown", "<b>분류</b>"]) == 0
    assert "e3: 9 captions (15.0%) ended at --max-new-tokens 64" in capsys.readouterr().err
    page = out.read_text()
    assert "<b>분류" not in page and "&lt;b&gt;분류&lt;/b&gt;" in page and "0번 &amp; &lt;i&gt;" in page
    assert "문장 중간에 끊긴 캡션" in page and "e3: 캡션 9개(15.0%)" in page and "9 (15.0%)" in page
    found = json.loads((tmp_path / "all.json").read_text())
    assert [row["clips"] for row in found["columns"][0]["values"]] == [30, 30]
    assert found["unfinished"] == [{"name": "e3", "captions": 9, "share": 0.15}]
    assert main([*command, "--breakdown", "none"]) == 2
    assert "--breakdown none: the clips have no such column" in capsys.readouterr().err


def test_kept_columns_and_endings_are_in_the_results(models, tmp_path, capsys):
    rows = []
    for i in range(6):
        write_video(tmp_path / f"v{i}.mp4", frames=8 + i)
        row = {"video": f"v{i}.mp4", "caption": f"{i}번 영상입니다.", "split": "val" if i > 1 else "train"}
        rows.append(row | {"category": "가" if i % 2 else 3})
    manifest = write_manifest(tmp_path / "manifest.jsonl", rows)
    shards = tiny.pack_frames(manifest, tmp_path / "shards", keep_columns=["category"])
    run = make_run(models, shards, tmp_path / "e7", "e7")
    assert main(["evaluate", "--run", str(run), "--max-new-tokens", "3"]) == 0
    printed = capsys.readouterr().out
    metrics, lines = read_evaluation(run / "evaluation" / "val")
    assert [line["columns"] for line in lines] == [{"category": 3}, {"category": "가"}] * 2
    assert [line["unfinished"] for line in lines] == [True] * 4  # these models never end by themselves
    assert metrics["unfinished"] == {"captions": 4, "share": 1.0, "max_new_tokens": 3}
    assert "captions that ended at --max-new-tokens 3: 4 (100.0%)" in printed
    assert "WARNING: 4 captions (100.0%) ended at --max-new-tokens 3" in printed
    assert len(read_captions(run / "evaluation" / "val")[1]) == 4  # though the values have two types


def test_a_warning_only_above_a_share():
    few = unfinished_captions([{"unfinished": i == 0} for i in range(100)], 64)
    assert few == {"captions": 1, "share": 0.01, "max_new_tokens": 64} and unfinished_warning(few) is None
    many = unfinished_captions([{"unfinished": i < 3} for i in range(100)], 64)
    assert "3 captions (3.0%)" in unfinished_warning(many)[0] and "3개(3.0%)" in unfinished_warning(many)[1]
    assert unfinished_captions([{"unfinished": True}, {}], 64) is None and unfinished_warning(None) is None


def test_the_end_of_turn_decides_also_at_exactly_the_last_token(models, shards, tmp_path, monkeypatch):
    captioner = VideoCaptioner.from_pretrained(make_run(models, shards, tmp_path / "e8", "e8"))
    frames = torch.zeros(1, tiny.FRAMES, 3, tiny.SIDE, tiny.SIDE, dtype=torch.uint8)
    features = captioner.model.features({"frames": frames})

    def generate(tokens):
        return generate_batch(captioner.model, captioner.builder, features, [None], GenerationOptions(tokens))

    said, decode = [], captioner.builder.decode
    monkeypatch.setattr(captioner.builder, "decode", lambda ids: said.append(ids) or decode(ids))
    assert generate(6)[1] == generate(1)[1] == [True]  # these models never end by themselves
    captioner.builder.eos_token_id = int(said[0][0, 0])
    assert generate(1)[1] == generate(6)[1] == [False]
