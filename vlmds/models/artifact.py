"""The artifact: the result of a stage, which inference loads.

    experiment.yaml        the resolved experiment
    artifact.json          format version, stage, the widths the projector was trained between,
                           sha256 of each file, and the lineage: what it was trained from
    projector.safetensors
    adapter/               PEFT's own format; absent while no stage has trained an adapter
    llm/                   only from ``vlmds export --merge``: the language model with the adapter
                           merged into it; "llm" in artifact.json names this folder

``vlmds export --format projector`` leaves the adapter out; "left_out" in artifact.json then says so, and
only ``projector.init`` takes such an artifact.

Loading is strict: a missing, extra or misshapen tensor is an error.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmds.console.progress import phase
from vlmds.errors import InputError
from vlmds.experiments.reading import load_experiment, override_experiment, to_yaml
from vlmds.experiments.schema import Experiment
from vlmds.files import is_there, new_folder, refresh_listing, sha256_of
from vlmds.models.captioner import Captioner
from vlmds.models.hub import HubArtifact, cached_snapshot, is_commit, is_local, snapshot
from vlmds.models.hub_download import ask_hub, bring, note_commit
from vlmds.models.language import add_adapter
from vlmds.models.projectors import Projector
from vlmds.models.vision import VisionTower

FORMAT, VERSION = "vlmds-artifact", 2
LEFT_OUT_VERSION = 3
READABLE = (1, 2, 3)
"""Version 2 added "llm", and "revisions" in the lineage. Version 3 is an artifact with "left_out", which an
older vlmds would caption with, without its adapter."""

PROJECTOR = "projector.safetensors"
ADAPTER = "adapter/adapter_model.safetensors"
LLM = "llm"
FILES = ("experiment.yaml", "artifact.json", "*.safetensors", "adapter/*", f"{LLM}/*")
"""What of a repository is downloaded."""
PROJECTOR_FILES = ("experiment.yaml", "artifact.json", PROJECTOR)
"""The part of it that ``projector.init`` needs."""


@dataclass(frozen=True)
class Artifact:
    """An artifact that has been read, see :func:`read_artifact`. meta: artifact.json. trained: the
    experiment as it was trained."""

    folder: Path
    meta: dict
    trained: Experiment


@phase("saving the artifact")
def save_artifact(folder: Path, captioner: Captioner, experiment: Experiment, stage: str, lineage: dict) -> None:
    """Write the artifact, atomically.

    Args:
        lineage: JSON values: the hashes of the data and models it was trained from.
    """
    adapter = isinstance(captioner.llm, PeftModel)
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "stage": stage,
        "adapter": adapter,
        "vision_width": captioner.projector.vision_dim,
        "llm_width": captioner.projector.llm_dim,
    }
    with new_folder(folder) as new:
        (new / "experiment.yaml").write_text(to_yaml(experiment), encoding="utf-8")
        state = captioner.projector.state_dict()
        # Clones: under an engine the parameters are views of one flat buffer.
        save_file({k: v.detach().cpu().clone() for k, v in state.items()}, new / PROJECTOR)
        if adapter:
            captioner.llm.save_pretrained(new / "adapter", save_embedding_layers=False)
        files = [PROJECTOR, *([ADAPTER] if adapter else [])]
        meta |= {"files": {name: sha256_of(new / name) for name in files}, "lineage": lineage}
        (new / "artifact.json").write_text(json.dumps(meta, indent=2) + "\n")


def copy_projector(artifact: Artifact, folder: Path) -> None:
    """Write the artifact's projector, without an adapter, into an empty folder: an artifact of its own.

    Raises:
        InputError: the projector's file is damaged.
    """
    for name in ("experiment.yaml", PROJECTOR):
        shutil.copyfile(artifact.folder / name, folder / name)
    meta = {key: value for key, value in artifact.meta.items() if key not in ("llm", "merged_adapter")}
    if trained_with_adapter(artifact):
        meta |= {"version": LEFT_OUT_VERSION, "left_out": "adapter"}
    meta |= {"adapter": False, "files": {PROJECTOR: projector_sha256(artifact)}}
    _check_file(folder / PROJECTOR, meta)
    (folder / "artifact.json").write_text(json.dumps(meta, indent=2) + "\n")


def trained_with_adapter(artifact: Artifact) -> bool:
    """Whether the projector was trained for a language model with an adapter."""
    return any(artifact.meta.get(key) for key in ("adapter", "merged_adapter", "left_out"))


def check_complete(artifact: Artifact) -> None:
    """Raise :class:`InputError` if the model's adapter was left out: its captions would be another model's."""
    if artifact.meta.get("left_out"):
        raise InputError(
            f"{artifact.folder}: is the projector alone of a model with an adapter; start a training from it with "
            "projector.init, or export the whole model with --format vlmds"
        )


def is_artifact(folder: Path) -> bool:
    return is_there(folder / "artifact.json")


def resolve_artifact(name: str | Path, files: Sequence[str] = FILES) -> Path:
    """The folder of an artifact: ``name`` itself, or its snapshot in the hub's cache, if it is
    ``owner/name`` or ``owner/name@revision`` of the hub. What is missing there is downloaded; where the
    hub cannot be asked for a newer commit, the one in the cache is used.

    Args:
        files: patterns of the names of the files that are needed.

    Raises:
        InputError: no such folder, and no such repository, or one that cannot be downloaded.
    """
    if Path(name).is_dir():
        return Path(name)
    if is_local(str(name)) or str(name).count("/") != 1:
        raise InputError(f"{name}: no such folder; give an artifact, or owner/name of the hub")
    repository, _, revision = str(name).partition("@")
    source = HubArtifact(repository, revision or None)
    cached = cached_snapshot(source)
    if cached is not None and not _is_complete(cached, files):
        cached = None
    if cached is not None and is_commit(revision):
        return cached
    try:
        found = ask_hub(source)
    except InputError:
        if cached is not None:
            return cached
        raise
    bring(source, found, [file for file in found.sizes if _is_needed(file, files)])
    note_commit(source, found.commit)
    return snapshot(repository, found.commit)


def _is_needed(file: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(file, pattern) for pattern in patterns)


def _is_complete(folder: Path, patterns: Sequence[str]) -> bool:
    """Whether the needed ones of the files that artifact.json names are there."""
    try:
        names = read_artifact(folder).meta["files"]
        return all((folder / name).is_file() for name in names if _is_needed(name, patterns))
    except InputError:
        return False


def artifact_experiment(artifact: Path | Artifact, overrides: Sequence[str] = ()) -> Experiment:
    """The artifact's experiment, with its stage's own data in ``data``. ``llm.model`` is the artifact's own
    language model if it has one, and ``llm.attention`` is auto: the implementation that it was trained with may
    not be installed here.

    Raises:
        InputError: not an artifact, one without its adapter, a bad override, or another LLM for one that has
            its own.
    """
    artifact = read_artifact(artifact)
    check_complete(artifact)
    own = artifact.meta.get("llm")
    overrides = ["llm.attention=auto", *_revisions(artifact, overrides), *overrides]
    if own is None:
        return stage_experiment(artifact, overrides)
    if any(override.startswith("llm.model=") for override in overrides):
        raise InputError(
            f"--set llm.model: {artifact.folder} has its own language model, with the adapter merged into it; "
            "leave the override out"
        )
    overrides = [text for text in overrides if not text.startswith("llm.revision=")]
    return stage_experiment(artifact, [*overrides, f"llm.model={artifact.folder / own}"])


def stage_experiment(artifact: Artifact, overrides: Sequence[str]) -> Experiment:
    """The experiment as it was trained, with the data of the artifact's stage in ``data``, then the overrides.
    Raises InputError."""
    trained = artifact.trained.for_stage(artifact.meta["stage"])
    return with_its_fit(artifact, override_experiment(trained, list(overrides), "experiment.yaml"))


def with_its_fit(artifact: Artifact, experiment: Experiment) -> Experiment:
    """The experiment. Raises :class:`InputError` if its data.fit is not the one of the artifact's training."""
    trained = artifact.trained.data.fit
    if experiment.data.fit != trained:
        raise InputError(
            f"--set data.fit={experiment.data.fit}: {artifact.folder} was trained with {trained}; leave it out"
        )
    return experiment


