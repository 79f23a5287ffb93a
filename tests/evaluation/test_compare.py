"""Statistics on made-up predictions whose answer is known, and bad input on real evaluations."""

import json
import re
import shutil

import numpy as np
import pytest

from tests.evaluation.conftest import make_run
from vlmds.cli import main
from vlmds.errors import InputError
from vlmds.evaluation.blind import ORDER
from vlmds.evaluation.compare import compare, factors
from vlmds.evaluation.evaluate import evaluate_run
from vlmds.evaluation.evaluated_runs import group_runs, load_run
from vlmds.evaluation.report import write_report
from vlmds.evaluation.results import evaluation_table
from vlmds.evaluation.statistics import estimate
from vlmds.evaluation.word_accuracy import found_words, word_accuracy
from vlmds.experiments.schema import PROJECTORS
from vlmds.inference.generation import GenerationOptions


@pytest.fixture(scope="module")
def runs(models, shards, tmp_path_factory):
    """Three evaluated runs."""
    folder = tmp_path_factory.mktemp("compared")
    made = {}
    for exp, seed in (("e3", 5), ("e4", 6), ("e8", 7)):
        made[exp] = make_run(models, shards, folder / exp, exp, seed)
        evaluate_run(made[exp], generation=GenerationOptions(max_new_tokens=8))
    return made


def rewrite(path, change):
    file = path / "evaluation" / "val" / "predictions.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in (change(i, line) for i, line in enumerate(lines)) if line]
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    metrics = json.loads((file.parent / "metrics.json").read_text())
    (file.parent / "metrics.json").write_text(json.dumps(metrics | {"clips": len(lines)}))


def copies(runs, tmp_path):
    made = []
    for exp, path in runs.items():
        shutil.copytree(path, tmp_path / exp)
        made.append(tmp_path / exp)
    return made


def test_values_and_costs_are_those_of_the_runs(runs):
    found = compare([load_run(path) for path in runs.values()])
    for row, path in zip(found["table"], runs.values()):
        metrics = json.loads((path / "evaluation" / "val" / "metrics.json").read_text())
        for name, value in metrics["metrics"].items():
            assert row["metrics"][name]["value"] == pytest.approx(value["value"], abs=1e-4)
        assert row["cost"]["samples_per_s"] == 2.0 and row["cost"]["memory_gib"] == 1.5
        assert row["cost"]["hours"] == pytest.approx(48 / 2 / 3600)
        assert row["cost"]["trainable"] == sum(
            metrics["model"][f"{part}_parameters"] for part in ("projector", "adapter")
        )
    assert [row["cost"]["visual_tokens"] for row in found["table"]] == [16, 16, 4]
    assert found["metric"] == "cider_d@morpheme" and len(found["pairs"]) == 3


def test_a_clear_winner_is_significant_and_a_copy_is_a_tie(runs, tmp_path):
    paths = copies(runs, tmp_path)

    def perfect(_, line):
        scores = dict.fromkeys(line["scores"], 100.0)
        scores["cider_d@morpheme"] = 900.0 + line["position"]
        return line | {"scores": scores}

    rewrite(paths[0], perfect)
    rewrite(paths[1], perfect)
    found = compare([load_run(path) for path in paths])
    said = found["verdict"]
    assert said["could_be_best"] == said["within_margin"] == ["e3", "e4"] and said["checkpoints_only"]
    assert said["few"] and said["chosen"] is None  # no winner of 12 clips
    runner_up = said["runner_up"]
    assert (runner_up["name"], runner_up["gap"], runner_up["p_holm"]) == ("e4", 0, 1) and not runner_up["significant"]
    pair = next(p for p in found["pairs"] if (p["one"], p["other"]) == ("e3", "e8"))
    assert pair["low"] > 0 and pair["p_holm"] < 0.01  # all flips of so few clips


def test_runs_of_several_seeds_are_one_experiment(models, shards, tmp_path):
    paths = [make_run(models, shards, tmp_path / f"e3-seed{s}", "e3", 5 + s, f"training.seed={s}") for s in range(2)]
    for path in paths:
        evaluate_run(path, generation=GenerationOptions(max_new_tokens=4))
    (group,) = group_runs([load_run(path) for path in paths])
    assert len(group.runs) == 2
    row = compare(group.runs)["table"][0]
    assert row["seeds"] == 2
    one, two = (json.loads((path / "evaluation" / "val" / "metrics.json").read_text())["metrics"] for path in paths)
    name = "chrf++@char"
    assert row["metrics"][name]["seed_sd"] == pytest.approx(
        abs(one[name]["value"] - two[name]["value"]) / 2**0.5, abs=1e-4
    )


def table_of(values):
    return [
        {
            "name": f"{p}-{a}",
            "projector": p,
            "adapter": a,
            "metrics": {"m": {"value": v}},
            "cost": {"visual_tokens": 64, "trainable": 1},
        }
        for (p, a), v in values.items()
    ]


