"""`vlmds sweep --demo --known`: its table with planted results, its input, and the whole command in a small size."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.evaluation.planted import plant
from tests.training.launch import exit_code
from vlmds.cli import main
from vlmds.demo.known import FULL, ONE_FRAME, QUICK, known_sweep, write_form
from vlmds.demo.known_rows import known_rows, rows_table
from vlmds.demo.known_scenes import TASKS, Scene, caption, sets_of_split
from vlmds.evaluation.evaluated_runs import load_run
from vlmds.experiments.reading import load_experiment
from vlmds.training import sweep

CLIPS = {
    f"val_{task}_{number:05d}_{place}": scene
    for task in TASKS
    for number, own in enumerate(sets_of_split(task, "val", 60, 0))
    for place, scene in enumerate(own)
}
NAMES = ["e1", "e3", "e5", "e7", "e7-no-time", "e3-one-frame", "e3-pool4", "e3-seed1", "e3-seed2", "e3-seed3"]


def planted(folder, name, says=caption):
    """A run whose caption of a scene is says(scene)."""
    references = [caption(scene) for scene in CLIPS.values()]
    path = plant(folder / name, name[:2], clips=len(CLIPS), references=lambda clip: [references[clip]])
    file = path / "evaluation" / "val" / "predictions.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for line, (key, scene) in zip(lines, CLIPS.items(), strict=True):
        line |= {"key": key, "caption": says(scene)}
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return load_run(path)


def always_first(scene: Scene) -> str:
    """A caption that is the same for all clips of a set."""
    if scene.task == "order":
        first, second = sorted([(scene.colour, scene.shape), (scene.other_colour, scene.other_shape)])
        return caption(Scene("order", *first, *second))
    return caption(replace(scene, other_colour="red")) if scene.task == "later" else caption(scene)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    limited = {"e7-no-time": always_first, "e3-one-frame": always_first}
    limited["e3-pool4"] = lambda scene: caption(replace(scene, number=1))
    return {name: planted(folder, name, limited.get(name, caption)) for name in NAMES}


def outcomes(rows):
    return {row.name.partition(" (")[0]: row.outcome for row in rows}


def test_rows_of_models_that_do_as_expected(runs):
    rows = known_rows(runs, NAMES)
    by_name = {row.name.partition(" (")[0]: row for row in rows}
    assert {name: row.outcome for name, row in by_name.items() if row.exact} == {
        "order: e7-no-time": "pass",
        "later: e3-one-frame": "pass",
    }
    assert by_name["order: e7-no-time"].values == {"e7-no-time": 50.0, "limit": 50.0}
    assert by_name["later: e3-one-frame"].values["e3-one-frame"] <= 20.0
    assert by_name["order: e7-no-time"].clips == 60 and by_name["order: e7-no-time"].seconds > 0
    assert by_name["control"].outcome == "as expected" and "named: e5, cheapest: e5" in by_name["control"].measured
    assert by_name["order: e3"].outcome == by_name["later: e3"].outcome == "as expected"
    assert by_name["counting: e3 less e7"].outcome == "not as expected"  # both are right
    assert by_name["counting: pooling"].values == {"e3": 100.0, "e3-pool4": pytest.approx(20.0, abs=2)}
    assert by_name["e3 against itself, other seeds"].outcome == "as expected"
    table = rows_table(rows)
    assert table.count("\n") == len(rows) + 1 and "(exact)" in table and "| pass |" in table
    assert "reported: as expected" in table and "reported: reported" not in table


def test_rows_of_models_that_see_more_than_they_can_fail(runs):
    """As if frame times reached the resampler, or a later frame the model of one frame."""
    rows = outcomes(known_rows(runs | {"e7-no-time": runs["e7"], "e3-one-frame": runs["e3"]}, NAMES))
    assert rows["order: e7-no-time"] == rows["later: e3-one-frame"] == "fail"


def test_a_difference_is_found_and_a_model_that_fails_the_control_is_no_tie(runs, tmp_path):
    poor = planted(tmp_path, "e7", lambda scene: caption(replace(scene, colour="red", number=1)))
    rows = outcomes(known_rows(runs | {"e7": poor}, NAMES))
    assert rows["control"] == "not as expected" and rows["counting: e3 less e7"] == "as expected"
    other = {name: planted(tmp_path, name, lambda scene: "") for name in ("e3-seed2", "e3-seed3")}
    assert outcomes(known_rows(runs | other, NAMES))["e3 against itself, other seeds"] == "not as expected"


def test_rows_without_their_runs_are_not_measured(runs):
    rows = known_rows({"e3": runs["e3"]}, NAMES)
    assert {row.outcome for row in rows if row.runs == ["e3"]} == {"as expected"}
    assert {row.outcome for row in rows if row.runs != ["e3"]} == {"not measured"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--known"], "--known: goes with --demo"),
        (["--demo", "--quick"], "--known: goes with --demo"),
        (["--demo", "--known", "e3"], "EXP: not with --known"),
        (["--demo", "--known", "--seeds", "2"], "--seeds: not with --known"),
        (["--demo", "--known", "--data", "d"], "--data: not with --known"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert main(["sweep", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("size", [FULL, QUICK])
def test_forms_are_experiments_that_change_what_they_say(size, tmp_path):
    found = {form.name: load_experiment(write_form(form, tmp_path, size)) for form in size.forms}
    assert [*found] == [experiment.name for experiment in found.values()]
    assert not found["e7-no-time"].projector.temporal_embedding and found["e7"].projector.temporal_embedding
    assert found["e7"].projector.num_queries == 16 and found["e3-pool4"].vision.pool == 4
    one = found["e3-one-frame"]
    assert one.data.num_frames == 1 and one.data.path.endswith("shards-1") and one.vision == found["e3"].vision
    assert {e.training.seed for name, e in found.items() if "seed" not in name} == {0}
    seeds = {e.training.seed for name, e in found.items() if name.startswith("e3-seed")}
    assert seeds == ({1, 2, 3} if size is FULL else set())
    assert [e.priority for e in found.values()] == [*range(1, len(found) + 1)]


def test_the_whole_command_on_the_smallest_size_and_again(tmp_path, monkeypatch, capfd):
    """A model of two steps is right by chance at most: the exact row passes."""

    def run(command, env):
        return SimpleNamespace(returncode=exit_code(0, *command[1:], log=tmp_path / "log", **env))

    monkeypatch.setattr(sweep, "subprocess", SimpleNamespace(run=run))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    size = replace(QUICK, train=5, val=5, clip_steps=2, llm_steps=2, forms=(ONE_FRAME,))
    short = [f"stages.{n}.{k}" for n in (0, 1) for k in ("epochs=null", "steps=1")]
    arguments = (tmp_path, size, "python", {"DS_ACCELERATOR": "cpu"}, ("--max-new-tokens", "4"), tuple(short))
    assert known_sweep(*arguments) == 0
    printed = capfd.readouterr().out
    assert "later: e3-one-frame" in printed and "| pass |" in printed and "24 validation clips" in printed
    saved = json.loads((tmp_path / "known.json").read_text())
    (row,) = saved["rows"]
    assert row["exact"] and row["outcome"] == "pass" and row["clips"] == 5 and not saved["resumed"]
    assert "| pass |" in (tmp_path / "known.md").read_text(encoding="utf-8")
    monkeypatch.setattr(sweep, "subprocess", SimpleNamespace(run=lambda *_, **__: pytest.fail("started again")))
    assert known_sweep(*arguments) == 0
    assert json.loads((tmp_path / "known.json").read_text())["resumed"]
