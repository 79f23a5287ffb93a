"""The schedule of an experiment: global batch, accumulation, steps of each stage, learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlmds.console.text import counted
from vlmds.errors import InputError
from vlmds.experiments.schema import Experiment, StageConfig


@dataclass(frozen=True)
class Schedule:
    """The schedule of a run on its ranks.

    global_batch: samples per optimizer step, over all ranks. accumulation: micro-batches per
    optimizer step and rank. totals: optimizer steps of each stage.
    """

    global_batch: int
    accumulation: int
    totals: tuple[int, ...]

    @classmethod
    def of(cls, experiment: Experiment, world_size: int, global_batch: int, samples: Sequence[int]) -> Schedule:
        """``global_batch``: the run's recorded one; ``samples``: of split train of each stage's data. Raises
        InputError as :func:`accumulation_steps` does."""
        totals = tuple(
            stage_steps(stage, count, global_batch) for stage, count in zip(experiment.stages, samples, strict=True)
        )
        return cls(global_batch, accumulation_steps(experiment, world_size, global_batch), totals)

    def steps_before(self, number: int) -> int:
        """Optimizer steps of the stages before stage ``number``."""
        return sum(self.totals[:number])


def accumulation_steps(experiment: Experiment, world_size: int, global_batch: int | None) -> int:
    """Micro-batches per optimizer step and rank.

    Args:
        global_batch: the run's recorded one.

    Raises:
        InputError: the global batch cannot be divided into equal micro-batches.
    """
    training = experiment.training
    wanted = global_batch or training.global_batch
    if wanted is None:
        return training.gradient_accumulation
    per_pass = training.micro_batch * world_size
    if wanted % per_pass:
        raise InputError(
            f"training.global_batch: {wanted} is not a multiple of micro_batch "
            f"{training.micro_batch} x {counted(world_size, 'rank')}; choose another training.micro_batch"
        )
    return wanted // per_pass


def describe_batch(experiment: Experiment, world_size: int, global_batch: int | None = None) -> str:
    """The global batch as the product of its factors and, if it depends on the number of ranks, how to fix it.

    Args:
        global_batch: the run's recorded one.

    Raises:
        InputError: as :func:`accumulation_steps`.
    """
    accumulation = accumulation_steps(experiment, world_size, global_batch)
    micro_batch = experiment.training.micro_batch
    batch = micro_batch * accumulation * world_size
    text = (
        f"global batch {batch} = micro_batch {micro_batch} × accumulation {accumulation} × "
        f"{counted(world_size, 'rank')}"
    )
    if experiment.training.global_batch is None:
        text += f"; set training.global_batch={batch} to keep it with any number of GPUs"
    return text


def stage_steps(stage: StageConfig, samples: int, global_batch: int) -> int:
    """Optimizer steps of a stage. An incomplete last batch is filled from the next epoch."""
    if stage.steps is not None:
        return stage.steps
    assert stage.epochs is not None  # the schema requires one of them
    return math.ceil(stage.epochs * samples / global_batch)


def learning_rate(step: int, total: int, stage: StageConfig) -> float:
    """Learning rate of optimizer step ``step`` (from 0) of ``total``, before the factors of parameter groups.

    Linear warm-up, then ``stage.schedule`` down to ``min_lr_ratio``. A pure function: a resumed run
    needs no scheduler state.
    """
    warmup = round(stage.warmup_ratio * total)
    if step < warmup:
        return stage.lr * (step + 1) / warmup
    if stage.schedule == "constant":
        return stage.lr
    start = warmup
    if stage.schedule == "wsd":  # warm-up, stable, decay
        start = max(warmup, total - round(stage.decay_ratio * total))
        if step < start:
            return stage.lr
    progress = (step - start) / max(1, total - start)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if stage.schedule == "cosine" else 1 - progress
    return stage.lr * (stage.min_lr_ratio + (1 - stage.min_lr_ratio) * left)