def test_main_effects_and_interaction_by_hand():
    values = {
        ("linear", "lora"): 1.0,
        ("linear", "dora"): 2.0,
        ("mlp", "lora"): 4.0,
        ("mlp", "dora"): 9.0,
        ("perceiver", "lora"): 100.0,
    }
    scores = [np.full((1, 50, 1), value) for value in values.values()]
    found = factors(table_of(values), estimate("cider_d@char", scores, range(50)))
    assert found["adapter"]["value"] == 3.0  # (1 + 5) / 2; perceiver has no DoRA run
    assert found["projector"]["mlp"]["value"] == pytest.approx(6.5 - 4)
    assert found["interaction"]["linear"]["value"] == pytest.approx(-2)
    assert "perceiver + dora" in found["missing"] and "linear + lora" not in found["missing"]


def test_other_clips_are_left_out_with_a_warning_and_none_in_common_is_refused(runs, tmp_path):
    paths = copies(runs, tmp_path)
    rewrite(paths[0], lambda i, line: line if i < 6 else None)
    found = compare([load_run(path) for path in paths])
    assert found["clips"] == 6 and "not evaluated on the same clips" in found["warnings"][0]["en"]
    rewrite(paths[1], lambda i, line: line if i >= 6 else None)
    with pytest.raises(InputError, match="no clip was evaluated in all of them"):
        compare([load_run(path) for path in paths])


def test_other_data_and_batches_are_reported(runs, tmp_path):
    paths = copies(runs, tmp_path)
    record = paths[1] / "run.json"
    assert not any("global batch" in w["en"] for w in compare([load_run(path) for path in paths])["warnings"])
    record.write_text(json.dumps(json.loads(record.read_text()) | {"data_fingerprint": "other", "global_batch": 64}))
    found = compare([load_run(path) for path in paths])
    said = "\n".join(w["en"] for w in found["warnings"])
    assert "not trained on the same data" in said
    assert "different global batches" in said and "e3: 4; " in said and ": 64" in said
    keys = {d["key"]: d["expected"] for d in found["differences"]}
    assert keys["peft.type"] and keys["projector.type"] and "data.prompt" not in keys


def test_a_run_that_may_not_use_the_video_is_reported_in_each_language(runs, tmp_path):
    path = copies(runs, tmp_path)[0]
    file = path / "evaluation" / "val" / "metrics.json"
    metrics = json.loads(file.read_text())
    looking, metrics["unfinished"] = metrics["looking"], None
    for test in (looking["loss"]["blank"], looking["metrics"]["blank"]["cider_d@morpheme"]):
        test["low"] = test["share_low"] = -0.5
    del looking["loss"]["shuffled"]
    file.write_text(json.dumps(metrics))
    [warning] = compare([load_run(path)])["warnings"]
    assert "other clips' videos: too few clips to decide; loss with black frames is not clearly worse" in warning["en"]
    korean = warning["ko"].replace("cider_d@morpheme", "")
    assert (
        "입력을 바꿔도(검은 화면) 뚜렷이 나빠지지 않는 값 (손실)" in korean
        and "다른 클립의 영상: 클립이 너무 적어" in korean
    )
    assert not re.search("[a-zA-Z]{2}", korean.removeprefix("e3"))


def test_evaluations_and_runs_of_an_older_version_are_read(runs, tmp_path):
    """Without the order of frames and without shares; a warning of a stage is passed on."""
    path = copies(runs, tmp_path)[0]
    file = path / "evaluation" / "val" / "metrics.json"
    metrics = json.loads(file.read_text())
    assert {"frames_reversed", "one_frame"} < metrics["looking"]["loss"].keys()
    for name in ORDER:
        del metrics["looking"]["loss"][name]
    for test in (*metrics["looking"]["loss"].values(), *metrics["looking"]["metrics"]["blank"].values()):
        for key in [key for key in test if key.startswith(("share", "clips"))]:
            del test[key]
    metrics["looking"]["loss"]["shuffled"] |= {"blind": 4.0, "gap": 0.5, "low": 0.1, "high": 0.9}
    file.write_text(json.dumps(metrics))
    with (path / "metrics.jsonl").open("a") as lines:
        lines.write('{"kind": "warning", "stage": "align", "step": 3, "en": "blind", "ko": "경고"}\n')
    runs_read = [load_run(path)]
    found = compare(runs_read)
    assert {"en": "e3, align: blind", "ko": "e3, align: 경고"} in found["warnings"]
    assert any("loss with other clips' videos is not clearly worse: 12.5%" in w["en"] for w in found["warnings"])
    assert write_report(tmp_path / "report.html", runs_read, found) and evaluation_table(metrics)


