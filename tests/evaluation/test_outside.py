"""Captions from elsewhere: scored, refused where they do not fit, and compared with trained runs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.evaluation.planted import plant, planted_outside
from vlmds.cli import main
from vlmds.data.dataset import Dataset
from vlmds.data.index import ShardIndex
from vlmds.data.loader import SampleRows
from vlmds.evaluation.adopt import adopt_sentence
from vlmds.evaluation.compare import compare
from vlmds.evaluation.evaluated_runs import load_evaluated
from vlmds.evaluation.outside import evaluate_predictions
from vlmds.evaluation.outside_record import read_outside
from vlmds.evaluation.report import to_csv, to_latex, write_report
from vlmds.evaluation.results import evaluation_table
from vlmds.evaluation.saved import read_evaluation
from vlmds.evaluation.scoring import ClipText, read_text
from vlmds.evaluation.statistics import estimate


@pytest.fixture(scope="module")
def texts(shards) -> list[ClipText]:
    rows = SampleRows(Dataset([ShardIndex.open(shards)]), "val", shuffle=False)
    found = [read_text(rows, position) for position in range(len(rows))]
    assert len(found) == 11 and all(isinstance(text, ClipText) for text in found)
    return found


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def own_rows(texts: list[ClipText]) -> list[dict]:
    return [{"id": text.id, "caption": text.captions[0]} for text in texts]


def test_captions_from_a_file_are_scored_as_those_of_a_run(texts, shards, tmp_path):
    rows = own_rows(texts)
    rows[0] = {"key": texts[0].key, "caption": rows[0]["caption"]}  # as a run's predictions.jsonl names it
    file = write_rows(tmp_path / "gpt.jsonl", rows[::-1])
    folder = evaluate_predictions(file, name="gpt", data=str(shards), output=tmp_path / "gpt")
    metrics, lines = read_evaluation(folder / "evaluation" / "val")
    assert metrics["metrics"]["chrf++@char"]["value"] == pytest.approx(100)
    assert metrics["metrics"]["rouge_l@char"]["value"] == pytest.approx(100)
    assert [line["key"] for line in lines] == [text.key for text in texts]
    assert [line["caption"] for line in lines] == [text.captions[0] for text in texts]
    table = evaluation_table(metrics)
    assert "11 clips" in table and "blank" not in table and "caption loss" not in table
    recorded = read_outside(folder)
    assert (recorded.name, recorded.kind, recorded.source) == ("gpt", "predictions file", str(file))


def test_a_table_with_spans_and_videos_must_name_those_of_the_clips(texts, shards, tmp_path):
    rows = [
        row | {"video": text.source, "start": text.span[0], "end": text.span[1]}
        for row, text in zip(own_rows(texts), texts)
    ]
    evaluate_predictions(write_rows(tmp_path / "a.jsonl", rows), name="a", data=str(shards), output=tmp_path / "a")
    rows[2]["start"] = 0.5
    rows[3]["video"] = "elsewhere.mp4"
    file = write_rows(tmp_path / "b.jsonl", rows)
    with pytest.raises(Exception, match=rf"2 clips of another video or span: {texts[2].id} \(start 0.5, not 0\), "):
        evaluate_predictions(file, name="b", data=str(shards), output=tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[1:], "1 clip without a caption: "),
        (lambda rows: rows[:0] + [rows[0] | {"id": "x"}] + rows[1:], "1 id that the data does not have: x; 1 clip"),
        (lambda rows: [*rows, rows[4]], "1 id more than once: "),
        (lambda rows: [{"id": f"n{i}", "caption": "가"} for i in range(12)] + rows, "n9 and 2 more"),
        (lambda rows: [*rows[:-1], rows[-1] | {"caption": None}], "the caption is not a text"),
        (lambda rows: [{"id": row["id"], "text": row["caption"]} for row in rows], "needs the columns id and caption"),
    ],
    ids=["missing", "unknown", "repeated", "many", "no text", "no column"],
)
def test_what_does_not_fit_is_one_line(texts, shards, tmp_path, capsys, change, said):
    file = write_rows(tmp_path / "p.jsonl", change(own_rows(texts)))
    words = ["evaluate", "--predictions", str(file), "--name", "p", "--data", str(shards)]
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error and str(file) in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--beams=3", "--batch-size=2", "--device=cpu", "--prompt=무엇?", "--num-frames=1"])
def test_options_of_captioning_are_refused_beside_predictions(texts, shards, tmp_path, capsys, option):
    file = write_rows(tmp_path / "p.jsonl", own_rows(texts))
    words = ["evaluate", "--predictions", str(file), "--name", "p", "--data", str(shards), option]
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    assert f"{option.partition('=')[0]}: does not go with --predictions" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_file_replaces_nothing_unless_asked(texts, shards, tmp_path):
    first = write_rows(tmp_path / "first.jsonl", own_rows(texts))
    out = tmp_path / "out"
    words = ["evaluate", "--name", "p", "--data", str(shards), "--output", str(out)]
    assert main([*words, "--predictions", str(first)]) == 0
    before = read_outside(out)
    other = write_rows(tmp_path / "other.jsonl", [row | {"caption": "다른 것"} for row in own_rows(texts)])
    assert main([*words, "--predictions", str(other)]) == 2
    shutil.copy(other, first)  # the same name, with other captions
    assert main([*words, "--predictions", str(first)]) == 2
    assert read_evaluation(out / "evaluation" / "val")[1][0]["caption"] == texts[0].captions[0]
    assert main([*words, "--predictions", str(first), "--again"]) == 0
    assert read_evaluation(out / "evaluation" / "val")[1][0]["caption"] == "다른 것"
    assert read_outside(out).id == before.id and read_outside(out).sha256 != before.sha256


@pytest.mark.parametrize(
    ("value", "clips", "answer"), [(40, 200, "build"), (60, 200, "adopt"), (52, 200, "adopt"), (60, 30, "few")]
)
def test_build_or_adopt_is_answered_and_does_not_change_the_verdict(tmp_path, value, clips, answer):
    paths = [
        plant(tmp_path / f"{exp}-{seed}", exp, seed, clips=clips, value=50 + (exp == "e7"))
        for exp in ("e3", "e7")
        for seed in range(3)
    ]
    alone = compare(load_evaluated(paths)[0])
    paths.append(planted_outside(tmp_path / "ready", tmp_path / "made", clips=clips, value=value))
    runs, outside = load_evaluated(paths)
    found = compare(runs, outside=outside)
    assert alone["adopt"] is None and found["verdict"] == alone["verdict"]
    assert found["adopt"]["answer"] == answer
    english, korean = adopt_sentence(found)
    assert "ready" in english or answer == "build"
    assert korean and not english.isspace()
    page = tmp_path / "report.html"
    write_report(page, runs, found, outside)
    text = page.read_text(encoding="utf-8")
    assert "org/ready" in text and "외부 모델" in text and ">None<" not in text
    assert to_csv(found).splitlines()[-1].startswith("ready,,,,")
    assert r"ready & -- & --" in to_latex(found)


@pytest.mark.parametrize(
    ("values", "clips", "margin", "said"),
    [
        ((40, 50, 60), 80, "3%", "Take model60: it has the highest cider_d@char ("),
        (
            (60, 60.1, 40),
            200,
            "5%",
            "is shown to be at most 5% below the best, whichever that is. Statistically tied with",
        ),
        ((60, 60.1, 40), 80, "0.1%", "Not decidable with this data: no model is shown to be within 0.1% of the best."),
        ((40, 50, 60), 30, "3%", "No winner is named: 30 videos are too few (50 at least). model60 has the highest"),
        ((40,), 80, "3%", "One model only: model40, cider_d@char "),
    ],
    ids=["worse", "within the margin", "open", "few", "one"],
)
def test_outside_models_alone_are_compared(tmp_path, capsys, values, clips, margin, said):
    paths = [
        planted_outside(tmp_path / f"model{value}", tmp_path / "made", seed, clips=clips, value=value)
        for seed, value in enumerate(values)
    ]
    page, table, figures = (tmp_path / f"report.{kind}" for kind in ("html", "csv", "json"))
    words = ["-o", str(page), "--csv", str(table), "--json", str(figures), "--margin", margin, "--errors"]
    assert (
        main(["compare", *map(str, paths), *words, "--words", "왼쪽으로 오른쪽으로"]) == 2
    )  # as no reference has them
    assert "no reference has any of them" in capsys.readouterr().err
    assert main(["compare", *map(str, paths), *words]) == 0
    shown = capsys.readouterr().out
    assert said in shown and "seed" not in shown and "experiment" not in shown
    assert (len(values) == 1) or "whether to build or adopt needs a run of vlmds" in shown
    text = page.read_text(encoding="utf-8")
    assert all(f"org/model{value}" in text for value in values)
    assert "외부 모델 비교" in text and ">None<" not in text
    assert "실험" not in text[text.index("<main>") : text.index("</main>")]
    rows = [line.split(",") for line in table.read_text().splitlines()]
    assert [row[0] for row in rows[1:]] == [f"model{value}" for value in values]
    found = json.loads(figures.read_text())
    assert len(found["pairs"]) == len(values) * (len(values) - 1) // 2 and found["adopt"] is None
    assert all(
        cell["low"] < cell["value"] < cell["high"]
        for row in found["table"]
        for cell in [row["metrics"]["cider_d@char"]]
    )
    assert all(pair["low"] <= pair["gap"] <= pair["high"] for pair in found["pairs"])


def test_reviews_need_a_run(tmp_path, capsys):
    folder = planted_outside(tmp_path / "ready", tmp_path / "made")
    assert main(["compare", str(folder), "--reviews", str(tmp_path), "-o", str(tmp_path / "report.html")]) == 2
    assert "--reviews: none of the folders is a run of vlmds" in capsys.readouterr().err


def test_an_outside_model_has_no_variance_of_seeds():
    random = np.random.default_rng(0)
    clip = 50 + random.standard_normal(100)
    groups = [
        np.stack([clip + offset for offset in (-3.0, 0.0, 3.0)])[:, :, None],
        (clip + random.standard_normal(100))[None, :, None],
    ]
    found = estimate("cider_d@char", groups, range(100), fixed=[1])
    assert found.seed_variance > 1
    assert found.covariance[1, 1] == pytest.approx(found.clip_covariance[1, 1])
    assert found.covariance[0, 0] == pytest.approx(found.clip_covariance[0, 0] + found.seed_variance / 3)


def test_a_clip_that_cannot_be_read_is_counted_and_stops_nothing(texts, shards, tmp_path):
    shutil.copytree(shards, tmp_path / "data")
    row = ShardIndex.open(shards).row("val", 0, 1)
    member = next(m for m in row.members if m.ext == "json")
    with (tmp_path / "data" / "val" / f"{row.shard:06d}.tar").open("r+b") as file:
        file.seek(member.offset)
        file.write(b"\0" * 10)
    file = write_rows(tmp_path / "p.jsonl", [{"key": text.key, "caption": text.captions[0]} for text in texts])
    folder = evaluate_predictions(file, name="p", data=str(tmp_path / "data"), output=tmp_path / "p")
    metrics, lines = read_evaluation(folder / "evaluation" / "val")
    assert metrics["clips"] == 10 and metrics["unreadable"] == 1 and row.key not in [line["key"] for line in lines]
    assert json.loads((folder / "evaluation" / "val" / "ledger.jsonl").read_text())["key"] == row.key
