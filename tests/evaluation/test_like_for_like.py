"""What is refused, what is warned of and what is listed, on planted runs; and what a run costs."""

import json
import re

import pytest

from tests.evaluation.planted import START, WEIGHTS, plant
from vlmds.cli import main
from vlmds.errors import InputError
from vlmds.evaluation.compare import compare
from vlmds.evaluation.evaluated_runs import group_runs, load_run
from vlmds.evaluation.report import write_report


def two(tmp_path, **changes):
    """Two runs that are alike but for the projector, and for what is planted in the second."""
    return [load_run(plant(tmp_path / "e3", "e3")), load_run(plant(tmp_path / "e7", "e7", **changes))]


def test_runs_that_differ_as_they_should_have_no_warning(tmp_path):
    found = compare(two(tmp_path))
    assert found["warnings"] == []
    assert {row["key"].split(".")[0] for row in found["differences"]} == {"name", "owner", "priority", "projector"}
    assert all(row["expected"] for row in found["differences"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"settings": {"split": "train"}},
            r"differ in the split \(e3: val; e7: train\); evaluate them in the same way",
        ),
        (
            {"settings": {"generation": {"num_beams": 3}}},
            r"differ in the generation options \(e3: num_beams 1; e7: num_beams 3\)",
        ),
        ({"settings": {"prompt": "무엇?"}}, r"settings changed with --set \(e3: —; e7: .*data.prompt .* -> '무엇"),
        (
            {"settings": {"changed": ["data.max_caption_tokens 256 -> 16"]}},
            r"changed with --set .*data.max_caption_tokens 256 -> 16",
        ),
        (
            {"references": lambda clip: [f"{clip}번 영상" if clip == 7 else f"{clip}번 영상입니다."]},
            "e3, e7: 1 of their clips have other references, such as clip00007",
        ),
    ],
)
def test_evaluations_that_cannot_be_compared_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        compare(two(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"record": {"global_batch": 8}}, "different global batches.*e3: 64; e7: 8"),
        (
            {"record": {"data_fingerprint": "f" * 64}},
            "not trained on the same data: e3: dddddddddddd; e7: ffffffffffff",
        ),
        ({"record": {"weights": WEIGHTS | {"llm/model.safetensors": "f" * 64}}}, "from different weights of llm.model"),
        (
            {"record": {"weights": WEIGHTS | {"vision/model.safetensors": "f" * 64}}},
            "different weights of vision.model",
        ),
        ({"record": {"sampling": {"sampler": 2}}}, "sampled or fitted differently"),
        ({"record": {"id": "e3"}}, "same run more than once: e3, e7"),
        ({"settings": {"weights_sha256": "older"}}, "e7: the run's weights changed after the evaluation"),
        ({"settings": {"llm_precision": "bfloat16"}}, "differ in llm_precision: e3: nf4; e7: bfloat16"),
        ({"settings": {"tokenisation": ["words"]}}, "differ in tokenisation"),
        ({"overrides": ["data.num_frames=4"]}, "more than projector, adapter and seed: data.num_frames"),
        ({"overrides": ["peft.r=8"]}, "more than projector, adapter and seed: peft.r"),
        ({"clips": 50}, "only the 50 clips that all runs have are compared"),
    ],
)
def test_what_makes_a_comparison_doubtful_is_warned_of_in_both_languages(tmp_path, changes, message):
    said = compare(two(tmp_path, **changes))["warnings"]
    assert any(re.search(message, warning["en"]) for warning in said)
    assert all(re.search("[가-힣]", warning["ko"]) and warning["ko"] != warning["en"] for warning in said)


def test_clips_of_training_are_warned_of(tmp_path):
    runs = [load_run(plant(tmp_path / exp, exp, settings={"split": "train"})) for exp in ("e3", "e7")]
    assert "of split train" in compare(runs)["warnings"][0]["en"]


def test_ranks_hardware_versions_and_places_are_listed_without_a_warning(tmp_path):
    start = START | {"world_size": 1, "hardware": ["A100"], "versions": {"torch": "2.12.0"}}
    found = compare(two(tmp_path, record={"starts": [start]}, overrides=["vision.model=/elsewhere/clip"]))
    assert found["warnings"] == []
    rows = {row["key"]: (row["expected"], row["values"]) for row in found["differences"]}
    assert rows["run: ranks"] == (True, {"e3": [8], "e7": [1]})
    assert rows["run: hardware"] == (True, {"e3": ["H100"], "e7": ["A100"]})
    assert rows["run: versions"] == (False, {"e3": ["torch 2.13.0"], "e7": ["torch 2.12.0"]})
    assert rows["vision.model"][0]
    notes = [english for english, _ in found["cost_notes"]]
    assert notes[0].startswith("Cheapest: the fewest visual tokens")
    assert "trained on different hardware, so their times cannot be compared: e3: H100; e7: A100" in notes[1]


def test_runs_that_differ_in_the_seed_alone_are_pooled(tmp_path):
    other_ranks = {"starts": [START | {"world_size": 1}]}
    changes = [{}, {"record": other_ranks}, {"record": {"global_batch": 8}}, {"overrides": ["data.num_workers=1"]}]
    changes += [{"record": {"weights": WEIGHTS | {"llm/tokenizer": "f" * 64}}}, {"overrides": ["peft.r=8"]}]
    runs = [load_run(plant(tmp_path / f"run{seed}", "e3", seed, **change)) for seed, change in enumerate(changes)]
    assert [[run.name for run in group.runs] for group in group_runs(runs)] == [
        ["run0", "run1", "run3"],
        ["run2"],
        ["run4"],
        ["run5"],
    ]


