"""Runs with their evaluations, as `vlmds compare` reads them."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from sys import intern
from typing import Any

from vlmds.errors import InputError
from vlmds.evaluation.cost import COST, Cost, captioning_speed, run_cost
from vlmds.evaluation.outside_record import RECORD, Outside, read_outside
from vlmds.evaluation.saved import evaluation_folder, read_evaluation, unique_names
from vlmds.experiments.differences import flat_settings
from vlmds.experiments.reading import load_experiment
from vlmds.experiments.schema import Experiment
from vlmds.models.artifact import is_artifact, weights_sha256
from vlmds.runs.folder import HARMLESS, RunFolder
from vlmds.runs.journal import read_metrics

NOT_LEARNED = ("name", *HARMLESS)
"""Settings that do not change what is learned; owner and priority are among them."""


@dataclass
class Run:
    """A run with its evaluation.

    record: run.json. predictions: by key. cost: by the keys of :data:`vlmds.evaluation.cost.COST`, with more
    about it in cost_facts. steps: that were trained, by stage. changed: the evaluated weights are not those that
    the run has now.
    """

    name: str
    path: Path
    experiment: Experiment
    record: dict[str, Any]
    metrics: dict[str, Any]
    predictions: dict[str, dict]
    cost: dict[str, float | None]
    cost_facts: Cost
    curves: list[dict]
    steps: dict[str, int]
    finished: bool
    changed: bool
    warnings: list[dict] = field(default_factory=list)


@dataclass
class OutsideRun:
    """Captions that no run of vlmds made, with their evaluation; see :mod:`vlmds.evaluation.outside`.

    predictions: by key. cost: as a run's, None where not known.
    """

    name: str
    path: Path
    outside: Outside
    metrics: dict[str, Any]
    predictions: dict[str, dict]
    cost: dict[str, float | None]


Evaluated = Run | OutsideRun


@dataclass
class Group:
    """The runs of one experiment that differ only in the seed."""

    name: str
    runs: list[Run]

    @property
    def experiment(self) -> Experiment:
        return self.runs[0].experiment


def load_evaluated(paths: Sequence[str | Path], evaluation: str | None = None) -> tuple[list[Run], list[OutsideRun]]:
    """Runs, and outside evaluations, of which none has the name of another.

    Raises:
        InputError: as :func:`load_run`.
    """
    outside = [Path(path) for path in paths if (Path(path) / RECORD).is_file()]
    runs = [load_run(path, evaluation) for path in paths if Path(path) not in outside]
    found = [_load_outside(path, evaluation) for path in outside]
    names = [run.name for run in runs] + [run.name for run in found]
    return runs, [replace(run, name=str(run.path)) if names.count(run.name) > 1 else run for run in found]


def _load_outside(path: Path, evaluation: str | None) -> OutsideRun:
    outside = read_outside(path)
    metrics, predictions = _read(path, evaluation)
    cost: dict[str, float | None] = dict.fromkeys(COST)
    timing = metrics.get("timing", {})
    cost["captions_per_s"] = captioning_speed(timing)
    cost["memory_gib"] = timing.get("memory_gib")
    return OutsideRun(outside.name, path, outside, metrics, predictions, cost)


def _read(path: Path, evaluation: str | None) -> tuple[dict[str, Any], dict[str, dict]]:
    """The metrics and the predictions, by key, of one evaluation in a folder."""
    folder = evaluation_folder(path, evaluation)
    metrics, predictions = read_evaluation(folder)
    if not predictions:
        raise InputError(f"{folder}: no clip was evaluated; run vlmds evaluate --again")
    metrics["folder"] = folder.name
    return metrics, {p["key"]: _kept(p) for p in predictions}


def load_run(path: str | Path, evaluation: str | None = None) -> Run:
    """A run folder and its evaluation.

    Raises:
        InputError: no run, no evaluation, or several and none is chosen.
    """
    path = Path(path)
    if not (path / "run.json").is_file():
        raise InputError(f"{path}: not a run folder")
    metrics, predictions = _read(path, evaluation)
    record = RunFolder.read(path)
    experiment = load_experiment(path / "experiment.yaml")
    records = read_metrics(path / "metrics.jsonl")
    cost = run_cost(path, record, experiment, records, metrics)
    return Run(
        path.name,
        path,
        experiment,
        record,
        metrics,
        predictions,
        cost.values,
        cost,
        curves(records, experiment),
        {r["stage"]: r["step"] for r in records if r["kind"] == "train"},
        is_artifact(path / "artifacts" / experiment.stages[-1].name),
        _changed(path, metrics["settings"]),
        [record for record in records if record["kind"] == "warning"],
    )


def _kept(line: dict) -> dict:
    """A line of predictions.jsonl, which comparisons of many clips can have in memory: names are shared between
    lines, numbers are packed."""
    kept = {intern(name): value for name, value in line.items()}
    kept["scores"] = {intern(name): value for name, value in line["scores"].items()}
    kept["statistics"] = {intern(name): array("d", values) for name, values in line["statistics"].items()}
    return kept


def _changed(path: Path, settings: dict) -> bool:
    """Whether the run now has other weights of that stage than were evaluated."""
    artifact = path / "artifacts" / settings["artifact"]
    return is_artifact(artifact) and weights_sha256(artifact) != settings["weights_sha256"]


def with_unique_names(runs: Sequence[Run]) -> list[Run]:
    """The runs, where those whose folders have the same name are named by more of their paths."""
    names = unique_names([run.path for run in runs])
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def group_runs(runs: list[Run]) -> list[Group]:
    """Groups of runs that differ only in the seed, in the order given."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps(identity(run), default=str, sort_keys=True)
        if run.experiment.training.seed in [r.experiment.training.seed for r in groups.get(key, [])]:
            key += str(run.path)  # the same run twice is no new seed
        groups.setdefault(key, []).append(run)
    made: list[Group] = []
    for members in groups.values():
        name = members[0].name if len(members) == 1 else members[0].experiment.name
        if name in [group.name for group in made]:
            name = str(members[0].path)
        made.append(Group(name, members))
    return made


def identity(run: Run) -> dict[str, Any]:
    """All that a method is, but for the seed: settings that change what is learned, and what run.json
    records of data, base weights and global batch. The number of ranks is not of it."""
    settings = flat_settings(run.experiment.model_dump())
    found = {key: value for key, value in settings.items() if not under(key, (*NOT_LEARNED, "training.seed"))}
    found |= {name: run.record.get(name) for name in ("global_batch", "data_fingerprint", "sampling", "weights")}
    if not found["weights"]:  # runs of an early vlmds: by their names
        found["weights"] = [run.experiment.vision.model, run.experiment.llm.model]
    return found | {"stage": run.metrics["settings"].get("artifact")}


def under(key: str, names: Sequence[str]) -> bool:
    """Whether a dotted key is one of the names, or below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def curves(records: list[dict], experiment: Experiment, most: int = 400) -> list[dict]:
    """Loss curves [{stage, kind, step, loss}], each of at most ``most`` points."""
    found = []
    for stage in experiment.stages:
        for kind in ("train", "val"):
            points = [
                (r["step"], r["loss"])
                for r in records
                if r.get("stage") == stage.name
                and r["kind"] == kind
                and isinstance(r.get("loss"), float)
                and math.isfinite(r["loss"])
            ]
            points = points[:: max(1, math.ceil(len(points) / most))]
            if points:
                found.append(
                    {"stage": stage.name, "kind": kind, "step": [p[0] for p in points], "loss": [p[1] for p in points]}
                )
    return found
