"""The lineage of a run: its base weights, its data, and the stage before.

``run.json`` records it at the first start. Later starts and ``--from RUN`` compare: a projector only
works with its vision tower, and an adapter only with its language model.
"""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import torch.distributed as dist

from vlmds.distributed.ranks import gather, shared_error, together
from vlmds.errors import InputError
from vlmds.experiments.differences import differing_keys
from vlmds.experiments.reading import load_experiment
from vlmds.experiments.schema import Experiment, LanguageConfig
from vlmds.files import copy_files, machine, new_folder
from vlmds.models.artifact import is_artifact, projector_sha256, read_artifact
from vlmds.models.fetch import model_folder
from vlmds.models.hashes import weights_sha256
from vlmds.models.hub import weight_files
from vlmds.models.language import load_tokenizer
from vlmds.runs.folder import RunFolder, check_base_weights, stage_fingerprint
from vlmds.runs.initial import initial_lineage

# A projector of an earlier stage depends on these keys, the base weights and the sampling.
PROJECTOR_KEYS = ("projector", "vision.feature_layer", "vision.pool", "data.num_frames", "data.fit", "data.prompt")


def base_files(experiment: Experiment) -> dict[str, Path]:
    """The weight files of the pretrained models on this machine, by "vision/NAME" or "llm/NAME".

    Raises:
        InputError: a model has no weight files.
    """
    return {
        f"{part}/{path.name}": path
        for part, section in (("vision", experiment.vision), ("llm", experiment.llm))
        for path in weight_files(section, model_folder(section))
    }


def recorded_revisions(experiment: Experiment, *runs: Path | None) -> dict[str, str | None]:
    """The commits of the pretrained models that an earlier run was trained from.

    Args:
        runs: folders of earlier runs; the first that exists counts.

    Returns:
        By "vision" and "llm", for models that have the same name in the experiment. Empty if there is no
        earlier run, or it was begun before commits were recorded.

    Raises:
        InputError: the run is damaged.
    """
    run = next((run for run in runs if run is not None and (run / "run.json").is_file()), None)
    if run is None or not (revisions := RunFolder.read(run).get("revisions")):
        return {}
    theirs = load_experiment(run / "experiment.yaml")
    return {
        part: commit
        for part, commit in revisions.items()
        if getattr(theirs, part).model == getattr(experiment, part).model
    }


def base_weights(experiment: Experiment) -> dict[str, str]:
    """sha256 of every weight file, by "vision/NAME" or "llm/NAME", and of the tokenizer ("llm/tokenizer").

    All ranks call it. Each machine reads its own files, divided among its ranks.

    Raises:
        InputError: on every rank, if a file is missing or differs between two machines.
    """
    files = together(lambda: base_files(experiment))
    places = gather((machine(), platform.node()))
    here = [rank for rank, (where, _) in enumerate(places) if where == machine()]
    share = sorted(files)[here.index(dist.get_rank()) :: len(here)]
    mine = together(lambda: weights_sha256({name: files[name] for name in share}))
    mine["llm/tokenizer"] = together(lambda: tokenizer_sha256(experiment.llm))
    found: dict[str, tuple[str, str]] = {}
    for (_, host), hashes in zip(places, gather(mine)):
        for name, value in hashes.items():
            first, expected = found.setdefault(name, (host, value))
            if value != expected:
                raise shared_error(
                    f"{name.split('/')[0]}.model: {name} on {host} differs from that on "
                    f"{first}; give all machines the same files"
                )
    return {name: value for name, (_, value) in sorted(found.items())}


