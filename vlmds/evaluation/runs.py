"""Runs with their evaluations, as `vlmds compare` reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlmds.errors import InputError
from vlmds.evaluation.evaluate import read_evaluation
from vlmds.experiments.differences import flat_settings
from vlmds.experiments.reading import load_experiment
from vlmds.experiments.schema import Experiment
from vlmds.runs.journal import read_metrics


@dataclass
class Run:
    """A run with its evaluation. predictions: by key. warnings: of its training, {"stage", "en", "ko"}."""

    name: str
    path: Path
    experiment: Experiment
    metrics: dict[str, Any]
    predictions: dict[str, dict]
    cost: dict[str, float | None]
    curves: list[dict]
    finished: bool
    warnings: list[dict] = field(default_factory=list)


@dataclass
class Group:
    """The runs of one experiment that differ only in the seed."""

    name: str
    runs: list[Run]

    @property
    def experiment(self) -> Experiment:
        return self.runs[0].experiment


def load_run(path: str | Path, evaluation: str | None = None) -> Run:
    """A run folder and its evaluation.

    Raises:
        InputError: no run, no evaluation, or several and none is chosen.
    """
    path = Path(path)
    if not (path / "run.json").is_file():
        raise InputError(f"{path}: not a run folder")
    root = path / "evaluation"
    found = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    if not found:
        raise InputError(f"{path}: no evaluation; run vlmds evaluate --run {path}")
    name = evaluation or ("val" if "val" in found else found[0] if len(found) == 1 else None)
    if name not in found:
        raise InputError(f"{path}: choose an evaluation with --evaluation: {', '.join(found)}")
    metrics, predictions = read_evaluation(root / name)
    metrics["folder"] = name
    experiment = load_experiment(path / "experiment.yaml")
    records = read_metrics(path / "metrics.jsonl")
    last = experiment.stages[-1].name
    finished = (path / "artifacts" / last / "artifact.json").is_file()
    return Run(
        path.name,
        path,
        experiment,
        metrics,
        {p["key"]: p for p in predictions},
        costs(records, metrics),
        curves(records, experiment),
        finished,
        [record for record in records if record["kind"] == "warning"],
    )


def with_unique_names(runs: Sequence[Run]) -> list[Run]:
    """The runs, where those whose folders have the same name are named by more of their paths."""
    paths = [run.path.absolute().parts for run in runs]
    named = []
    for number, (run, parts) in enumerate(zip(runs, paths, strict=True)):
        others = [other for place, other in enumerate(paths) if place != number and other != parts]
        length = 1
        while any(other[-length:] == parts[-length:] for other in others):
            length += 1
        copies = paths[:number].count(parts)  # the same folder given again
        name = "/".join(parts[-length:]) + (f" ({copies + 1})" if copies else "")
        named.append(replace(run, name=name))
    return named


def group_runs(runs: list[Run]) -> list[Group]:
    """Groups of runs that differ only in the seed, in the order given."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = flat_settings(run.experiment.model_dump())
        identity = {k: v for k, v in settings.items() if k not in ("name", "owner", "priority", "training.seed")}
        same = [r.experiment.training.seed for r in groups.get(json.dumps(identity, default=str), [])]
        key = json.dumps(identity, default=str)
        if run.experiment.training.seed in same:  # the same run twice is no new seed
            key += str(run.path)
        groups.setdefault(key, []).append(run)
    made: list[Group] = []
    for members in groups.values():
        name = members[0].name if len(members) == 1 else members[0].experiment.name
        if name in [group.name for group in made]:
            name = str(members[0].path)
        made.append(Group(name, members))
    return made


def costs(records: list[dict], metrics: dict) -> dict[str, float | None]:
    """visual_tokens, trainable (parameters), samples_per_s, memory_gib, hours of training
    (validation and checkpoints not counted) and kilowatt_hours of the GPUs (all counted)."""
    seconds, pending, samples = 0.0, 0, 0
    for record in (r for r in records if r["kind"] == "train"):
        pending += record["samples"]
        if record.get("samples_per_s"):  # of the window that ends here
            seconds += pending / record["samples_per_s"]
            samples, pending = samples + pending, 0
    speeds = samples / seconds if seconds else None
    memory = [r["memory_gib"] for r in records if r.get("memory_gib")]
    joules = {r["stage"]: r["joules"] for r in records if r["kind"] == "energy"}
    model = metrics["model"]
    return {
        "visual_tokens": model["visual_tokens"],
        "trainable": model["projector_parameters"] + model["adapter_parameters"],
        "samples_per_s": speeds,
        "memory_gib": max(memory, default=None),
        "hours": seconds / 3600 if seconds else None,
        "kilowatt_hours": sum(joules.values()) / 3.6e6 if joules else None,
    }


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
