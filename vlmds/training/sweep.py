"""`vlmds sweep`: several experiments, one after the other by priority, each trained and evaluated.

Finished jobs are skipped and interrupted ones go on, because training and evaluation do so themselves.
After an experiment that fails the others still run.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlmds.console.progress import log_line
from vlmds.errors import InputError
from vlmds.experiments.reading import load_experiment, packaged_experiments
from vlmds.experiments.schema import Experiment
from vlmds.models.artifact import is_artifact, weights_sha256
from vlmds.training.ds_config import REPOSITORY

STOPPED = 3  # exit code of a training that a signal stopped after it saved


@dataclass
class Job:
    """One run of the sweep. exp: the value of ``--exp``. first_stage: a run whose stage 1 this one
    starts from. tuned: the record of how its learning rates were chosen. state: its state in the table."""

    name: str
    exp: str
    experiment: Experiment
    run: Path
    overrides: list[str]
    first_stage: Path | None = None
    tuned: Path | None = None
    state: str = "waiting"

    @property
    def artifact(self) -> Path:
        return self.run / "artifacts" / self.experiment.stages[-1].name

    @property
    def trained(self) -> bool:
        return is_artifact(self.artifact)

    @property
    def evaluated(self) -> bool:
        """Whether there is an evaluation of the artifact's present weights."""
        if not self.trained:
            return False
        weights = weights_sha256(self.artifact)
        for path in self.run.glob("evaluation/*/metrics.json"):
            try:
                if json.loads(path.read_text())["settings"]["weights_sha256"] == weights:
                    return True
            except (ValueError, KeyError):
                continue  # damaged: evaluate again
        return False


def plan_jobs(
    exps: list[str], output: Path, *, seeds: int = 1, share_stage1: bool = False, overrides: tuple[str, ...] = ()
) -> list[Job]:
    """The runs in order of priority; of several seeds, each experiment's first ones first.

    Raises:
        InputError: no or unknown experiments, or two of the same name.
    """
    if not exps:
        raise InputError("no experiments: name some, or give --all or --owner")
    if seeds < 1:
        raise InputError(f"--seeds {seeds}: must be at least 1")
    loaded = [(exp, load_experiment(exp, overrides)) for exp in (_known(exp) for exp in exps)]
    names = [experiment.name for _, experiment in loaded]
    if len(set(names)) < len(names):
        raise InputError(f"two experiments have the same name: {', '.join(names)}")
    last = float("inf")  # without a priority
    loaded.sort(key=lambda pair: (pair[1].priority or last, pair[1].name))
    jobs: list[Job] = []
    for seed in range(seeds):
        first: dict[str, Path] = {}  # what stage 1 depends on -> the run that trains it
        for exp, experiment in loaded:
            name, extra = experiment.name, list(overrides)
            if seeds > 1:
                name += f"-seed{seed}"
                extra.append(f"training.seed={experiment.training.seed + seed}")
            job = Job(name, exp, experiment, output / name, extra)
            if share_stage1 and "peft" not in experiment.stages[0].train:
                job.first_stage = first.get(identity := _stage1_identity(experiment))
                first.setdefault(identity, job.run)
            jobs.append(job)
    return jobs


def choose(exps: list[str], every: bool, owner: str | None) -> list[str]:
    """The experiments that the command line selects."""
    numbered = [name for name in packaged_experiments() if name[1:].isdigit()]
    if every:
        return numbered
    if owner is not None:
        found = [n for n in numbered if (load_experiment(n).owner or "").lower() == owner.lower()]
        if not found:
            raise InputError(f"--owner {owner}: owns no experiment")
        return found
    return exps


def train_command(job: Job, data: str | None, launcher: str) -> list[str]:
    command = [
        *shlex.split(launcher),
        str(REPOSITORY / "launch" / "train.py"),
        "--exp",
        job.exp,
        *(["--data", data] if data else []),
        "--output",
        str(job.run),
    ]
    if job.first_stage is not None:
        command += ["--from", str(job.first_stage)]
    if job.tuned is not None:
        command += ["--tuned", str(job.tuned)]
    return [*command, *(["--set", *job.overrides] if job.overrides else [])]


