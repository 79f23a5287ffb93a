"""Record of how the learning rates of an experiment were chosen: tune.json, written by `vlmds sweep --tune lr`.

factors, share   the budget: the rates tried, as multiples of each stage's own, and the pilots' share of its steps
stages           for each stage its own rate ("base"), the one "chosen" (null: not yet), whether this is the lowest
                 or highest of all tried ("edge"), and the pilots
pilots           for each its factor and rate, the validation loss at its end (null if a step was skipped, the
                 training broke off or the loss is not finite), GPU-hours of training, and its run folder
gpu_hours        of all pilots; null if not known

The run that was trained at the chosen rates has the same in its run.json, as "tuned".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmds.errors import InputError
from vlmds.experiments.schema import Experiment
from vlmds.files import write

FILE = "tune.json"


def read_tuning(path: Path) -> dict[str, Any]:
    """The record in ``path``. Raises InputError if it cannot be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record["stages"], list) and record["factors"] and record["share"]:
            return record
    except OSError:
        raise InputError(f"{path}: cannot be read; it is written by vlmds sweep --tune lr") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path}: damaged; remove it, and vlmds sweep --tune lr makes it again from the pilots")


def write_tuning(path: Path, record: dict[str, Any]) -> None:
    write(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def chosen_rates(record: dict[str, Any]) -> list[str]:
    """The overrides that give an experiment the chosen rates."""
    return [f"stages.{number}.lr={stage['chosen']!r}" for number, stage in enumerate(record["stages"])]


def tuned_record(path: Path, experiment: Experiment) -> dict[str, Any]:
    """What run.json records as "tuned" of a run of ``experiment``.

    Raises:
        InputError: tune.json cannot be read, or its rates are not the experiment's.
    """
    record = read_tuning(path)
    chosen = {stage["stage"]: stage["chosen"] for stage in record["stages"]}
    for number, stage in enumerate(experiment.stages):
        if chosen.get(stage.name) != stage.lr:
            raise InputError(
                f"--tuned {path}: chose {chosen.get(stage.name)} for stage {stage.name}, but stages.{number}.lr is "
                f"{stage.lr:g}; give the chosen rate, or leave --tuned out"
            )
    return record
