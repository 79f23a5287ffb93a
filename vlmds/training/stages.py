"""The schedule: each stage loads what the one before left, trains, and leaves an artifact.

A stage always starts from the artifact on disk, never from what is in memory, so that a run which
was stopped between two stages equals one which was not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel

from vlmds.console.progress import Phase, phase, tell
from vlmds.data.dataset import Dataset
from vlmds.data.loader import Batches, SampleReader, TrainingPositions, training_collate
from vlmds.distributed.ranks import on_main, raise_together, shared_error, sum_over_ranks, together
from vlmds.distributed.stop_request import StopRequest
from vlmds.distributed.watchdog import doing
from vlmds.errors import Stopped
from vlmds.experiments.schedule import accumulation_steps, learning_rate, stage_steps
from vlmds.experiments.schema import Experiment
from vlmds.models.artifact import is_artifact, load_artifact, save_artifact
from vlmds.models.assemble import Model
from vlmds.models.captioner import IGNORE
from vlmds.models.dora import norms_kept
from vlmds.models.language import add_adapter
from vlmds.models.sequences import SequenceBuilder
from vlmds.models.trainable import freeze
from vlmds.runs.folder import RunFolder
from vlmds.runs.lineage import check_parent, stage_lineage
from vlmds.training import checkpoint
from vlmds.training.accounts import Accounts, Progress
from vlmds.training.activations import checkpoint_activations, checkpointed_layers
from vlmds.training.ema import WeightAverage
from vlmds.training.energy import EnergyMeter, gpu_counter
from vlmds.training.engine import build_engine, reduced_once, release, seed_micro_batch, set_learning_rate
from vlmds.training.monitor import Monitor
from vlmds.training.overlap import FeaturesAhead
from vlmds.training.saver import Saver
from vlmds.training.validation import Validator


class StageTrainer:
    """One stage on this rank.

    Args:
        number: of the stage in the schedule, from 0.
        model: tower and captioner; the captioner already has the stage's adapter and weights.
        monitor: reports it. stop: whether this rank was asked to stop.
    """

    def __init__(
        self,
        experiment: Experiment,
        number: int,
        model: Model,
        dataset: Dataset,
        run: RunFolder,
        ds_config: Path,
        device: torch.device,
        monitor: Monitor,
        stop: StopRequest,
    ):
        self.experiment, self.stage, self.model, self.run = (experiment, experiment.stages[number], model, run)
        self.number, self.device, self.monitor, self.stop = number, device, monitor, stop
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.accumulation = accumulation_steps(experiment, self.world_size, run.global_batch)
        self.dataset = dataset
        self.train_reader = self._reader("train", shuffle=True)
        self.total = stage_steps(self.stage, len(self.train_reader), run.global_batch)
        data, training = experiment.data, experiment.training
        self.collate = training_collate(
            SequenceBuilder(model.tokenizer, data.prompt, model.captioner.projector.num_tokens, data.max_caption_tokens)
        )
        self.engine = build_engine(model.captioner, experiment, self.stage, ds_config, self.accumulation)
        self.average = WeightAverage(self.engine, training.ema_decay) if training.ema_decay else None
        self.saver = Saver(run.checkpoints, self.stage.name, training.keep_checkpoints, monitor.say)
        self.accounts = Accounts(experiment, number, run, dataset, len(self.train_reader), monitor)
        self.validator = Validator(
            experiment,
            model,
            self._reader("val", shuffle=False) if "val" in dataset.splits else None,
            self.collate,
            device,
            self.total,
            monitor,
            stop,
            self.average,
            self._doing,
            self.accounts.write,
        )
        self.lineage = stage_lineage(run, experiment, number)
        self.progress = Progress()
        self.waited = 0.0
        """Seconds that this rank has waited for data since the last step was noted."""

    def resume(self, folder: Path, state: dict) -> None:
        together(lambda: check_parent(self.lineage, state["lineage"], folder))
        checkpoint.load_checkpoint(folder, self.engine, self.average)
        self.progress = Progress.of(state["progress"])
        self.monitor.say(f"{self.stage.name}: going on from {folder}")

    def train(self) -> None:
        """All remaining steps, with validation and checkpoints on the way.

        Raises:
            Stopped: on all ranks, after any of them was asked to stop and a checkpoint was saved.
        """
        progress, standing = self.progress, self.progress.standing
        self.engine.train()
        self.energy = EnergyMeter(gpu_counter(self.device), progress.joules or 0.0)
        if self.validator.run_due(progress.step, standing):  # which a stop request had cut short
            self._stop()
        ahead = FeaturesAhead(self.model, self.device, self._micro_batches())
        first = progress.step
        for step in range(first, self.total):
            if self.validator.is_over(step, standing):
                break
            with self._announced(step == first) as shown:
                group = ahead.group(self.accumulation)
                stop = self.train_step(step, group, ahead.features(group), shown)
            # Asked to stop, a validation that is due waits for the next start.
            stop = stop or self.validator.run_due(progress.step, standing)
            if stop or self._checkpoint_due():
                self.save_checkpoint()
            if stop:
                self._stop()
        self.saver.drain()
        self.monitor.energy(progress.step, self.energy.total())

    @norms_kept()  # the weights change at the end only
    def train_step(self, step: int, group: list[dict], ahead: Iterator[torch.Tensor], shown: Phase) -> bool:
        """One optimizer step: the group of this rank's micro-batches, the loss summed over its
        caption tokens and divided by the caption tokens of all ranks' groups. ``ahead`` gives the
        features of each, [B, F·P, vision width]. Returns whether any rank was asked to stop."""
        tokens, positions, stop = self._agree(step, group)
        lr = learning_rate(step, self.total, self.stage)
        set_learning_rate(self.engine, lr)
        loss = torch.zeros((), device=self.device)
        with reduced_once(self.engine):
            for micro, (batch, features) in enumerate(zip(group, ahead)):
                self._doing(step, "in forward and backward", batch["keys"])
                seed_micro_batch(self.experiment.training.seed, self.number, step, micro, self.rank)
                # Summed over the caption tokens.
                micro_loss = self.engine(features, batch["input_ids"], batch["labels"])
                # A loss that is no number makes a gradient that is none, which all ranks notice.
                sound = 1 + 0 * micro_loss.detach()
                # The engine averages over ranks; the loss is a sum over them.
                self.engine.backward(micro_loss * sound * self.world_size / tokens, scale_wrt_gas=False)
                loss += micro_loss.detach()
                shown.advance()
        self.engine.step()
        dist.all_reduce(loss)
        self.progress.step = step + 1
        if self.average is not None:
            self.average.update()
        skipped = self.engine.optimizer.overflow  # a gradient was no number; the same on all ranks
        self.monitor.step(
            step,
            loss=loss / tokens,
            grad_norm=self.engine.get_global_grad_norm(),
            lr=lr,
            samples=self.run.global_batch,
            positions=positions,
            supervised=tokens,
            waited=self.waited,
            skipped=skipped,
        )
        self.waited = 0.0
        if skipped:
            self.accounts.skipped(self.progress, group)
        return stop

    def _announced(self, first: bool) -> AbstractContextManager[Phase]:
        """The first step after a start takes longer than others, and has no line before it."""
        announced = phase(f"{self.stage.name}: first step", self.accumulation, "micro-batches")
        return announced if first else nullcontext(Phase("step"))

    def _agree(self, step: int, group: list[dict]) -> tuple[float, float, bool]:
        """What all ranks must know before a step: caption tokens and positions of the global
        batch, and whether any rank was asked to stop.

        Raises:
            InputError: on all ranks, if any has no data or too many samples were unreadable.
        """
        self._doing(
            step,
            "waiting for the other ranks to have their data",
            [key for batch in group for key in batch.get("keys", ())],
        )
        failures = [batch["failure"] for batch in group if "failure" in batch]
        whole = [] if failures else group
        tokens, positions, bad, stop, written, failed = sum_over_ranks(
            [
                sum(int((batch["labels"] != IGNORE).sum()) for batch in whole),
                sum(batch["positions"] for batch in whole),
                sum(len(batch["bad"]) for batch in whole),
                self.stop.requested is not None,
                self.saver.finished,
                bool(failures),
            ]
        )
        if written == self.world_size:
            self.saver.publish()
        raise_together(failed, failures)
        self.accounts.read(self.progress, group, int(bad))
        return tokens, positions, stop > 0

    def save_checkpoint(self) -> None:
        """Start to write a checkpoint; the saver reports if that fails, and training goes on."""
        self._doing(self.progress.step, "copying a checkpoint")
        self.monitor.flush()
        standing = self.progress.standing
        self.progress.joules = self.energy.total()
        self.saver.begin(
            self.engine,
            self.average,
            self.progress.step,
            {
                "stage": self.stage.name,
                "progress": asdict(self.progress),
                "lineage": self.lineage,
                "score": standing.score if standing.scored == self.progress.step else None,
            },
        )

    def take_best(self) -> None:
        """The weights of the best checkpoint in place of the last ones, if they are to be kept."""
        standing = self.progress.standing
        best = self.run.checkpoints / checkpoint.checkpoint_name(self.stage.name, standing.best_step)
        if self.experiment.training.keep == "last" or standing.best_step == self.progress.step:
            return
        problem = on_main(lambda: checkpoint.check(best))
        if problem:
            self.monitor.say(
                f"WARNING: {best}, the best checkpoint, cannot be used ({problem}); the artifact gets the last weights"
            )
            return
        checkpoint.load_checkpoint(best, self.engine, self.average)
        self.progress.step = standing.best_step
        self.monitor.say(f"{self.stage.name}: the artifact gets the weights of step {standing.best_step}, the best")

    def _stop(self) -> None:
        problem = self.saver.drain()
        if problem:  # a scheduler that starts what was stopped again would do so for ever
            raise shared_error(
                f"{self.stage.name}: stopped by a signal after step "
                f"{self.progress.step} of {self.total}, but {problem}; the same "
                "command goes on from the checkpoint before"
            )
        raise Stopped(
            f"{self.stage.name}: stopped by a signal after step {self.progress.step} of "
            f"{self.total}, checkpoint saved; the same command goes on from there"
        )

    def _checkpoint_due(self) -> bool:
        """At even distances, at the end, and where the model is the best so far."""
        step = self.progress.step
        return (
            step == self.total
            or step % self.experiment.training.checkpoint_every == 0
            or step == self.progress.standing.best_step
        )

    def _doing(self, step: int, what: str, keys: Sequence[str] = (), explain: Callable[[], str] | None = None) -> None:
        doing(f"at {self.stage.name} step {min(step + 1, self.total)}, {what}", keys, explain)

    def _reader(self, split: str, shuffle: bool) -> SampleReader:
        data = self.experiment.data
        # The stage goes into the high word, so that no two stages see the same order.
        seed = self.experiment.training.seed + (self.number << 32)
        return SampleReader(
            self.dataset,
            split,
            data.num_frames,
            self.model.image_size,
            seed=seed,
            window=data.shuffle_window,
            shuffle=shuffle,
            decode_seconds=data.decode_seconds,
        )

    def _micro_batches(self) -> Iterator[dict]:
        """This rank's micro-batches of all remaining steps; adds to ``waited`` what each takes."""
        first = self.progress.step
        positions = TrainingPositions(
            first,
            self.total,
            self.accumulation,
            self.rank,
            global_batch=self.run.global_batch,
            micro_batch=self.experiment.training.micro_batch,
            world_size=self.world_size,
        )
        batches = Batches(self.train_reader, positions, self.collate, self.experiment.data.num_workers)
        reading = iter(batches)
        for number in range(len(positions)):
            self._doing(first + number // self.accumulation, "waiting for data", explain=batches.in_progress)
            started = time.perf_counter()
            batch = next(reading)
            self.waited += time.perf_counter() - started
            yield batch


def prepare_stage(model: Model, experiment: Experiment, number: int, run: RunFolder, device: torch.device) -> int:
    """Give the captioner the weights of the stage before, and freeze all but what this one trains.
    Returns which layers recompute their activations: none (0), or every n-th.

    The adapter comes into being in the first stage that trains it.
    """
    stage = experiment.stages[number]
    captioner = model.captioner
    if number:
        load_artifact(run.artifact(experiment.stages[number - 1].name), captioner)
    if "peft" in stage.train and not isinstance(captioner.llm, PeftModel):
        torch.manual_seed(experiment.training.seed + 1)  # the same adapter on every rank
        with phase("adding the adapter"):  # for DoRA's magnitudes, each weight is unpacked
            captioner.llm = add_adapter(captioner.llm, experiment.peft)
    freeze(captioner, stage)
    every = checkpointed_layers(experiment, stage, model.tower is None, device)
    checkpoint_activations(captioner, every)
    if dist.get_rank() == 0 and device.type == "cuda":
        layers = {0: "of no layer", 1: "of every layer"}.get(every, f"of one layer in {every}")
        tell(f"vlmds: {stage.name}: activations {layers} are computed again in the backward pass")
    return every


def run_stages(
    experiment: Experiment,
    model: Model,
    dataset: Dataset,
    run: RunFolder,
    ds_config: Path,
    device: torch.device,
    stop: StopRequest,
) -> None:
    """All stages that are not finished.

    Raises:
        InputError: the checkpoint that the run grew from (``--resume PATH``) is needed, and gone.
        Stopped: on all ranks, when a rank was asked to stop; a checkpoint is saved.
    """
    names = [stage.name for stage in experiment.stages]
    # Rank 0's answer: on NFS, what another machine has just written may not be seen everywhere.
    finished = on_main(lambda: [is_artifact(run.artifact(name)) for name in names])
    first = finished.index(False) if False in finished else len(names)
    if first == len(names):
        if dist.get_rank() == 0:
            tell(f"vlmds: {run.path}: all stages are finished, nothing to do")
        return
    stop.training_begins()
    on_main(lambda: checkpoint.remove_unfinished(run.checkpoints))
    found = checkpoint.latest_checkpoint(run.checkpoints, names[first])
    origin = run.record.get("resumed_from", {})
    if found is None and origin.get("stage") == names[first]:
        folder = Path(origin["checkpoint"])
        problem = on_main(lambda: checkpoint.check(folder))
        if problem:
            raise shared_error(
                f"{run.path}: grew from {folder}, which cannot be used ({problem}); "
                "restore it, or choose another --output"
            )
        found = folder, checkpoint.read_state(folder)
    step = found[1]["progress"]["step"] if found else 0
    totals = [stage_steps(stage, dataset.count("train"), run.global_batch) for stage in experiment.stages]
    if dist.get_rank() == 0:
        run.rewind(names, first, step)
    monitor = Monitor(run.path, experiment, dist.get_rank() == 0, sum(totals[:first]) + step, run.record.get("id"))
    for number in range(first, len(names)):
        prepare_stage(model, experiment, number, run, device)
        trainer = StageTrainer(experiment, number, model, dataset, run, ds_config, device, monitor, stop)
        if number == first and found:
            trainer.resume(*found)
        monitor.start_stage(names[number], trainer.progress.step, totals[number], sum(totals[:number]))
        trainer.train()
        finish_stage(trainer)
        del trainer
    monitor.close()


def finish_stage(trainer: StageTrainer) -> None:
    """Save the artifact and take the engine down."""
    doing(f"saving the artifact of {trainer.stage.name}")
    artifact = trainer.run.artifact(trainer.stage.name)
    trainer.take_best()
    with trainer.average.applied() if trainer.average else nullcontext():
        on_main(
            lambda: save_artifact(
                artifact,
                trainer.model.captioner,
                trainer.experiment,
                trainer.stage.name,
                {**trainer.lineage, "tower": trainer.model.tower_fingerprint(), "step": trainer.progress.step},
            )
        )
    trainer.monitor.say(f"{trainer.stage.name}: finished, {artifact}")
    engine, trainer.engine, trainer.average = trainer.engine, None, None
    release(engine)
