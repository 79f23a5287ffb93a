"""`vlmds sweep --tune lr`: the choice of rates, and real pilots of tiny models, of which one diverges and one is
stopped."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import tiny
from tests.evaluation.conftest import shards  # noqa: F401
from tests.training.launch import exit_code
from vlmds.cli import main
from vlmds.errors import InputError
from vlmds.evaluation.compare import compare
from vlmds.evaluation.evaluated_runs import load_run
from vlmds.experiments.reading import load_experiment
from vlmds.runs.tuning import chosen_rates, read_tuning, tuned_record
from vlmds.training import sweep
from vlmds.training.tune import FACTORS, at_edge, best, beyond, pilot_experiment, total_hours


def pilots(losses: dict[float, float | None]) -> list[dict]:
    return [{"factor": f, "lr": f / 1000, "loss": loss, "gpu_hours": 0.5} for f, loss in losses.items()]


def test_the_smallest_loss_decides_and_one_more_rate_is_tried_at_an_end():
    inside = pilots({0.1: 3.0, 0.3: 1.0, 1.0: 2.0, 3.0: None})
    assert best(inside)["factor"] == 0.3 and not at_edge(inside) and beyond(inside, [*FACTORS]) == []
    below = pilots({0.1: 1.0, 0.3: 2.0, 1.0: 2.0, 3.0: 9.0})
    assert beyond(below, [*FACTORS]) == [0.0333]
    above = pilots({0.1: 4.0, 0.3: 3.0, 1.0: 2.0, 3.0: 1.0})
    assert beyond(above, [*FACTORS]) == [9.0]
    once = [*above, *pilots({9.0: 0.5})]
    assert at_edge(once) and beyond(once, [*FACTORS]) == []  # once only
    assert not at_edge([*above, *pilots({9.0: 1.5})])
    assert best(pilots({0.1: 1.0, 1.0: 1.0}))["factor"] == 0.1
    nothing = pilots(dict.fromkeys(FACTORS))
    assert best(nothing) is None and beyond(nothing, [*FACTORS]) == []


def test_the_cost_is_known_only_if_it_is_of_every_pilot():
    stages = [{"pilots": pilots({0.1: 1.0, 1.0: None})}, {"pilots": pilots({1.0: 2.0})}]
    assert total_hours({"stages": stages}) == 1.5
    stages[1]["pilots"][0]["gpu_hours"] = None
    assert total_hours({"stages": stages}) is None


def test_a_pilot_is_the_stage_at_another_rate_for_a_share_of_its_length():
    experiment = load_experiment("e7", ["stages.1.epochs=null", "stages.1.steps=40", "training.early_stopping=3"])
    first = pilot_experiment(experiment, 0, 3e-4, 0.1)
    assert [stage.name for stage in first.stages] == ["align"]
    assert first.stages[0].lr == 3e-4 and first.stages[0].epochs == pytest.approx(0.2)
    second = pilot_experiment(experiment, 1, 1e-5, 0.1)
    assert second.stages[0] == experiment.stages[0] and (second.stages[1].lr, second.stages[1].steps) == (1e-5, 4)
    assert second.training.early_stopping is None and second.training.seed == experiment.training.seed
    assert pilot_experiment(experiment, 1, 1e-5, 0.001).stages[1].steps == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rates", "1,3"], "--rates: goes with --tune lr"),
        (["--tune", "lr", "--rates", "1"], "--rates: give two or more"),
        (["--tune", "lr", "--rates", "0,1"], "--rates: give two or more"),
        (["--tune", "lr", "--tune-share", "200%"], "--tune-share 2: must be above 0"),
        (["--tune", "lr", "--emit", "slurm"], "--emit: not with --tune lr"),
        (["--tune", "lr", "--share-stage1"], "--share-stage1: not with --tune lr"),
    ],
)
def test_bad_options_are_refused_in_one_line(arguments, message, capsys):
    assert main(["sweep", "e1", "--data", "d", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_runs_begun_without_tuning_are_not_tuned_later(tmp_path, capsys):
    (tmp_path / "e1").mkdir()
    (tmp_path / "e1" / "run.json").write_text("{}")
    assert main(["sweep", "e1", "--data", "d", "--output", str(tmp_path), "--tune", "lr"]) == 2
    assert "was begun without --tune lr" in capsys.readouterr().err


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Those that the sweep starts, each in a forked process; the numbers in `stopped` end as a signal ends them."""
    started: list[list[str]] = []
    stopped: list[int] = []

    def run(command, env):
        started.append(command)
        if len(started) in stopped:
            return SimpleNamespace(returncode=sweep.STOPPED)
        return SimpleNamespace(returncode=exit_code(0, *command[1:], log=tmp_path / "log", **env))

    monkeypatch.setattr(sweep, "subprocess", SimpleNamespace(run=run))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return SimpleNamespace(started=started, stopped=stopped)