def test_a_run_in_progress_is_reported_and_one_without_evaluation_refused(runs, tmp_path):
    paths = copies(runs, tmp_path)
    shutil.rmtree(paths[2] / "artifacts" / "finetune")
    with (paths[2] / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    found = compare([load_run(path) for path in paths])
    assert any("e8: training is not finished" in w["en"] for w in found["warnings"])
    (paths[0] / "evaluation" / "val" / "predictions.jsonl").unlink()
    with pytest.raises(InputError, match="predictions.jsonl: missing; run vlmds evaluate"):
        load_run(paths[0])
    shutil.rmtree(paths[0] / "evaluation")
    with pytest.raises(InputError, match="no evaluation; run vlmds evaluate --run"):
        load_run(paths[0])


def test_one_run_alone(runs):
    found = compare([load_run(runs["e3"])])
    assert found["verdict"]["best"] == "e3" and found["verdict"]["runner_up"] is None


def test_word_accuracy_against_the_most_frequent_answer():
    references = [["공이 왼쪽으로 갑니다", "왼쪽에 공"], ["공이 오른쪽으로"], ["공이 위로"], ["강아지"], ["왼쪽으로"]]
    captions = [["왼쪽으로 갑니다", "오른쪽", "아래로", "왼쪽", "왼쪽 오른쪽"], ["왼쪽"] * 5, [""] * 5]
    found = word_accuracy(captions, references, ["왼쪽", "오른쪽", "위", "아래"])
    assert found["clips"] == 4 and found["chance"] == 50
    assert [v["value"] for v in found["values"]] == [50, 50, 0]
    assert 0 <= found["values"][0]["low"] < 50 < found["values"][0]["high"] <= 100
    assert word_accuracy(captions, references, ["없는"]) is None


@pytest.mark.parametrize("installed", [True, False])
def test_words_are_matched_as_words_and_not_as_beginnings(installed, monkeypatch):
    """With Kiwi, and by particles without it."""
    if not installed:
        monkeypatch.setattr("vlmds.evaluation.word_accuracy.morphemes", lambda: None)
    texts = ["위험한 길", "공이 위로 갑니다.", "상자 위에서도", "위.", "오른쪽으로", "왼쪽과 오른쪽에서"]
    assert [[*found_words(text, ["위", "왼쪽"])] for text in texts] == [[], ["위"], ["위"], ["위"], [], ["왼쪽"]]


def test_runs_whose_folders_have_the_same_name_have_longer_names(runs, tmp_path):
    paths = []
    for number, exp in enumerate(("e3", "e4")):
        paths.append(tmp_path / str(number) / "run")
        shutil.copytree(runs[exp], paths[-1])
    file = paths[0] / "evaluation" / "val" / "metrics.json"
    metrics = json.loads(file.read_text())
    metrics["settings"]["llm_precision"] = "int3"
    file.write_text(json.dumps(metrics))
    loaded = [load_run(path) for path in paths]
    found = compare(loaded)
    assert [row["name"] for row in found["table"]] == ["0/run", "1/run"]
    assert any("differ in llm_precision: 0/run: int3; 1/run: " in w["en"] for w in found["warnings"])
    write_report(tmp_path / "r.html", loaded, found)
    assert '"groups":["0/run","1/run"]' in (tmp_path / "r.html").read_text("utf-8")
    for path in paths:
        record = json.loads((path / "run.json").read_text())
        (path / "run.json").write_text(json.dumps(record | {"id": "0123abcd"}))
    assert any(
        "same run more than once: 0/run, 1/run" in w["en"]
        for w in compare([load_run(path) for path in paths])["warnings"]
    )


def test_a_fifth_projector_appears_by_its_registration(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(PROJECTORS, "fifth", PROJECTORS["linear"])
    loaded = [load_run(path) for path in runs.values()]
    found = compare(loaded)
    assert "fifth + lora" in found["factors"]["missing"]
    write_report(tmp_path / "r.html", loaded, found)
    assert '<th scope="row">fifth</th>' in (tmp_path / "r.html").read_text("utf-8")


def test_the_command_lists_as_tied_others_than_the_best(runs, tmp_path, capsys):
    for chosen, tied in (([runs["e3"]], False), ([runs["e3"], *copies({"copy": runs["e3"]}, tmp_path)], True)):
        assert main(["compare", *map(str, chosen), "-o", str(tmp_path / "r.html")]) == 0
        line = capsys.readouterr().out.splitlines()[0]
        assert ("Statistically tied with e3: copy." in line) is tied and "tied with e3: e3" not in line


def test_the_margin_is_a_share(runs, tmp_path, capsys):
    for margin, shown in (("0", "0"), ("150%", "1.5")):
        assert main(["compare", str(runs["e3"]), "--margin", margin, "-o", str(tmp_path / "r.html")]) == 2
        assert f"--margin {shown}: not a share between 0 and 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compare", str(runs["e3"]), "--margin", "3", "-o", str(tmp_path / "r.html")])
    assert "argument --margin: 3 is 300%; write 3% or 0.03" in capsys.readouterr().err


def test_words_that_no_reference_has_are_refused(runs):
    with pytest.raises(InputError, match="--words 나무: no reference"):
        compare([load_run(path) for path in runs.values()], words=[["나무"]])
