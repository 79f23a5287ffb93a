"""The context of a stage: what its step, data, validation, ledger and checkpoints share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from vlmds.distributed.stop_request import StopRequest
from vlmds.distributed.watchdog import doing
from vlmds.experiments.schedule import Schedule
from vlmds.experiments.schema import DataConfig, Experiment, StageConfig
from vlmds.runs.folder import RunFolder
from vlmds.training.monitor import Monitor


@dataclass(frozen=True)
class StageContext:
    """One stage of a run, on this rank.

    number: of the stage, from 0. schedule: of the whole run. device: this rank's. stop: whether this
    rank was asked to stop.
    """

    experiment: Experiment
    number: int
    run: RunFolder
    schedule: Schedule
    device: torch.device
    monitor: Monitor
    stop: StopRequest

    @property
    def config(self) -> StageConfig:
        return self.experiment.stages[self.number]

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def data(self) -> DataConfig:
        """The experiment's ``data``, with the stage's own path or blend, and prompt."""
        return self.experiment.for_stage(self.name).data

    @property
    def total(self) -> int:
        """Optimizer steps of the stage."""
        return self.schedule.totals[self.number]

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    def activity(
        self, step: int, what: str, keys: Sequence[str] = (), explain: Callable[[], str] | None = None
    ) -> None:
        """Note for the watchdog what this rank does next, after ``step`` optimizer steps; the other
        arguments are those of :func:`vlmds.distributed.watchdog.doing`."""
        doing(f"at {self.name} step {min(step + 1, self.total)}, {what}", keys, explain)
