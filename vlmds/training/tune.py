"""`vlmds sweep --tune lr`: the learning rate of each stage, chosen by short pilot runs before the training.

Each experiment gets the same budget. For one stage after the other, a pilot trains each rate for a share of the stage's
steps, from the best pilot of the stage before; the smallest validation loss at the end decides. If that rate is
the lowest or highest, one more is tried beyond it. Pilots are ordinary run folders in
OUTPUT/tune/NAME: finished ones are skipped and interrupted ones go on.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmds.console.progress import log_line
from vlmds.errors import InputError
from vlmds.evaluation.cost import stage_times
from vlmds.experiments.reading import parse_experiment, to_yaml
from vlmds.experiments.schema import Experiment
from vlmds.files import write
from vlmds.models.artifact import is_artifact
from vlmds.runs.folder import RunFolder, check_same_experiment
from vlmds.runs.journal import read_metrics
from vlmds.runs.tuning import FILE, chosen_rates, read_tuning, write_tuning
from vlmds.training.ledger import SKIPPED
from vlmds.training.sweep import STOPPED, Job, run_command, train_command

FACTORS = (0.1, 0.3, 1.0, 3.0)
"""Rates that are tried, as multiples of the stage's own."""
SHARE = 0.1
"""Share of a stage's steps that a pilot trains."""


@dataclass(frozen=True)
class Tuning:
    """How to tune. output: the sweep's folder. The rest as in :func:`vlmds.training.sweep.run_jobs`."""

    output: Path
    data: str | None
    launcher: str
    environment: dict[str, str]
    factors: tuple[float, ...] = FACTORS
    share: float = SHARE

    def __post_init__(self):
        if len(self.factors) < 2 or min(self.factors) <= 0 or len({*self.factors}) < len(self.factors):
            raise InputError("--rates: give two or more different positive multiples, such as 0.1,0.3,1,3")
        if not 0 < self.share <= 1:
            raise InputError(f"--tune-share {self.share:g}: must be above 0 and at most 1")

    def folder(self, job: Job) -> Path:
        """Of the pilots and tune.json; the seeds of an experiment share it."""
        return self.output / "tune" / job.experiment.name


def check_untuned(jobs: list[Job]) -> None:
    """Raise :class:`InputError` if one of the runs exists, and its rates were not chosen by pilots."""
    for job in jobs:
        if (job.run / "run.json").is_file() and "tuned" not in RunFolder.read(job.run):
            raise InputError(f"{job.run}: was begun without --tune lr; choose another --output, or leave --tune out")


def tune(job: Job, how: Tuning) -> int:
    """Choose the rates of all stages, and give them to the job. Returns an exit code: 0, 2 if the input was refused,
    3 if a signal stopped a pilot, 1 if one failed or no rate works."""
    try:
        record = _begin(job, how)
        path = how.folder(job) / FILE
        for number in range(len(record["stages"])):
            if record["stages"][number]["chosen"] is None and (code := _tune_stage(job, number, record, how)):
                return code
    except InputError as error:
        log_line(f"vlmds: {error}", sys.stderr)
        return 2
    job.overrides, job.tuned = [*job.overrides, *chosen_rates(record)], path
    log_line(f"vlmds: {job.name}: tuned: {', '.join(chosen_rates(record))}")
    return 0


def _begin(job: Job, how: Tuning) -> dict[str, Any]:
    """The record so far. Raises InputError if that is of another budget or another experiment."""
    folder, experiment = how.folder(job), job.experiment
    budget = {"factors": sorted(how.factors), "share": how.share}
    if (folder / FILE).is_file():
        record = read_tuning(folder / FILE)
        if budget != {name: record[name] for name in budget}:
            rates = ",".join(f"{factor:g}" for factor in record["factors"])
            raise InputError(
                f"{folder / FILE}: was made with --rates {rates} --tune-share {record['share']:g}; give these, or "
                "choose another --output"
            )
        check_same_experiment(folder, experiment)
        return record
    stages: list[dict] = [
        {"stage": stage.name, "base": stage.lr, "chosen": None, "edge": False, "pilots": []}
        for stage in experiment.stages
    ]
    record = {"experiment": experiment.name, **budget, "stages": stages, "gpu_hours": 0.0}
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "experiment.yaml", to_yaml(experiment))
    write_tuning(folder / FILE, record)
    return record


def _tune_stage(job: Job, number: int, record: dict[str, Any], how: Tuning) -> int:
    """Run the pilots of one stage that are missing, and choose. Returns an exit code as :func:`tune`."""
    stage = record["stages"][number]
    waiting = list(record["factors"])
    while waiting or (waiting := beyond(stage["pilots"], record["factors"])):
        factor = waiting.pop(0)
        if factor in [pilot["factor"] for pilot in stage["pilots"]]:
            continue
        code, pilot = _pilot(job, number, factor, record, how)
        if pilot is None:
            return code
        stage["pilots"].append(pilot)
        record["gpu_hours"] = total_hours(record)
        write_tuning(how.folder(job) / FILE, record)
    found = best(stage["pilots"])
    if found is None:
        raise InputError(
            f"stages.{number}.lr: the training of {job.name} diverges at all rates that were tried "
            f"({', '.join(str(pilot['lr']) for pilot in stage['pilots'])}); lower it, then remove {how.folder(job)}"
        )
    stage |= {"chosen": found["lr"], "edge": at_edge(stage["pilots"])}
    write_tuning(how.folder(job) / FILE, record)
    if stage["edge"]:
        log_line(f"vlmds: WARNING: {job.name}: {stage['stage']}: the chosen rate {found['lr']:g} is the last one tried")
    return 0