def outputs(started: list[list[str]]) -> list[str]:
    return [Path(command[command.index("--output") + 1]).name for command in started if "--output" in command]


def test_pilots_choose_go_on_after_a_stop_and_are_recorded(shards, tmp_path, commands, capfd):  # noqa: F811
    runs, models = tmp_path / "runs", tiny.make_models(tmp_path / "models")
    (tmp_path / "good.yaml").write_text(f"extends: e3.yaml\nname: good\ndata: {{num_frames: {tiny.FRAMES}}}\n")
    command = [
        "sweep", str(tmp_path / "good.yaml"), "--data", str(shards), "--output", str(runs), "--launcher",
        sys.executable, "--tune", "lr", "--rates", "1,1e30", "--tune-share", "50%", "--set", *tiny.settings(models),
    ]  # fmt: skip
    commands.stopped.append(2)
    assert main(command) == sweep.STOPPED
    record = read_tuning(runs / "tune" / "good" / "tune.json")
    assert [pilot["factor"] for pilot in record["stages"][0]["pilots"]] == [1.0]
    first = runs / "tune" / "good" / "align-lr0.001" / "run.json"
    before = first.read_bytes()
    commands.started.clear()
    commands.stopped.clear()
    assert main(command) == 0, capfd.readouterr().err

    # The finished pilot was not started again; 1e30 diverged, and one rate was tried beyond the other end.
    assert first.read_bytes() == before
    assert outputs(commands.started) == [
        "align-lr1e+27", "align-lr1e-33", "finetune-lr5e-05", "finetune-lr5e+25", "finetune-lr5e-35", "good",
    ]  # fmt: skip
    record = read_tuning(runs / "tune" / "good" / "tune.json")
    for stage in record["stages"]:
        losses = {pilot["lr"]: pilot["loss"] for pilot in stage["pilots"]}
        assert losses.pop(stage["base"] * 1e30) is None and len(losses) == 2
        assert stage["chosen"] == min(losses, key=losses.get)
        assert stage["edge"] == (stage["chosen"] == min(losses))
    assert record["gpu_hours"] > 0

    run = json.loads((runs / "good" / "run.json").read_text())
    assert run["tuned"] == record
    trained = load_experiment(runs / "good" / "experiment.yaml")
    assert [stage.lr for stage in trained.stages] == [stage["chosen"] for stage in record["stages"]]
    assert [stage.steps for stage in trained.stages] == [6, 6]
    (row,) = compare([load_run(runs / "good")])["tuning"]["rows"]
    assert row["tuned"] and row["gpu_hours"] == record["gpu_hours"] and len(row["stages"][0]["rates"]) == 3

    # From finished pilots alone the same record comes again; another budget is refused.
    (runs / "tune" / "good" / "tune.json").unlink()
    (runs / "good" / "artifacts" / "finetune" / "artifact.json").unlink()
    commands.started.clear()
    commands.stopped.append(1)
    assert main(command) == sweep.STOPPED
    assert outputs(commands.started) == ["good"] and read_tuning(runs / "tune" / "good" / "tune.json") == record
    capfd.readouterr()
    assert main([word.replace("50%", "20%") for word in command]) == 2
    assert "was made with --rates 1,1e+30 --tune-share 0.5; give these" in capfd.readouterr().err
    with pytest.raises(InputError, match="stages.0.lr is 0.5; give the chosen rate"):
        tuned_record(runs / "tune" / "good" / "tune.json", load_experiment("e3", ["stages.0.lr=0.5"]))
    assert tuned_record(runs / "tune" / "good" / "tune.json", load_experiment("e3", chosen_rates(record))) == record