def _revisions(artifact: Artifact, overrides: Sequence[str]) -> list[str]:
    """Overrides that pin the commits in the lineage (version 2), except where the experiment names a
    revision itself or the model is overridden."""
    found = []
    for part, commit in (artifact.meta["lineage"].get("revisions") or {}).items():
        section = getattr(artifact.trained, part)
        if (
            commit
            and section.revision is None
            and not is_local(section.model)
            and not any(text.startswith(f"{part}.model=") for text in overrides)
        ):
            found.append(f"{part}.revision={commit}")
    return found


def read_artifact(artifact: Path | Artifact) -> Artifact:
    """The artifact in a folder; one that has been read is returned as it is.

    Raises:
        InputError: not an artifact, or of another format version.
    """
    if isinstance(artifact, Artifact):
        return artifact
    folder, path = artifact, artifact / "artifact.json"
    refresh_listing(path)
    try:
        meta = json.loads(path.read_text())
    except (OSError, ValueError):
        raise InputError(f"{folder}: not an artifact of vlmds (no readable artifact.json)") from None
    if meta.get("format") != FORMAT or meta.get("version") not in READABLE:
        raise InputError(
            f"{path}: {meta.get('format')} version {meta.get('version')}, but this "
            f"vlmds reads {FORMAT} versions {', '.join(map(str, READABLE))}"
        )
    return Artifact(folder, meta, load_experiment(folder / "experiment.yaml"))


