"""The progress of a stage, which its checkpoints record beside weights and moments."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class ValidationState:
    """Results of validation so far.

    validated, evaluated: steps of the last validation loss and of the last captions.
    score: the last value of ``training.best_metric``, its sign such that more is better; scored: its
    step. best, best_step: the best score so far. worse: scores since then.
    """

    validated: int = 0
    evaluated: int = 0
    score: float | None = None
    scored: int = 0
    best: float | None = None
    best_step: int = 0
    worse: int = 0

    def add(self, step: int, score: float) -> None:
        """Record the score after optimizer step ``step``."""
        self.score, self.scored = score, step
        if math.isfinite(score) and (self.best is None or score > self.best):
            self.best, self.best_step, self.worse = score, step, 0
        else:
            self.worse += 1


@dataclass
class StageProgress:
    """Progress of one stage, the same on every rank.

    step: optimizer steps taken. samples, bad, cut: samples read since the stage's start, how many of
    them were unreadable, and how many captions were cut. skipped: steps whose loss or gradient was
    not finite. joules: energy the GPUs took, None where it is not counted.
    """

    step: int = 0
    samples: int = 0
    bad: int = 0
    cut: int = 0
    skipped: int = 0
    joules: float | None = 0.0
    validation: ValidationState = field(default_factory=ValidationState)

    def state(self) -> dict[str, Any]:
        """JSON values, as checkpoints have them: there the validation is called "standing"."""
        state = asdict(self)
        return state | {"standing": state.pop("validation")}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> StageProgress:
        """The inverse of :meth:`state`; a checkpoint of an older version has no "cut"."""
        rest = {name: value for name, value in state.items() if name != "standing"}
        return cls(**rest, validation=ValidationState(**state["standing"]))
