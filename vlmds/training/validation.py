"""Validation during a stage: the loss on split val, captions of some of its clips and their
metrics, and which checkpoint is the best by one of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist

from vlmds.console.progress import phase
from vlmds.console.text import counted
from vlmds.data.loader import Batches, SampleReader, evaluation_positions
from vlmds.distributed.ranks import raise_together, shared_error, sum_over_ranks
from vlmds.distributed.stop_request import StopRequest
from vlmds.evaluation.evaluate import evaluate_subset
from vlmds.experiments.schema import Experiment
from vlmds.inference.generation import GenerationOptions
from vlmds.models.assemble import Model
from vlmds.models.captioner import IGNORE
from vlmds.models.dora import norms_kept
from vlmds.training.ema import WeightAverage
from vlmds.training.monitor import Monitor


@dataclass
class Standing:
    """How good the model was found to be; a checkpoint holds it.

    validated, evaluated: steps of the last validation loss and of the last captions.
    score: what ``training.best_metric`` was last, its sign such that more is better; scored: at
    which step. best, best_step: the best score so far. worse: scores since then.
    """

    validated: int = 0
    evaluated: int = 0
    score: float | None = None
    scored: int = 0
    best: float | None = None
    best_step: int = 0
    worse: int = 0

    def add(self, step: int, score: float) -> None:
        self.score, self.scored = score, step
        if math.isfinite(score) and (self.best is None or score > self.best):
            self.best, self.best_step, self.worse = score, step, 0
        else:
            self.worse += 1


class Validator:
    """Of one stage, on this rank; all ranks call its methods alike.

    Args:
        reader: of split val, unshuffled; None if the data has none.
        total: optimizer steps of the stage.
        doing: called with what this rank does. ledger: takes samples that could not be read and
            the step.
    """

    def __init__(
        self,
        experiment: Experiment,
        model: Model,
        reader: SampleReader | None,
        collate: Callable,
        device: torch.device,
        total: int,
        monitor: Monitor,
        stop: StopRequest,
        average: WeightAverage | None,
        doing: Callable[..., None],
        ledger: Callable[[list[dict], int], object],
    ):
        self.experiment, self.settings, self.model = experiment, experiment.training, model
        self.reader, self.collate, self.device, self.total = reader, collate, device, total
        self.monitor, self.stop, self.average = monitor, stop, average
        self._doing, self._ledger = doing, ledger
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def run_due(self, step: int, standing: Standing) -> bool:
        """Do what is due after optimizer step ``step`` and is not in ``standing`` yet. Returns
        whether any rank was asked to stop meanwhile; what is missing is then due at the next
        start."""
        if self.reader is None:
            return False
        settings = self.settings
        if self._due(step, settings.validate_every) and standing.validated != step:
            loss = self._loss(step)
            if loss is None:
                return True
            standing.validated = step
            if settings.best_metric == "loss":
                standing.add(step, -loss)
        if self._due(step, settings.evaluate_every) and standing.evaluated != step:
            (stop,) = sum_over_ranks([self.stop.requested is not None])
            if stop:
                return True
            metrics = self._captions(step)
            standing.evaluated = step
            if settings.best_metric != "loss":
                if settings.best_metric not in metrics:
                    raise shared_error(
                        f"training.best_metric: {settings.best_metric} is undefined on the evaluated clips, "
                        "because their references do not differ; choose another metric"
                    )
                standing.add(step, metrics[settings.best_metric]["value"])
        return False

    def is_over(self, step: int, standing: Standing) -> bool:
        """Whether the stage ends here because it has not improved for long."""
        patience = self.settings.early_stopping
        if patience is None or standing.worse < patience:
            return False
        self.monitor.say(
            f"ends early after step {step} of {self.total}: "
            f"{self.settings.best_metric} has not improved in "
            f"{counted(standing.worse, 'validation')}; best at step {standing.best_step}"
        )
        return True

    def _due(self, step: int, every: int | None) -> bool:
        return every is not None and step > 0 and (step == self.total or step % every == 0)

    @torch.no_grad()
    def _loss(self, step: int) -> float | None:
        """Mean loss per caption token over the split; None if any rank was asked to stop."""
        reader, micro_batch = self.reader, self.settings.micro_batch
        positions = evaluation_positions(len(reader), micro_batch, self.rank, self.world_size)
        rounds = math.ceil(len(reader) / (micro_batch * self.world_size))  # of the rank with most
        batches = Batches(reader, positions, self.collate, self.experiment.data.num_workers)
        reading = iter(batches)
        total, tokens, bad = torch.zeros((), device=self.device), 0, []
        captioner = self.model.captioner.eval()
        with self._averaged(), norms_kept(), phase("validating", unit="batches") as shown:
            for number in shown.counting(range(rounds)):
                self._doing(step, f"validating, batch {number + 1} of {rounds}", explain=batches.holding)
                batch = next(reading, {})
                failures = [batch["failure"]] if "failure" in batch else []
                if "labels" in batch:
                    total += captioner(self.model.features(batch), batch["input_ids"], batch["labels"])
                    tokens += int((batch["labels"] != IGNORE).sum())
                    bad += batch["bad"]
                stop, failed = sum_over_ranks([self.stop.requested is not None, bool(failures)])
                raise_together(failed, failures)
                if stop:
                    break
        captioner.train()
        if stop:
            return None
        total, tokens, any_bad = sum_over_ranks([total.item(), tokens, len(bad)])
        if any_bad:
            self._ledger(bad, step)
            limit = self.experiment.data.max_bad_fraction
            if any_bad > max(1, limit * len(reader)):
                raise shared_error(
                    f"split val: {any_bad:.0f} of {counted(len(reader), 'sample')} could not be "
                    f"used, more than data.max_bad_fraction {limit} allows; see the run's ledger.jsonl"
                )
        self.monitor.validation(step, total / tokens, len(reader))
        return total / tokens

    def _captions(self, step: int) -> dict[str, dict]:
        """Metrics of the captions of ``training.evaluate_clips`` clips, as in metrics.json."""
        self._doing(step, "evaluating captions")
        with self._averaged(), phase("evaluating captions"):
            found = evaluate_subset(
                self.experiment,
                self.model,
                self.reader,
                clips=self.settings.evaluate_clips,
                generation=GenerationOptions(self.settings.evaluate_tokens),
            )
        self.monitor.evaluation(step, found)
        return found["metrics"]

    def _averaged(self):
        return self.average.applied() if self.average else nullcontext()
