"""The origin of a run: a checkpoint (``--resume PATH``), another run's stages (``--from RUN``) or a trained
projector (``projector.init``), checked and taken over."""

from __future__ import annotations

from pathlib import Path

from vlmds.console.progress import log_line
from vlmds.errors import InputError
from vlmds.experiments.schema import Experiment
from vlmds.files import copy_files, new_folder
from vlmds.runs.folder import RunFolder, check_same_experiment, stage_fingerprint
from vlmds.runs.initial import InitialProjector, initial_lineage, keep_initial
from vlmds.runs.lineage import inherit, inheritance
from vlmds.training import checkpoint


def check_origin(
    run: RunFolder, experiment: Experiment, start_from: Path | None, from_run: Path | None
) -> dict[str, dict]:
    """Check the checkpoint and the run that this run starts from; nothing is written. Returns the
    stages to inherit."""
    if start_from is not None and not started_from(run, start_from):
        check_adoptable(start_from, experiment, run)
    return inheritance(from_run, experiment, run) if from_run is not None else {}


def begin(
    run: RunFolder,
    experiment: Experiment,
    start_from: Path | None,
    taken: dict[str, dict],
    initial: InitialProjector | None = None,
) -> RunFolder:
    """Write the run, and take over the stages, the checkpoint and the projector that it starts from. Returns
    the run.

    Raises:
        InputError: meanwhile another start has begun a run there.
    """
    if len(run.record["starts"]) == 1 and (run.path / "run.json").is_file():
        raise InputError(
            f"--output {run.path}: another start has begun a run there meanwhile; "
            "choose another --output, or start again to go on with that one"
        )
    again = start_from is not None and started_from(run, start_from)
    if again:
        log_line(f"vlmds: {run.path}: started from {start_from} before, and goes on from there")
    elif start_from is not None:
        run.record["resumed_from"] = {
            "checkpoint": str(start_from.resolve()),
            "stage": checkpoint.read_state(start_from)["stage"],
        }
    inherit(taken, run)
    if initial is not None:
        keep_initial(initial, run.path)
    if start_from is not None and not again:
        adopt(start_from, experiment, run)
    run.begin(experiment)
    return run


def started_from(run: RunFolder, folder: Path) -> bool:
    """Whether an earlier start of the run has taken the checkpoint ``folder`` over."""
    origin = run.record.get("resumed_from", {})
    return origin.get("checkpoint") == str(folder.resolve())


def check_adoptable(folder: Path, experiment: Experiment, run: RunFolder) -> None:
    """Raise InputError unless the checkpoint ``folder`` is intact and this run could have written it."""
    problem = checkpoint.check(folder)
    if problem:
        raise InputError(f"--resume {folder}: not a usable checkpoint: {problem}")
    other = folder.resolve().parent.parent
    check_same_experiment(other, experiment)
    if other != run.path.resolve() and any(run.path.glob("checkpoints/[a-z]*")):
        raise InputError(f"--resume {folder}: {run.path} has checkpoints of its own; choose another --output")
    state, record = checkpoint.read_state(folder), RunFolder.read(other)
    stages = [stage.name for stage in experiment.stages]
    ours = {
        **run.record,
        "data_fingerprint": stage_fingerprint(run.record, state["stage"]),
        "init": initial_lineage(run.record),
    }
    for name, what in (
        ("data_fingerprint", "on other data"),
        ("weights", "from other base weights"),
        ("sampling", "on frames that were sampled or resized otherwise"),
        ("init", "from another projector.init"),
    ):
        if state["lineage"].get(name, ours[name]) != ours[name]:
            raise InputError(f"--resume {folder}: was trained {what}; use the same, or start a new run")
    for stage in stages[: stages.index(state["stage"])]:  # taken over with the checkpoint
        if stage_fingerprint(record, stage) != stage_fingerprint(run.record, stage):
            raise InputError(f"--resume {folder}: its stage {stage} was trained on other data; use the same")
    theirs = record["global_batch"]
    if theirs != run.global_batch:
        raise InputError(
            f"--resume {folder}: was trained with training.global_batch {theirs}, not {run.global_batch}; set that"
        )


def adopt(folder: Path, experiment: Experiment, run: RunFolder) -> None:
    """Prepare the start from the checkpoint ``folder``. If it is of another run, that one's finished
    stages are copied here; if it is of this one, later checkpoints and artifacts are moved aside."""
    names = [stage.name for stage in experiment.stages]
    number = names.index(checkpoint.read_state(folder)["stage"])
    other = folder.resolve().parent.parent
    if other != run.path.resolve():
        for name in names[:number]:
            with new_folder(run.artifact(name)) as new:
                copy_files(other / "artifacts" / name, new)
        return
    later = [found for found in checkpoint.checkpoints(run.checkpoints, names[number]) if found.name > folder.name]
    for name in names[number + 1 :]:
        later += checkpoint.checkpoints(run.checkpoints, name)
    later += [run.artifact(name) for name in names[number:] if run.artifact(name).exists()]
    if later:
        aside = run.path / f"before-start-{len(run.record['starts'])}"
        aside.mkdir(exist_ok=True)
        log_line(f"vlmds: what came after {folder.name} is moved to {aside}")
        for found in later:
            found.rename(aside / f"{found.parent.name}-{found.name}")
