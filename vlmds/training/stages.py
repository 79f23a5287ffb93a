"""The schedule: each stage loads what the one before left, trains, and leaves an artifact.

A stage always starts from the artifact on disk, never from what is in memory, so that a run which
was stopped between two stages equals one which was not.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel

from vlmds.config import Experiment, StageConfig
from vlmds.data.index import ShardIndex
from vlmds.data.loader import (
    SampleReader,
    TrainingPositions,
    evaluation_positions,
    read_batches,
    training_collate,
)
from vlmds.data.prompt import SequenceBuilder
from vlmds.errors import InputError
from vlmds.models.artifact import is_artifact, load_artifact, save_artifact
from vlmds.models.assemble import Model
from vlmds.models.captioner import IGNORE, Captioner
from vlmds.models.language import add_adapter
from vlmds.training import checkpoint
from vlmds.training.engine import (
    accumulation_steps,
    build_engine,
    learning_rate,
    release,
    seed_micro_batch,
    set_learning_rate,
)
from vlmds.training.monitor import Monitor
from vlmds.training.ranks import gather, sum_over_ranks
from vlmds.training.run import RunFolder

@dataclass
class Progress:
    """Where a stage stands; a checkpoint holds it. step: optimizer steps taken. samples, bad:
    samples read since the stage's start, and how many of them were unreadable."""

    step: int = 0
    samples: int = 0
    bad: int = 0


