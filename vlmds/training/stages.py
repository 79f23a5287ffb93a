"""The schedule: each stage loads the previous one's artifact, trains, and writes its own.

A stage always starts from the artifact on disk, never from what is in memory: a run that was stopped
between two stages equals one that was not.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel

from vlmds.console.progress import log_line, phase
from vlmds.data.dataset import Dataset
from vlmds.distributed.ranks import is_main, on_main, shared_error
from vlmds.distributed.stop_request import StopRequest
from vlmds.distributed.watchdog import doing
from vlmds.experiments.schedule import Schedule
from vlmds.experiments.schema import Experiment
from vlmds.models.artifact import is_artifact, load_artifact, load_projector, read_artifact, save_artifact
from vlmds.models.assemble import Model
from vlmds.models.language import add_adapter
from vlmds.models.trainable import freeze
from vlmds.runs.folder import RunFolder
from vlmds.runs.initial import COPY
from vlmds.training import checkpoint
from vlmds.training.activations import checkpoint_activations, checkpointed_layers
from vlmds.training.context import StageContext
from vlmds.training.monitor import Monitor
from vlmds.training.trainer import StageTrainer


def run_stages(
    experiment: Experiment,
    model: Model,
    datasets: list[Dataset],
    run: RunFolder,
    schedule: Schedule,
    ds_config: Path,
    device: torch.device,
    stop: StopRequest,
) -> None:
    """All stages that are not finished.

    Args:
        datasets: of each stage.

    Raises:
        InputError: the checkpoint that the run started from (``--resume PATH``) is needed, and gone.
        Stopped: on all ranks, when a rank was asked to stop; a checkpoint is saved.
    """
    names = [stage.name for stage in experiment.stages]
    # Rank 0's answer: on NFS, what another machine has just written may not be seen everywhere.
    finished = on_main(lambda: [is_artifact(run.artifact(name)) for name in names])
    if all(finished):
        if is_main():
            log_line(f"vlmds: {run.path}: all stages are finished, nothing to do")
        return
    first = finished.index(False)
    stop.training_begins()
    on_main(lambda: checkpoint.remove_unfinished(run.checkpoints))
    found = resumable(run, names[first])
    step = found[1]["progress"]["step"] if found else 0
    if is_main():
        run.rewind(names, first, step)
    before = schedule.steps_before(first) + step
    monitor = Monitor(run.path, experiment, is_main(), before, run.record.get("id"))
    for number in range(first, len(names)):
        prepare_stage(model, experiment, number, run, device)
        stage = StageContext(experiment, number, run, schedule, device, monitor, stop)
        trainer = StageTrainer(stage, model, datasets[number], ds_config)
        if number == first and found:
            trainer.resume(*found)
        monitor.start_stage(stage.name, trainer.progress.step, stage.total, schedule.steps_before(number))
        trainer.train()
        finish_stage(trainer)
        del trainer
    monitor.close()


def resumable(run: RunFolder, stage: str) -> tuple[Path, dict] | None:
    """The checkpoint that the stage goes on from, and its state: the newest of the run, else the one
    that the run started from; None if there is none. The same on every rank.

    Raises:
        InputError: on every rank, if the run started from a checkpoint that cannot be used any more.
    """
    found = checkpoint.latest_checkpoint(run.checkpoints, stage)
    origin = run.record.get("resumed_from", {})
    if found is not None or origin.get("stage") != stage:
        return found
    folder = Path(origin["checkpoint"])
    problem = on_main(lambda: checkpoint.check(folder))
    if problem:
        raise shared_error(
            f"{run.path}: was started from {folder}, which cannot be used ({problem}); "
            "restore it, or choose another --output"
        )
    return folder, checkpoint.read_state(folder)


def prepare_stage(model: Model, experiment: Experiment, number: int, run: RunFolder, device: torch.device) -> int:
    """Give the captioner the weights of the stage before, or of ``projector.init``, and freeze all but what this
    one trains.
    Returns which layers recompute their activations: none (0), or every n-th.

    The adapter comes into being in the first stage that trains it.
    """
    stage = experiment.stages[number]
    captioner = model.captioner
    if number:
        load_artifact(run.artifact(experiment.stages[number - 1].name), captioner)
    elif experiment.projector.init is not None:
        load_projector(read_artifact(run.path / COPY), captioner.projector)
    if "peft" in stage.train and not isinstance(captioner.llm, PeftModel):
        torch.manual_seed(experiment.training.seed + 1)  # the same adapter on every rank
        with phase("adding the adapter"):  # for DoRA's magnitudes, each weight is unpacked
            captioner.llm = add_adapter(captioner.llm, experiment.peft)
    freeze(captioner, stage)
    every = checkpointed_layers(experiment, stage, model.tower is None, device)
    checkpoint_activations(captioner, every)
    if dist.get_rank() == 0 and device.type == "cuda":
        layers = {0: "of no layer", 1: "of every layer"}.get(every, f"of one layer in {every}")
        log_line(f"vlmds: {stage.name}: activations {layers} are computed again in the backward pass")
    return every


def finish_stage(trainer: StageTrainer) -> None:
    """Save the artifact and take the engine down."""
    stage, model = trainer.stage, trainer.model
    doing(f"saving the artifact of {stage.name}")
    artifact = stage.run.artifact(stage.name)
    trainer.checkpoints.take_best(trainer.progress)
    lineage = {**trainer.checkpoints.lineage, "tower": model.tower_fingerprint(), "step": trainer.progress.step}
    with trainer.average.applied() if trainer.average else nullcontext():
        on_main(lambda: save_artifact(artifact, model.captioner, stage.experiment, stage.name, lineage))
    stage.monitor.say(f"{stage.name}: finished, {artifact}")
    trainer.close()