def best(pilots: list[dict]) -> dict | None:
    """The pilot with the smallest loss, of equal ones the lower rate; None if all diverged."""
    known = [pilot for pilot in pilots if pilot["loss"] is not None]
    return min(known, key=lambda pilot: (pilot["loss"], pilot["lr"]), default=None)


def at_edge(pilots: list[dict]) -> bool:
    """Whether no lower or no higher rate than the best one was tried."""
    found, rates = best(pilots), [pilot["lr"] for pilot in pilots]
    return found is not None and found["lr"] in (min(rates), max(rates))


def beyond(pilots: list[dict], factors: list[float]) -> list[float]:
    """The factor to try beyond ``factors``, by the ratio of the outer two, if the best rate is the lowest or highest;
    none if one was tried already."""
    if len(pilots) > len(factors) or not at_edge(pilots):
        return []
    found = best(pilots)
    low, next_low, next_high, high = (sorted(factors)[i] for i in (0, 1, -2, -1))
    factor = low * low / next_low if found and found["factor"] == low else high * high / next_high
    return [float(f"{factor:.3g}")]


def total_hours(record: dict[str, Any]) -> float | None:
    """GPU-hours of all pilots; None if not known of one."""
    hours = [pilot["gpu_hours"] for stage in record["stages"] for pilot in stage["pilots"]]
    return None if None in hours else math.fsum(hours)


def pilot_experiment(experiment: Experiment, number: int, lr: float, share: float) -> Experiment:
    """The experiment up to stage ``number``, with this rate there and a share of its steps. Validated once, at the
    end; what is only of use in a long run is off."""
    tree = experiment.model_dump()
    tree["stages"] = tree["stages"][: number + 1]
    last = tree["stages"][-1]
    last["lr"] = lr
    if last["steps"] is not None:
        last["steps"] = max(1, round(share * last["steps"]))
    else:
        last["epochs"] = share * last["epochs"]
    tree["training"] |= {
        "validate_every": 10**9,
        "evaluate_every": None,
        "best_metric": "loss",
        "keep": "last",
        "early_stopping": None,
        "blind_check": None,
        "keep_checkpoints": 1,
    }
    tree["logging"]["wandb_project"] = None
    return parse_experiment(tree, f"{experiment.name}, pilot")


def _pilot(
    job: Job, number: int, factor: float, record: dict[str, Any], how: Tuning
) -> tuple[int, dict[str, Any] | None]:
    """Run one pilot, unless it is finished. Returns (exit code, its record), or None for the record if it did not
    come to an end for another reason than its rate."""
    stage = job.experiment.stages[number]
    lr = float(f"{stage.lr * factor:.3g}")
    run = how.folder(job) / f"{stage.name}-lr{lr:g}"
    pilot = pilot_experiment(job.experiment, number, lr, how.share)
    code = 0
    if not is_artifact(run / "artifacts" / stage.name):
        file = run.parent / f"{run.name}.yaml"
        write(file, to_yaml(pilot))
        before = None
        if number:
            parent = record["stages"][number - 1]
            before = Path(next(p["run"] for p in parent["pilots"] if p["lr"] == parent["chosen"]))
        code = run_command(
            f"{job.name}, pilot {run.name}",
            train_command(Job(run.name, str(file), pilot, run, [], before), how.data, how.launcher),
            how.environment,
        )
    lines = read_metrics(run / "metrics.jsonl")
    skipped = _skipped(run, stage.name)
    if code == STOPPED or (code and not skipped):
        return code, None
    losses = [line["loss"] for line in lines if line["kind"] == "val" and line["stage"] == stage.name]
    if not losses and not skipped:
        raise InputError(f"--tune lr: {job.name} has no validation loss to choose by; pack a split val")
    loss = None if skipped or not math.isfinite(losses[-1]) else losses[-1]
    times = stage_times(lines, RunFolder.read(run)).get(stage.name)
    hours = times.gpu_hours if times else None
    return 0, {"factor": factor, "lr": lr, "loss": loss, "gpu_hours": hours, "run": str(run)}


def _skipped(run: Path, stage: str) -> bool:
    """Whether a step of the stage was skipped, because its loss or gradient was not finite."""
    path = run / "ledger.jsonl"
    if not path.is_file():
        return False
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return any(r.get("stage") == stage and r.get("reason", "").startswith(SKIPPED) for r in records)
