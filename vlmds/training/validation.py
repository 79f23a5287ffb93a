"""Validation of a stage: the loss on split val, what the video is worth there, captions of some of its clips
and their metrics, and whether the stage still improves."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from vlmds.console.progress import phase
from vlmds.console.text import counted
from vlmds.data.loader import Batches, SampleReader, evaluation_positions
from vlmds.distributed.ranks import raise_together, shared_error, sum_over_ranks
from vlmds.evaluation.evaluate import evaluate_subset
from vlmds.inference.generation import GenerationOptions
from vlmds.models.assemble import Model
from vlmds.models.captioner import IGNORE
from vlmds.models.dora import norms_kept
from vlmds.training.batches import StageData
from vlmds.training.blind_check import VideoWorth, checked_step, clips_to_measure, video_worth
from vlmds.training.context import StageContext
from vlmds.training.ema import WeightAverage
from vlmds.training.ledger import SampleLedger
from vlmds.training.stage_progress import ValidationState


class Validator:
    """Validation of one stage, on this rank; all ranks call its methods alike."""

    def __init__(
        self, stage: StageContext, model: Model, data: StageData, average: WeightAverage | None, ledger: SampleLedger
    ):
        self.stage, self.model, self.data, self.average, self.ledger = stage, model, data, average, ledger
        self.settings = stage.experiment.training

    def run_due(self, step: int, state: ValidationState) -> bool:
        """Do what is due after optimizer step ``step`` and is not in ``state`` yet. Returns
        whether any rank was asked to stop meanwhile; what is missing is then due at the next
        start."""
        settings, reader = self.settings, self.data.val
        if reader is None:
            return False
        if self._due(step, settings.validate_every) and state.validated != step:
            loss = self._loss(step, reader)
            if loss is None:
                return True
            state.validated = step
            if settings.best_metric == "loss":
                state.add(step, -loss)
        if self._due(step, settings.evaluate_every) and state.evaluated != step:
            (stop,) = sum_over_ranks([self.stage.stop.requested is not None])
            if stop:
                return True
            metrics = self._captions(step, reader)
            state.evaluated = step
            if settings.best_metric != "loss":
                if settings.best_metric not in metrics:
                    raise shared_error(
                        f"training.best_metric: {settings.best_metric} is undefined on the evaluated clips, "
                        "because their references do not differ; choose another metric"
                    )
                state.add(step, metrics[settings.best_metric]["value"])
        return False

    def is_over(self, step: int, state: ValidationState) -> bool:
        """Whether the stage ends here because it has not improved for long."""
        patience = self.settings.early_stopping
        if patience is None or state.worse < patience:
            return False
        self.stage.monitor.say(
            f"ends early after step {step} of {self.stage.total}: "
            f"{self.settings.best_metric} has not improved in "
            f"{counted(state.worse, 'validation')}; best at step {state.best_step}"
        )
        return True

    def _due(self, step: int, every: int | None) -> bool:
        return every is not None and step > 0 and (step == self.stage.total or step % every == 0)

    @torch.no_grad()
    def _loss(self, step: int, reader: SampleReader) -> float | None:
        """Mean loss per caption token over the split; None if any rank was asked to stop."""
        stage, micro_batch = self.stage, self.settings.micro_batch
        positions = evaluation_positions(len(reader), micro_batch, stage.rank, stage.world_size)
        rounds = math.ceil(len(reader) / (micro_batch * stage.world_size))  # of the rank with most
        batches = Batches(reader, positions, self.data.collate, stage.experiment.data.num_workers)
        reading = iter(batches)
        loss, count, bad, stop = torch.zeros((), device=stage.device), 0, [], 0.0
        captioner = self.model.captioner.eval()
        with self._averaged(), norms_kept(), phase("validating", unit="batches") as shown:
            for number in shown.counting(range(rounds)):
                stage.activity(step, f"validating, batch {number + 1} of {rounds}", explain=batches.in_progress)
                batch: dict[str, Any] = next(reading, {})
                failures = [batch["failure"]] if "failure" in batch else []
                if "labels" in batch:
                    loss += captioner(self.model.features(batch), batch["input_ids"], batch["labels"])
                    count += int((batch["labels"] != IGNORE).sum())
                    bad += batch["bad"]
                stop, failed = sum_over_ranks([stage.stop.requested is not None, bool(failures)])
                raise_together(failed, failures)
                if stop:
                    break
        captioner.train()
        if stop:
            return None
        total, tokens, any_bad = sum_over_ranks([loss.item(), count, len(bad)])
        if any_bad:
            self.ledger.write(bad, step)
            limit = stage.experiment.data.max_bad_fraction
            if any_bad > max(1, limit * len(reader)):
                raise shared_error(
                    f"split val: {any_bad:.0f} of {counted(len(reader), 'sample')} could not be "
                    f"used, more than data.max_bad_fraction {limit} allows; see the run's ledger.jsonl"
                )
        worth = self._video_worth(step, reader)
        stage.monitor.validation(step, total / tokens, len(reader), worth)
        if worth and worth.doubtful and self.settings.blind_check is not None:
            if step == checked_step(stage.total, self.settings.validate_every, self.settings.blind_check):
                stage.monitor.warn(step, worth.warning())
        return total / tokens

    def _video_worth(self, step: int, reader: SampleReader) -> VideoWorth | None:
        """What the video is worth, if this validation measures it."""
        stage, settings = self.stage, self.settings
        batch, every, share = stage.schedule.global_batch, settings.validate_every, settings.blind_check
        clips = clips_to_measure(step, stage.total, batch, every, share)
        if not clips:
            return None
        with self._averaged(), phase("validating with other videos"):
            return video_worth(
                self.model,
                reader,
                self.data.collate,
                clips=clips,
                batch_size=settings.micro_batch,
                num_workers=stage.experiment.data.num_workers,
                rank=stage.rank,
                world_size=stage.world_size,
                activity=lambda number, count: stage.activity(
                    step, f"validating with other videos, batch {number} of {count}"
                ),
            )

    def _captions(self, step: int, reader: SampleReader) -> dict[str, dict]:
        """Metrics of the captions of ``training.evaluate_clips`` clips, as in metrics.json."""
        self.stage.activity(step, "evaluating captions")
        with self._averaged(), phase("evaluating captions"):
            found = evaluate_subset(
                self.stage.experiment.for_stage(self.stage.name),
                self.model,
                reader,
                clips=self.settings.evaluate_clips,
                generation=GenerationOptions(self.settings.evaluate_tokens),
            )
        self.stage.monitor.evaluation(step, found)
        return found["metrics"]

    def _averaged(self) -> AbstractContextManager[None]:
        return self.average.applied() if self.average else nullcontext()