class StageTrainer:
    """One stage on this rank.

    Args:
        number: of the stage in the schedule, from 0.
        model: tower and captioner; the captioner already has the stage's adapter and weights.
    """

    def __init__(self, experiment: Experiment, number: int, model: Model, dataset: ShardIndex,
                 run: RunFolder, ds_config: Path, device: torch.device):
        self.experiment, self.stage, self.model, self.run = (
            experiment, experiment.stages[number], model, run)
        self.number, self.device = number, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.accumulation = accumulation_steps(experiment, self.world_size, run.global_batch)
        self.dataset = dataset
        self.train_reader = self._reader("train", shuffle=True)
        self.total = stage_steps(self.stage, len(self.train_reader), run.global_batch)
        data = experiment.data
        self.collate = training_collate(SequenceBuilder(
            model.tokenizer, data.prompt, model.captioner.projector.num_tokens,
            data.max_caption_tokens))
        self.engine = build_engine(
            model.captioner, experiment, self.stage, ds_config, self.accumulation)
        self.progress = Progress()

    def resume(self, folder: Path, state: dict) -> None:
        checkpoint.load_checkpoint(folder, self.engine)
        self.progress = Progress(**state["progress"])

    def train(self, monitor: Monitor) -> None:
        """All remaining steps, with validation and checkpoints on the way."""
        settings = self.experiment.training
        batches = iter(self._training_batches())
        self.engine.train()
        for step in range(self.progress.step, self.total):
            started = time.perf_counter()
            group = list(islice(batches, self.accumulation))
            waited = time.perf_counter() - started
            self.train_step(step, group, waited, monitor)
            last = step + 1 == self.total
            if last or (step + 1) % settings.validate_every == 0:
                self.validate(monitor)
            if last or (step + 1) % settings.checkpoint_every == 0:
                monitor.flush()
                self.save_checkpoint(monitor)

    def train_step(self, step: int, group: list[dict], waited: float, monitor: Monitor) -> None:
        """One optimizer step: the group of this rank's micro-batches, the loss summed over its
        caption tokens and divided by the caption tokens of all ranks' groups."""
        supervised = sum(int((batch["labels"] != IGNORE).sum()) for batch in group)
        tokens, positions, bad = sum_over_ranks([
            supervised, sum(batch["positions"] for batch in group),
            sum(len(batch["bad"]) for batch in group)])
        self._account_bad(step, group, int(bad))
        lr = learning_rate(step, self.total, self.stage)
        set_learning_rate(self.engine, lr)
        loss = torch.zeros((), device=self.device)
        for micro, batch in enumerate(group):
            seed_micro_batch(self.experiment.training.seed, self.number, step, micro, self.rank)
            features = self.model.tower(self._to_device(batch["frames"]))  # [B, F·P, vision width]
            micro_loss = self.engine(  # summed over the micro-batch's caption tokens
                features, self._to_device(batch["input_ids"]), self._to_device(batch["labels"]))
            # The engine averages over ranks; the loss is a sum over them.
            self.engine.backward(micro_loss * self.world_size / tokens, scale_wrt_gas=False)
            self.engine.step()  # reduces gradients; updates at the last micro-batch
            loss += micro_loss.detach()
        dist.all_reduce(loss)
        self.progress.step = step + 1
        monitor.step(
            step, loss=loss / tokens, grad_norm=self.engine.get_global_grad_norm(), lr=lr,
            samples=self.run.global_batch, positions=positions, supervised=tokens, waited=waited)

    @torch.no_grad()
    def validate(self, monitor: Monitor) -> None:
        """Mean loss per caption token over the validation split; nothing if there is none."""
        if "val" not in self.dataset.splits:
            return
        reader = self._reader("val", shuffle=False)
        batches = evaluation_positions(
            len(reader), self.experiment.training.micro_batch, self.rank, self.world_size)
        captioner = self.model.captioner.eval()
        total, tokens, bad = torch.zeros((), device=self.device), 0, []
        for batch in read_batches(reader, batches, self.collate, self.experiment.data.num_workers):
            features = self.model.tower(self._to_device(batch["frames"]))
            total += captioner(
                features, self._to_device(batch["input_ids"]), self._to_device(batch["labels"]))
            tokens += int((batch["labels"] != IGNORE).sum())
            bad += batch["bad"]
        captioner.train()
        total, tokens, any_bad = sum_over_ranks([total.item(), tokens, len(bad)])
        if any_bad:
            self._write_ledger(bad, self.progress.step)
        monitor.validation(self.progress.step, total / tokens, len(reader))

    def save_checkpoint(self, monitor: Monitor) -> None:
        """Write a checkpoint; a failure to is told, and training goes on."""
        step, root = self.progress.step, self.run.checkpoints
        problem = checkpoint.save_checkpoint(
            root / checkpoint.checkpoint_name(self.stage.name, step), self.engine,
            {"stage": self.stage.name, "progress": vars(self.progress),
             "optimizer_steps": checkpoint.optimizer_steps(self.engine)})
        if problem:
            monitor.say(f"WARNING: checkpoint of step {step} not saved: {problem}; "
                        "training goes on, the earlier checkpoints stand")
        elif self.rank == 0:
            keep = self.experiment.training.keep_checkpoints
            for old in checkpoint.checkpoints(root, self.stage.name)[keep:]:
                shutil.rmtree(old)

    def _reader(self, split: str, shuffle: bool) -> SampleReader:
        data = self.experiment.data
        # The stage goes into the high word, so that no two stages see the same order.
        seed = self.experiment.training.seed + (self.number << 32)
        return SampleReader(self.dataset, split, data.num_frames, self.model.tower.image_size,
                            seed=seed, window=data.shuffle_window, shuffle=shuffle)

    def _training_batches(self) -> Iterator[dict]:
        micro_batch = self.experiment.training.micro_batch
        positions = TrainingPositions(
            self.progress.step, self.total, self.accumulation, self.rank,
            global_batch=self.run.global_batch, micro_batch=micro_batch,
            world_size=self.world_size)
        return read_batches(
            self.train_reader, positions, self.collate, self.experiment.data.num_workers)

    def _account_bad(self, step: int, group: list[dict], bad: int) -> None:
        """Into the ledger with the unreadable samples of all ranks; too many stop all ranks."""
        self.progress.samples += self.run.global_batch
        if not bad:
            return
        self.progress.bad += bad
        self._write_ledger([record for batch in group for record in batch["bad"]], step + 1)
        limit = self.experiment.data.max_bad_fraction
        seen = max(self.progress.samples, len(self.train_reader))
        if self.progress.bad > limit * seen:
            raise InputError(
                f"{self.experiment.data.path}: {self.progress.bad} of {self.progress.samples} "
                f"samples read could not be used, more than data.max_bad_fraction {limit} allows; "
                f"see {self.run.path / 'ledger.jsonl'}")

    def _write_ledger(self, records: list[dict], step: int) -> None:
        everyone = gather(records)
        if self.rank == 0:
            self.run.add_to_ledger(
                [{"stage": self.stage.name, "step": step, **r} for rs in everyone for r in rs])

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)