def check_artifact_tower(artifact: Path | Artifact, experiment: Experiment, tower: VisionTower) -> None:
    """Raise :class:`InputError`, naming both, unless the artifact was trained on the features of
    this tower. experiment: the one in use, which may name another ``vision.model``."""
    artifact = read_artifact(artifact)
    recorded = artifact.meta["lineage"].get("tower")
    if recorded not in (None, tower.fingerprint()):
        raise InputError(
            f"{artifact.folder}: was trained on features of vision.model {artifact.trained.vision.model} "
            f"({recorded[:12]}), but {experiment.vision.model} is another tower "
            f"({tower.fingerprint()[:12]})"
        )


@phase("loading the artifact")
def load_artifact(artifact: Path | Artifact, captioner: Captioner) -> None:
    """Load an artifact's weights into a captioner, which gains the adapter if there is one.

    Raises:
        InputError: a file is damaged, or its tensors are not exactly the captioner's.
    """
    artifact = read_artifact(artifact)
    check_complete(artifact)
    folder, meta = artifact.folder, artifact.meta
    projector = captioner.projector
    for name, key, width in (("vision", "vision.model", projector.vision_dim), ("llm", "llm.model", projector.llm_dim)):
        if meta[f"{name}_width"] != width:
            raise InputError(
                f"{folder}: its projector was trained for {key} of width {meta[f'{name}_width']}, "
                f"but {getattr(artifact.trained, name).model} has hidden_size {width}"
            )
    load_projector(artifact, projector)
    if not meta["adapter"]:
        return
    if not isinstance(captioner.llm, PeftModel):
        captioner.llm = add_adapter(captioner.llm, artifact.trained.peft)
    path = folder / ADAPTER
    tensors = _read(path)
    expected = get_peft_model_state_dict(captioner.llm, save_embedding_layers=False)
    _check_same(path, tensors, expected)
    _check_file(path, meta)
    set_peft_model_state_dict(captioner.llm, tensors)


def projector_weights(artifact: Artifact, projector: Projector) -> dict[str, Tensor]:
    """The artifact's projector by name, checked against ``projector``, which may be on the meta device.

    Raises:
        InputError: the file is damaged, or its tensors are not exactly those of ``projector``.
    """
    path = artifact.folder / PROJECTOR
    tensors = _read(path)
    _check_same(path, tensors, projector.state_dict())
    _check_file(path, artifact.meta)
    return tensors


def load_projector(artifact: Artifact, projector: Projector) -> None:
    """Load the artifact's weights into ``projector``. Raises InputError, as :func:`projector_weights`."""
    projector.load_state_dict(projector_weights(artifact, projector))


def weights_sha256(artifact: Path | Artifact) -> str:
    """Hash that identifies an artifact's trained weights. Raises InputError."""
    return "-".join(sha256[:16] for sha256 in read_artifact(artifact).meta["files"].values())


def projector_sha256(artifact: Path | Artifact) -> str:
    """Hash that identifies an artifact's projector. Raises InputError."""
    return read_artifact(artifact).meta["files"][PROJECTOR]


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None


def _check_file(path: Path, meta: dict) -> None:
    """Raise :class:`InputError` unless it is the file that artifact.json was written with."""
    (expected,) = (sha256 for name, sha256 in meta["files"].items() if path.match(name))
    if sha256_of(path) != expected:
        raise InputError(f"{path}: its sha256 is not the one in artifact.json; restore the file, or train again")


def _check_same(path: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise :class:`InputError` unless both have the same names and shapes."""
    for problem, names in (("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{path}: {problem} tensor {min(names)}{more}")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise InputError(
                f"{path}: {name} has shape {list(tensor.shape)}, but the model needs {list(expected[name].shape)}"
            )
