"""The trained projector that a run starts from (``projector.init``): its source, its copy in the run folder, and
whether it fits the experiment.

At the first start it is copied into the folder ``init`` of the run, from which all ranks load it; a resumed run needs
only this copy. ``run.json`` records the source under "init".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vlmds.errors import InputError
from vlmds.experiments.differences import flat_settings
from vlmds.experiments.reading import load_experiment
from vlmds.experiments.schema import Experiment
from vlmds.files import new_folder
from vlmds.models.artifact import (
    PROJECTOR_FILES,
    Artifact,
    copy_projector,
    is_artifact,
    projector_sha256,
    projector_weights,
    read_artifact,
    resolve_artifact,
    trained_with_adapter,
)
from vlmds.models.hub import commit_of
from vlmds.models.projectors import Projector
from vlmds.runs.folder import RunFolder, final_artifact

COPY = "init"


@dataclass(frozen=True)
class InitialProjector:
    """artifact: the source, or its copy in a run folder. record: its entry in run.json: "path", "id" of the
    source's run, "commit" on the hub, "stage" and "projector_sha256"."""

    artifact: Artifact
    record: dict

    def __str__(self) -> str:
        record, note = self.record, ""
        origin = record["commit"] or record["id"]
        if trained_with_adapter(self.artifact):
            note = "; it was trained together with an adapter, which is not taken"
        return (
            f"projector.init: stage {record['stage']} of {record['path']}{f' ({origin})' if origin else ''}, "
            f"sha256 {record['projector_sha256'][:12]}{note}"
        )


def initial_projector(experiment: Experiment, *runs: Path | None) -> InitialProjector | None:
    """The projector that the experiment starts from, or None. If it is on the hub, it is downloaded.

    Args:
        runs: folders of earlier runs. If the first that exists has the same ``projector.init``, its copy is used.

    Raises:
        InputError: there is no such projector, or it has other weights now than when that run began.
    """
    name = experiment.projector.init
    if name is None:
        return None
    earlier = next((run for run in runs if run is not None and (run / "run.json").is_file()), None)
    recorded = RunFolder.read(earlier).get("init") if earlier is not None else None
    if earlier is None or recorded is None or load_experiment(earlier / "experiment.yaml").projector.init != name:
        artifact = _source(name)
        return InitialProjector(artifact, _record(artifact))
    now = known = recorded["projector_sha256"]
    if Path(name).expanduser().is_dir():
        with suppress(InputError):  # the rest of a deleted source
            now = projector_sha256(_source(name, recorded["stage"]))
    if now != known:
        raise InputError(
            f"projector.init: {name} has other weights (sha256 {now[:12]}) than {earlier} started from "
            f"({known[:12]}); restore them, or choose another --output"
        )
    return InitialProjector(read_artifact(earlier / COPY), recorded)


def _source(name: str, stage: str | None = None) -> Artifact:
    """The artifact that ``projector.init`` names. stage: of a run folder; None stands for the last finished one."""
    try:
        folder = resolve_artifact(Path(name).expanduser() if name.startswith("~") else name, PROJECTOR_FILES)
        if not is_artifact(folder):
            folder = folder / "artifacts" / stage if stage else final_artifact(folder)
        return read_artifact(folder)
    except InputError as error:
        raise InputError(f"projector.init: {str(error).removeprefix('--run ')}") from None


def _record(artifact: Artifact) -> dict:
    folder = artifact.folder.absolute()
    run = folder.parent.parent / "run.json"
    return {
        "path": str(folder),
        "id": json.loads(run.read_text(encoding="utf-8")).get("id") if run.is_file() else None,
        "commit": commit_of(folder),
        "stage": artifact.meta["stage"],
        "projector_sha256": projector_sha256(artifact),
    }


