"""The sweep: order, sharing, and real trainings of tiny models, one of which is refused."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests import tiny
from tests.evaluation.conftest import models, shards  # noqa: F401
from tests.training.launch import exit_code
from vlmds.cli import main
from vlmds.errors import InputError
from vlmds.training import sweep


def names(jobs):
    return [job.name for job in jobs]


def test_priority_orders_and_owner_chooses(tmp_path):
    assert names(sweep.plan_jobs(["E8", "e1", "E3"], tmp_path)) == ["e1", "e3", "e8"]
    assert sweep.choose([], False, "b") == ["e4", "e5", "e6"]
    assert len(sweep.choose([], True, None)) == 8
    jobs = sweep.plan_jobs(sweep.choose([], True, None), tmp_path)
    assert names(jobs) == ["e1", "e3", "e4", "e5", "e2", "e6", "e7", "e8"]
    assert all(job.first_stage is None for job in jobs)


def test_stage_1_is_shared_only_within_a_projector_and_a_seed(tmp_path):
    jobs = sweep.plan_jobs(sweep.choose([], True, None), tmp_path, share_stage1=True, seeds=2)
    from_run = {job.name: job.first_stage and job.first_stage.name for job in jobs}
    assert from_run["e2-seed1"] == "e1-seed1" and from_run["e4-seed0"] == "e3-seed0"
    assert from_run["e6-seed0"] == "e5-seed0" and from_run["e8-seed1"] == "e7-seed1"
    assert sum(v is None for v in from_run.values()) == 8 and len(jobs) == 16
    assert "training.seed=1" in jobs[-1].overrides


def test_the_slurm_script_is_bash_and_lists_every_run(tmp_path, capsys):
    assert main(["sweep", "--all", "--data", "d", "--emit", "slurm", "--share-stage1"]) == 0
    script = capsys.readouterr().out
    assert "--array=0-7" in script and script.count("launch/train.py") == 8
    assert script.count("until [ -f") == 4
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=10)


def test_evaluation_runs_on_all_gpus_of_the_launcher(tmp_path):
    job = sweep.plan_jobs(["e1"], tmp_path)[0]

    def start(launcher):
        command = sweep.evaluate_command(job, "data", launcher, ("--beams", "3"))
        return command[: command.index("evaluate")]

    assert start("deepspeed --num_gpus 8") == ["deepspeed", "--num_gpus", "8", "--module", "vlmds.cli"]
    assert start("srun torchrun --nproc-per-node 8")[-3:] == ["8", "-m", "vlmds.cli"]
    assert start("python") == [sys.executable, "-m", "vlmds.cli"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no experiments"),
        (["e9", "--data", "d"], "no such experiment"),
        (["--owner", "Z", "--data", "d"], "owns no experiment"),
        (["e1"], "--data: no data given"),
        (["e1", "E1", "--data", "d"], "same name"),
        (["e1", "--data", "d", "--seeds", "0"], "--seeds"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    if not arguments:
        arguments = ["--data", "d"]
    assert main(["sweep", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_trains_evaluates_compares_and_skips_what_is_done(models, shards, tmp_path, monkeypatch, capfd):  # noqa: F811
    """Its commands are run in forked processes."""

    def run(command, env):
        return SimpleNamespace(returncode=exit_code(0, *command[1:], log=tmp_path / "log", **env))

    monkeypatch.setattr(sweep, "subprocess", SimpleNamespace(run=run))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bad.yaml").write_text(
        "extends: e1.yaml\nname: bad\ndata: {num_frames: 5}\n"
    )  # not what the shards contain
    short = [*tiny.settings(models), "stages.0.steps=1", "stages.1.steps=1"]
    short = [s for s in short if not s.startswith("data.num_frames")]
    (tmp_path / "good.yaml").write_text(f"extends: e3.yaml\nname: good\ndata: {{num_frames: {tiny.FRAMES}}}\n")
    command = [
        "sweep",
        str(tmp_path / "bad.yaml"),
        str(tmp_path / "good.yaml"),
        "--data",
        str(shards),
        "--output",
        str(tmp_path / "runs"),
        "--launcher",
        sys.executable,
        "--set",
        *short,
    ]
    assert main(command) == 2
    printed = capfd.readouterr().out
    assert "training failed (2)" in printed and (tmp_path / "runs" / "report.html").is_file()
    assert (tmp_path / "runs" / "good" / "evaluation" / "val" / "metrics.json").is_file()
    with pytest.raises(InputError):
        sweep.plan_jobs([], tmp_path)
    assert main([*command[:1], *command[2:]]) == 0
    again = capfd.readouterr().out
    assert "done before" in again and "launch/train.py" not in again
    metrics = tmp_path / "runs" / "good" / "evaluation" / "val" / "metrics.json"
    job = sweep.plan_jobs([str(tmp_path / "good.yaml")], tmp_path / "runs")[0]
    assert job.evaluated
    metrics.write_text(metrics.read_text().replace('"weights_sha256": "', '"weights_sha256": "0'))
    assert not job.evaluated  # of other weights