def evaluate_command(job: Job, data: str | None, launcher: str, options: tuple[str, ...] = ()) -> list[str]:
    """The command of an evaluation, started by the training's launcher if that can start a module on
    all its GPUs, else by one process. If the last stage has data of its own, that is evaluated."""
    words = shlex.split(launcher)
    names = [Path(word).name for word in words]
    if names[0] == "deepspeed":
        start = [*words, "--module"]
    elif "torchrun" in names:
        start = [*words, "-m"]
    else:
        start = [sys.executable, "-m"]
    last = job.experiment.stages[-1].data
    named = ["--data", data] if data and not (last and last.given) else []
    return [*start, "vlmds.cli", "evaluate", "--run", str(job.run), *named, *options]


def run_jobs(
    jobs: list[Job],
    data: str | None,
    launcher: str,
    evaluate_options: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
    tune: Callable[[Job], int] | None = None,
) -> int:
    """Train and evaluate all; returns 0, 2 if one refused its input, 3 if a signal stopped one
    (the rest is then left), 1 if one failed.

    Args:
        tune: called before a training, to choose its learning rates; returns an exit code.
    """
    if not (REPOSITORY / "launch" / "train.py").is_file():
        raise InputError(f"{REPOSITORY}/launch/train.py: not there; run from a checkout")
    environment = environment or {}
    codes = [0]
    for job in jobs:
        if job.trained and job.evaluated:
            job.state = "done before"
            continue
        for task in ("tuning", "training", "evaluation"):
            if task != "evaluation" and job.trained:
                continue
            job.state = task
            if task == "tuning":
                code = tune(job) if tune else 0
            elif task == "training":
                code = run_command(job.name, train_command(job, data, launcher), environment)
            else:
                evaluate = evaluate_command(job, data, launcher, evaluate_options)
                code = run_command(job.name, evaluate, environment)
            if code:
                job.state = f"{task} stopped" if code == STOPPED else f"{task} failed ({code})"
                codes.append(code if code in (2, STOPPED) else 1)
                break
        else:
            job.state = "done"
        if STOPPED in codes:
            break
    return STOPPED if STOPPED in codes else 1 if 1 in codes else max(codes)


def run_command(name: str, command: list[str], environment: dict[str, str]) -> int:
    """Run a command of a job, with changes of the environment; returns its exit code."""
    everything = {**os.environ, **environment}
    everything["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{everything.get('PATH', '')}"
    log_line(f"vlmds: {name}: {shlex.join(command)}")
    return subprocess.run(command, env=everything).returncode


def status_table(jobs: list[Job]) -> str:
    lines = [f"{'run':<16}{'projector':<13}{'adapter':<9}{'trained':<9}{'evaluated':<11}state"]
    for job in jobs:
        yes = ["yes" if fact else "no" for fact in (job.trained, job.evaluated)]
        lines.append(
            f"{job.name:<16}{job.experiment.projector.type:<13}"
            f"{job.experiment.peft.type:<9}{yes[0]:<9}{yes[1]:<11}{job.state}"
        )
    return "\n".join(lines)


def slurm_script(jobs: list[Job], data: str | None, launcher: str, evaluate_options: tuple[str, ...] = ()) -> str:
    """An array of jobs; those that start from another's stage 1 wait for that one's artifact."""
    lines = [
        "#!/bin/bash",
        "#SBATCH --job-name=vlmds",
        f"#SBATCH --array=0-{len(jobs) - 1}",
        "#SBATCH --nodes=1",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --requeue",
        "#SBATCH --output=%x-%a.out",
        "set -euo pipefail",
        'case "$SLURM_ARRAY_TASK_ID" in',
    ]
    for number, job in enumerate(jobs):
        lines.append(f"{number})")
        if job.first_stage is not None:
            stage = job.experiment.stages[0].name
            artifact = job.first_stage / "artifacts" / stage / "artifact.json"
            lines.append(f"  until [ -f {shlex.quote(str(artifact))} ]; do sleep 60; done")
        lines += [
            f"  {shlex.join(train_command(job, data, launcher))}",
            f"  {shlex.join(evaluate_command(job, data, launcher, evaluate_options))} ;;",
        ]
    return "\n".join([*lines, "esac", ""])


def _known(exp: str) -> str:
    """A packaged experiment by its lower-case name; a file as it is."""
    return exp if Path(exp).is_file() else exp.lower() if exp.lower() in packaged_experiments() else exp


def _stage1_identity(experiment: Experiment) -> str:
    """Experiments of the same identity train the same first stage, which has no adapter."""
    tree = experiment.model_dump(exclude={"name", "owner", "priority", "peft", "logging"})
    tree["stages"] = tree["stages"][:1]
    return repr(tree)