def cut(path, end):
    file = path / "evaluation" / "val" / "predictions.jsonl"
    file.write_bytes(file.read_bytes()[:end])


def test_damaged_and_unfinished_evaluations_are_refused_in_one_line(tmp_path, capsys):
    paths = [plant(tmp_path / exp, exp) for exp in ("e3", "e7")]

    def refusal():
        assert main(["compare", *map(str, paths), "-o", str(tmp_path / "r.html")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    cut(paths[1], -40)
    assert "damaged (line 60 of predictions.jsonl" in refusal() and "--again" in refusal()
    lines = (paths[0] / "evaluation" / "val" / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (paths[1] / "evaluation" / "val" / "predictions.jsonl").write_bytes(b"".join(lines[:-1]))
    assert "predictions.jsonl has 59 lines for 60 clips" in refusal()
    folder = paths[1] / "evaluation" / "val"
    (folder / "parts").mkdir()
    (folder / "metrics.json").unlink()
    assert "the evaluation is not finished" in refusal()
    plant(paths[1], "e7", clips=0)
    assert "no clip was evaluated" in refusal()
    plant(paths[1], "e7")
    (paths[1] / "run.json").write_text("{")
    assert "damaged" in refusal()


def test_gpu_hours_are_those_of_all_stages_and_ranks(tmp_path):
    """100 s on 8 GPUs for each of the two stages; an inherited stage counts where it was trained."""
    first = plant(tmp_path / "first", "e3")
    assert load_run(first).cost["gpu_hours"] == pytest.approx(2 * 8 * 100 / 3600)
    assert load_run(first).cost["captions_per_s"] == 4
    inherited = {"align": {"run": str(first), "projector_sha256": "align" * 8}}
    second = plant(tmp_path / "second", "e4", record={"inherited": inherited})
    lines = (second / "metrics.jsonl").read_text().splitlines(keepends=True)
    (second / "metrics.jsonl").write_text(lines[1])
    (run,) = [load_run(second)]
    assert run.cost["gpu_hours"] == pytest.approx(2 * 8 * 100 / 3600) and run.cost["hours"] == pytest.approx(100 / 3600)
    assert run.cost_facts.unknown == []
    first.rename(tmp_path / "moved")
    found = compare([load_run(second)])
    assert found["table"][0]["cost"]["gpu_hours"] is None
    notes = "\n".join(english for english, _ in found["cost_notes"])
    assert f"second: GPU-hours are not known: stage align was inherited from {first}" in notes


def test_the_cheapest_is_by_gpu_hours_where_these_can_be_compared(tmp_path):
    """e3 has more visual tokens and was trained in less time."""
    runs = [plant(tmp_path / exp, exp, clips=200) for exp in ("e3", "e7")]
    file = runs[0] / "metrics.jsonl"
    file.write_text(file.read_text().replace('"samples_per_s": 6.4', '"samples_per_s": 64'))
    found = compare([load_run(run) for run in runs])
    assert found["verdict"]["within_margin"] == ["e3", "e7"]
    assert found["verdict"]["chosen"] == "e3" and found["cost_notes"][0][0].startswith("Cheapest: the fewest GPU-hours")
    record = json.loads((runs[0] / "run.json").read_text())
    del record["starts"][0]["hardware"]
    (runs[0] / "run.json").write_text(json.dumps(record))
    assert compare([load_run(run) for run in runs])["verdict"]["chosen"] == "e7"


def test_power_from_assumptions_is_the_textbook_number(capsys):
    """(z(0.975) + z(0.8))² × sd² / difference² of paired differences: 7.849 × (0.3 / 0.03)²."""
    assert main(["power", "--clip-sd", "30%", "--difference", "3%", "--seeds", "1..3", "--experiments", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" 785") == 1 and "of these checkpoints only" in printed and "--seed-sd" in printed
    assert main(["power", "--clip-sd", "0.3", "--seed-sd", "1%", "--seeds", "2..5"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.lstrip()[0].isdigit()]
    assert rows[0][1:4] == ["too", "few", "seeds"] and int(rows[-1][1].replace(",", "")) > 785
    for wrong in (["--difference", "0"], ["--clip-sd", "0.3", "--power", "200%"], []):
        assert main(["power", *wrong]) == 2
    assert "give evaluated runs, or assume --clip-sd" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["power", "--clip-sd", "30"])
    assert "argument --clip-sd: 30 is 3000%; write 30% or 0.3" in capsys.readouterr().err


def test_power_from_evaluations_and_in_the_report(tmp_path, capsys):
    """Independent scores of sd 20 with value 50: their difference has sd 20 √2 / 50 = 57%."""
    paths = [plant(tmp_path / exp, exp, clips=400, spread=20.0) for exp in ("e3", "e7")]
    assert main(["power", *map(str, paths)]) == 0
    printed = capsys.readouterr().out
    share = float(re.search(r"difference of one clip ([\d.]+)%", printed)[1])
    assert 52 < share < 61 and "cider_d@char, measured on 400 clips" in printed
    assert main(["power", str(paths[0])]) == 2
    loaded = [load_run(path) for path in paths]
    found = compare(loaded)
    rows = found["verdict"]["decidable_with"]
    assert found["verdict"]["chosen"] is None and rows[0] == found["verdict"]["needed"] and rows[0]["clips"] > 400
    write_report(tmp_path / "r.html", loaded, found)
    page = (tmp_path / "r.html").read_text("utf-8")
    assert "What would decide it" in page and f"<td>{rows[0]['clips']:,}</td>" in page
