"""The training of one stage: its optimizer step, with validation and checkpoints in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from vlmds.console.progress import Phase, phase
from vlmds.data.dataset import Dataset
from vlmds.distributed.ranks import raise_together, shared_error, sum_over_ranks
from vlmds.errors import Stopped
from vlmds.experiments.schedule import learning_rate
from vlmds.models.assemble import Model
from vlmds.models.captioner import IGNORE, Features
from vlmds.models.dora import norms_kept
from vlmds.training.batches import StageData
from vlmds.training.context import StageContext
from vlmds.training.ema import WeightAverage
from vlmds.training.energy import EnergyMeter, gpu_counter
from vlmds.training.engine import build_engine, reduced_once, release, seed_micro_batch, set_learning_rate
from vlmds.training.ledger import SampleLedger
from vlmds.training.overlap import FeaturesAhead
from vlmds.training.stage_checkpoints import StageCheckpoints
from vlmds.training.stage_progress import StageProgress
from vlmds.training.validation import Validator


class StageTrainer:
    """One stage on this rank.

    Args:
        model: tower and captioner; the captioner already has the stage's adapter and weights.
        ds_config: the DeepSpeed JSON.
    """

    def __init__(self, stage: StageContext, model: Model, dataset: Dataset, ds_config: Path):
        self.stage, self.model = stage, model
        self.data = StageData(stage, model, dataset)
        self.engine = build_engine(
            model.captioner, stage.experiment, stage.config, ds_config, stage.schedule.accumulation
        )
        decay = stage.experiment.training.ema_decay
        self.average = WeightAverage(self.engine, decay) if decay else None
        self.ledger = SampleLedger(stage, dataset)
        self.validator = Validator(stage, model, self.data, self.average, self.ledger)
        self.checkpoints = StageCheckpoints(stage, self.engine, self.average)
        self.progress = StageProgress()

    def resume(self, folder: Path, state: dict) -> None:
        """Go on from a checkpoint; see :meth:`StageCheckpoints.resume`."""
        self.progress = self.checkpoints.resume(folder, state)

    def train(self) -> None:
        """All remaining steps, with validation and checkpoints in between.

        Raises:
            InputError: on all ranks; data that cannot be used, see :class:`SampleLedger`.
            Stopped: on all ranks, after any of them was asked to stop and a checkpoint was saved.
        """
        stage, progress, validator = self.stage, self.progress, self.validator
        self.engine.train()
        self.energy = EnergyMeter(gpu_counter(stage.device), progress.joules or 0.0)
        if validator.run_due(progress.step, progress.validation):  # which a stop request had cut short
            self._stop()
        first = progress.step
        ahead = FeaturesAhead(self.model, stage.device, self.data.micro_batches(first))
        for step in range(first, stage.total):
            if validator.is_over(step, progress.validation):
                break
            with self._announced(step == first) as shown:
                group = ahead.group(stage.schedule.accumulation)
                stop = self.train_step(step, group, ahead.features(group), shown)
            # After a stop request, a validation that is due waits for the next start.
            stop = stop or validator.run_due(progress.step, progress.validation)
            if stop or self.checkpoints.due(progress):
                self._save()
            if stop:
                self._stop()
        self.checkpoints.saver.drain()
        self.ledger.summarise(progress)
        stage.monitor.energy(progress.step, self.energy.total())

    @norms_kept()  # the weights change at the end only
    def train_step(self, step: int, group: list[dict], ahead: Iterator[Features], shown: Phase) -> bool:
        """One optimizer step (``step`` from 0): the loss is summed over the caption tokens of this rank's
        micro-batches and divided by the caption tokens of all ranks.

        Args:
            group: this rank's micro-batches of the step.
            ahead: gives the features of each, see :meth:`Model.features`.
            shown: counts the micro-batches.

        Returns:
            Whether any rank was asked to stop.
        """
        stage = self.stage
        tokens, positions, stop = self._agree(step, group)
        lr = learning_rate(step, stage.total, stage.config)
        set_learning_rate(self.engine, lr)
        loss = torch.zeros((), device=stage.device)
        with reduced_once(self.engine):
            for micro, (batch, features) in enumerate(zip(group, ahead)):
                stage.activity(step, "in forward and backward", batch["keys"])
                seed_micro_batch(stage.experiment.training.seed, stage.number, step, micro, stage.rank)
                micro_loss = self.engine(features, batch["input_ids"], batch["labels"])  # summed over tokens
                # A loss that is not finite makes a gradient that is NaN, which all ranks notice.
                sound = 1 + 0 * micro_loss.detach()
                # The engine averages over ranks; the loss is a sum over them.
                self.engine.backward(micro_loss * sound * stage.world_size / tokens, scale_wrt_gas=False)
                loss += micro_loss.detach()
                shown.advance()
        self.engine.step()
        dist.all_reduce(loss)
        self.progress.step = step + 1
        if self.average is not None:
            self.average.update()
        skipped = self.engine.optimizer.overflow  # a gradient was not finite; the same on all ranks
        stage.monitor.step(
            step,
            loss=loss / tokens,
            grad_norm=self.engine.get_global_grad_norm(),
            lr=lr,
            samples=stage.schedule.global_batch,
            positions=positions,
            supervised=tokens,
            waited=self.data.take_waited(),
            skipped=skipped,
        )
        if skipped:
            self.ledger.skipped(self.progress, group)
        return stop

    def close(self) -> None:
        """Take the engine down, and drop all that refers to it; the trainer is of no use afterwards."""
        engine = self.engine
        del self.engine, self.average, self.validator, self.checkpoints
        release(engine)

    def _agree(self, step: int, group: list[dict]) -> tuple[float, float, bool]:
        """What all ranks must know before a step: caption tokens and positions of the global
        batch, and whether any rank was asked to stop.

        Raises:
            InputError: on all ranks, if any has no data, too many samples were unreadable or too
                many captions cut.
        """
        keys = [key for batch in group for key in batch.get("keys", ())]
        self.stage.activity(step, "waiting for the other ranks to have their data", keys)
        failures = [batch["failure"] for batch in group if "failure" in batch]
        whole = [] if failures else group
        saver = self.checkpoints.saver
        tokens, positions, bad, stop, written, failed, cut = sum_over_ranks(
            [
                sum(int((batch["labels"] != IGNORE).sum()) for batch in whole),
                sum(batch["positions"] for batch in whole),
                sum(len(batch["bad"]) for batch in whole),
                self.stage.stop.requested is not None,
                saver.finished,
                bool(failures),
                sum(len(batch["cut"]) for batch in whole),
            ]
        )
        if written == self.stage.world_size:
            saver.publish()
        raise_together(failed, failures)
        self.ledger.read(self.progress, group, int(bad), int(cut))
        return tokens, positions, stop > 0

    def _announced(self, first: bool) -> AbstractContextManager[Phase]:
        """The first step after a start takes longer than others, and has no line before it."""
        announced = phase(f"{self.stage.name}: first step", self.stage.schedule.accumulation, "micro-batches")
        return announced if first else nullcontext(Phase("step"))

    def _save(self) -> None:
        self.stage.activity(self.progress.step, "copying a checkpoint")
        self.progress.joules = self.energy.total()
        self.checkpoints.save(self.progress)

    def _stop(self) -> None:
        problem = self.checkpoints.saver.drain()
        stopped = f"{self.stage.name}: stopped by a signal after step {self.progress.step} of {self.stage.total}"
        if problem:  # exit code 3 would make a scheduler start it again, and again
            raise shared_error(f"{stopped}, but {problem}; the same command goes on from the checkpoint before")
        raise Stopped(f"{stopped}, checkpoint saved; the same command goes on from there")