def inheritance(other: Path, experiment: Experiment, run: RunFolder) -> dict[str, dict]:
    """The stages that ``--from RUN`` takes from another run instead of training them: all except the last
    that this run does not have yet. Nothing is written.

    Returns:
        By stage, its origin for the run's record; the argument of :func:`inherit`.

    Raises:
        InputError: the other run has not finished a stage, or trained it with another projector,
            vision tower, language model, number of frames, fit, prompt or sampling, or from another
            ``projector.init`` than this experiment's, or on other data than the stage's own.
    """
    record = RunFolder.read(other)
    started, began = run.record.get("init"), record.get("init") or {}
    if started and started["projector_sha256"] != began.get("projector_sha256"):
        raise InputError(
            f"--from {other}: its projector did not start from projector.init {experiment.projector.init}; "
            "leave one of the two out"
        )
    taken = {}
    for number, stage in enumerate(experiment.stages[:-1]):
        source, target = other / "artifacts" / stage.name, run.artifact(stage.name)
        if not is_artifact(source):
            raise InputError(f"--from {other}: it has no finished stage {stage.name}")
        stage_artifact = read_artifact(source)
        meta, theirs = stage_artifact.meta, stage_artifact.trained
        keys = PROJECTOR_KEYS + (("peft",) if meta["adapter"] else ())
        if changed := differing_keys(
            theirs.for_stage(stage.name), experiment.for_stage(stage.name), only=keys, but=("projector.init",)
        ):
            raise InputError(
                f"--from {other}: its stage {stage.name} was trained with other settings ({'; '.join(changed)})"
            )
        if record["sampling"] != run.record["sampling"]:
            raise InputError(
                f"--from {other}: its frames were sampled or resized differently "
                f"({record['sampling']}, not {run.record['sampling']})"
            )
        ours = stage_fingerprint(run.record, stage.name)
        if "stage_data" in run.record and meta["lineage"].get("data_fingerprint", ours) != ours:
            raise InputError(f"--from {other}: its stage {stage.name} was not trained on the data of stages.{number}")
        check_base_weights(record["weights"], run.record["weights"], experiment, other)
        projector = projector_sha256(stage_artifact)
        if is_artifact(target):
            if projector_sha256(target) != projector:
                raise InputError(
                    f"--from {other}: {run.path} already has another stage {stage.name}; choose another --output"
                )
            continue
        taken[stage.name] = {"run": str(other.resolve()), "experiment": theirs.name, "projector_sha256": projector}
    return taken


def inherit(taken: dict[str, dict], run: RunFolder) -> None:
    """Copy these stages, and add their origin to the run's record, which the caller writes."""
    for name, origin in taken.items():
        with new_folder(run.artifact(name)) as new:
            copy_files(Path(origin["run"]) / "artifacts" / name, new)
        run.record.setdefault("inherited", {})[name] = origin


def stage_lineage(run: RunFolder, experiment: Experiment, number: int) -> dict:
    """What stage ``number`` of the run is trained from, as its checkpoints and artifact record it."""
    lineage = {name: run.record[name] for name in ("weights", "sampling")}
    lineage["data_fingerprint"] = stage_fingerprint(run.record, experiment.stages[number].name)
    lineage["revisions"] = run.record.get("revisions")  # None: the run was begun before they were recorded
    if init := initial_lineage(run.record):
        lineage["init"] = init
    if number:
        parent = experiment.stages[number - 1].name
        lineage["parent"] = {"stage": parent, "projector_sha256": projector_sha256(run.artifact(parent))}
    return lineage


def check_parent(lineage: dict, recorded: dict, where: Path) -> None:
    """Raise :class:`InputError` if a checkpoint was trained from another parent stage than the current one."""
    if lineage.get("parent") != recorded.get("parent"):
        parent = (lineage.get("parent") or recorded["parent"])["stage"]
        raise InputError(
            f"{where}: was trained from another {parent} than the current one in "
            "artifacts/; restore that artifact, or delete the checkpoints of this stage"
        )


def tokenizer_sha256(llm: LanguageConfig) -> str:
    """sha256 of the tokenizer (vocabulary and rules) and the chat template."""
    tokenizer = load_tokenizer(llm)
    described = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
    return hashlib.sha256(described.encode()).hexdigest()