def stage_steps(stage: StageConfig, samples: int, global_batch: int) -> int:
    """Optimizer steps of a stage; a last batch that is not full wraps into the next epoch."""
    return stage.steps or math.ceil(stage.epochs * samples / global_batch)


def prepare_stage(model: Model, experiment: Experiment, number: int, run: RunFolder) -> None:
    """Give the captioner the weights of the stage before, and freeze all but what this one trains.

    The adapter comes into being in the first stage that trains it.
    """
    stage = experiment.stages[number]
    captioner = model.captioner
    if number:
        load_artifact(run.artifact(experiment.stages[number - 1].name), captioner)
    if "peft" in stage.train and not isinstance(captioner.llm, PeftModel):
        torch.manual_seed(experiment.training.seed + 1)  # the same adapter on every rank
        captioner.llm = add_adapter(captioner.llm, experiment.peft)
    freeze(captioner, stage)
    if experiment.training.activation_checkpointing:
        captioner.llm.gradient_checkpointing_enable({"use_reentrant": False})


def freeze(captioner: Captioner, stage: StageConfig) -> None:
    """Make exactly what the stage trains trainable."""
    captioner.projector.requires_grad_("projector" in stage.train)
    for name, parameter in captioner.llm.named_parameters():
        # Parameters of LoRA and DoRA: lora_A, lora_B, lora_magnitude_vector.
        parameter.requires_grad_("peft" in stage.train and "lora_" in name)


def run_stages(
    experiment: Experiment, model: Model, dataset: ShardIndex, run: RunFolder, ds_config: Path,
    device: torch.device, start_from: Path | None = None,
) -> None:
    """All stages that are not finished.

    Args:
        start_from: a checkpoint folder to start its stage from, instead of the run's latest.
    """
    names = [stage.name for stage in experiment.stages]
    finished = [is_artifact(run.artifact(name)) for name in names]
    first = finished.index(False) if False in finished else len(names)
    if start_from is not None:
        first = names.index(checkpoint.read_state(start_from)["stage"])
    monitor = None
    samples = dataset.count("train")
    before = 0
    for number, stage in enumerate(experiment.stages):
        total = stage_steps(stage, samples, run.global_batch)
        if number >= first:
            prepare_stage(model, experiment, number, run)
            trainer = StageTrainer(experiment, number, model, dataset, run, ds_config, device)
            found = checkpoint.latest_checkpoint(run.checkpoints, stage.name)
            if start_from is not None and number == first:
                found = start_from, checkpoint.read_state(start_from)
            if found:
                trainer.resume(*found)
            if monitor is None:
                step = trainer.progress.step
                if dist.get_rank() == 0:
                    run.rewind(names, number, step)
                monitor = Monitor(run.path, experiment, dist.get_rank() == 0, before + step)
            if found:
                monitor.say(f"{stage.name}: going on from {found[0]}")
            monitor.start_stage(stage.name, trainer.progress.step, total, before)
            trainer.train(monitor)
            finish_stage(trainer, monitor)
            del trainer
        before += total
    if monitor is None:
        if dist.get_rank() == 0:
            print(f"vlmds: {run.path}: all stages are finished, nothing to do", flush=True)
        return
    monitor.close()


def finish_stage(trainer: StageTrainer, monitor: Monitor) -> None:
    """Save the artifact and take the engine down."""
    if trainer.rank == 0:
        save_artifact(trainer.run.artifact(trainer.stage.name), trainer.model.captioner,
                      trainer.experiment, trainer.stage.name)
    dist.barrier()
    monitor.say(f"{trainer.stage.name}: finished, {trainer.run.artifact(trainer.stage.name)}")
    engine, trainer.engine = trainer.engine, None
    release(engine)