def keep_initial(initial: InitialProjector, run: Path) -> None:
    """Copy the projector into the run folder, unless it is there. Raises InputError if its file is damaged."""
    if not is_artifact(run / COPY):
        with new_folder(run / COPY) as new:
            copy_projector(initial.artifact, new)


def initial_lineage(record: dict) -> dict | None:
    """What artifacts and checkpoints record of the start: all but the path, which may be private."""
    found = record.get("init")
    return found and {key: value for key, value in found.items() if key != "path"}


def check_fits(initial: InitialProjector, experiment: Experiment, projector: Projector) -> None:
    """Check all that needs no weights of the pretrained models: the projector's keys, feature layer, pooling, and
    shapes.

    Args:
        projector: the experiment's; it may be on the meta device.

    Raises:
        InputError: names what differs, and the fix.
    """
    artifact, trained = initial.artifact, initial.artifact.trained
    where, other = f"projector.init: {artifact.folder}", "or name a projector that was trained so"
    theirs, ours = (flat_settings(each.model_dump()) for each in (trained, experiment))
    keys = ["projector.type"]
    if theirs["projector.type"] == ours["projector.type"]:
        keys = [key for key in ours if key.startswith("projector.") and key != "projector.init"]
        keys += ["vision.feature_layer", "vision.pool"]
    if wrong := [key for key in keys if theirs[key] != ours[key]]:
        differences = ", ".join(f"{key} {json.dumps(theirs[key])}, not {json.dumps(ours[key])}" for key in wrong)
        settings = " ".join(f"{key}={json.dumps(theirs[key])}" for key in wrong).replace('"', "")
        raise InputError(f"{where}: was trained with {differences}; set {settings}, {other}")
    for part, width in (("vision", projector.vision_dim), ("llm", projector.llm_dim)):
        if (recorded := artifact.meta[f"{part}_width"]) != width:
            model, mine = getattr(trained, part).model, getattr(experiment, part).model
            raise InputError(
                f"{where}: was trained for {part}.model {model} of width {recorded}, but {mine} has {width}; "
                f"set {part}.model to that model, {other}"
            )
    frames, wanted = trained.data.num_frames, experiment.data.num_frames
    if frames != wanted and "frame_time" in projector.state_dict():
        raise InputError(
            f"{where}: has embeddings of the times of {frames} frames, but data.num_frames is {wanted}; "
            f"set data.num_frames={frames}, {other}"
        )
    projector_weights(artifact, projector)


def check_pretrained(
    initial: InitialProjector, experiment: Experiment, tower: str | None, weights: Mapping[str, str] | None
) -> None:
    """Check that the projector was trained with this vision tower and language model. Where the artifact records
    no hashes, the models' names count; where a model is not here, its hashes cannot be compared.

    Args:
        tower: fingerprint of the experiment's tower. weights: sha256 of the language model's files by "llm/NAME";
            other names are ignored. None: not on this machine.

    Raises:
        InputError: names both models, and the fix.
    """
    artifact, lineage = initial.artifact, initial.artifact.meta["lineage"]
    for part, theirs, ours in (
        ("vision", lineage.get("tower"), tower),
        ("llm", _files(lineage.get("weights")), _files(weights)),
    ):
        old, new = getattr(artifact.trained, part).model, getattr(experiment, part).model
        if theirs is None:
            differs = Path(old).name != Path(new).name
        else:
            differs = ours is not None and ours != theirs
        if differs:
            raise InputError(
                f"projector.init: {artifact.folder}: was trained with {part}.model {old}, but {new} "
                f"{'has another name' if theirs is None else 'has other weights'}; set {part}.model to that model, "
                "or name a projector that was trained with this one"
            )


def _files(weights: Mapping[str, str] | None) -> dict[str, str] | None:
    """The hashes of the language model's weight files, without that of its tokenizer; None if there are none."""
    found = {name: sha256 for name, sha256 in (weights or {}).items() if name.startswith("llm/")}
    found.pop("llm/tokenizer", None)
    return found or None
