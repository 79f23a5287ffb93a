"""Folders of the pretrained models on this machine, and which of their files are needed.

Every model is loaded from a folder: the user's own, or the snapshot of one commit in the cache of the
Hugging Face hub (``HF_HOME``). A complete snapshot is used as it is, without asking the hub.
:mod:`vlmds.models.fetch` downloads what is missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from huggingface_hub import constants, resolve_revision
from huggingface_hub.errors import HFValidationError, RevisionResolutionError
from huggingface_hub.file_download import repo_folder_name

from vlmds.errors import InputError
from vlmds.experiments.schema import Experiment, LanguageConfig, VisionConfig
from vlmds.permissions import denied

ModelSection = VisionConfig | LanguageConfig


@dataclass(frozen=True)
class HubArtifact:
    """An artifact, or another whole repository, on the hub. model: ``owner/name``. revision: commit, tag or branch.
    key: how messages name it."""

    model: str
    revision: str | None = None
    key: str = "artifact"


Source = ModelSection | HubArtifact
"""What can be downloaded."""

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files with a model's weights, or with their index, in the order of transformers' preference."""
SMALL = (".json", ".txt", ".model", ".jinja")
"""Endings of the names of configurations, tokenizers, chat templates and image processors."""


def key_of(source: Source) -> str:
    """How messages name it: by the experiment's key, ``vision.model`` or ``llm.model``, or by its own."""
    if isinstance(source, HubArtifact):
        return source.key
    return "vision.model" if isinstance(source, VisionConfig) else "llm.model"


def pretrained_models(experiment: Experiment) -> dict[str, ModelSection]:
    """The experiment's sections of pretrained models, by name."""
    return {"vision": experiment.vision, "llm": experiment.llm}


def is_local(name: str) -> bool:
    """Whether ``name`` is a path: it exists, or it cannot be a hub id (``owner/name``)."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def is_commit(revision: str | None) -> TypeGuard[str]:
    """Whether it is the full hash of a commit, and no branch or tag, which may move."""
    return re.fullmatch("[0-9a-f]{40}", revision or "") is not None


def hub_cache() -> Path:
    """The folder of the hub's cache, set by ``HF_HOME`` or ``HF_HUB_CACHE``."""
    return Path(constants.HF_HUB_CACHE).expanduser()


def snapshot(name: str, commit: str) -> Path:
    """The folder of this commit of a repository in the cache."""
    return hub_cache() / repo_folder_name(repo_id=name, repo_type="model") / "snapshots" / commit


def cached_snapshot(source: Source) -> Path | None:
    """The folder of the commit that the cache has for the source's revision, whole or not."""
    try:
        commit = resolve_revision(source.model, revision=source.revision, local_files_only=True).resolved
    except (RevisionResolutionError, HFValidationError):
        return None
    return snapshot(source.model, commit)


def commit_of(folder: Path) -> str | None:
    """The commit of a snapshot folder; None for the user's own folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def cached_folder(section: ModelSection) -> Path | None:
    """The folder that the model is loaded from, if the model is completely on this machine, else None.

    Raises:
        InputError: ``model`` is a path without a model, or a path with a revision.
    """
    name, key = section.model, key_of(section)
    if is_local(name):
        if section.revision is not None:
            raise InputError(
                f"{key.replace('.model', '.revision')}: {section.revision} names a commit of "
                f"the hub, but {key} {name} is a folder; leave the revision out"
            )
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            raise InputError(f"{key}: {name} is not a model folder (no config.json in it)")
        return folder
    found = cached_snapshot(section)
    try:
        return found if found is not None and missing_file(found, section) is None else None
    except PermissionError:
        raise InputError(f"{key}: {denied(hub_cache())}") from None


def missing_file(folder: Path, section: ModelSection) -> str | None:
    """The first file that loading needs and the folder lacks; None if it has all."""
    needed = ["config.json"]
    if isinstance(section, VisionConfig):
        needed.append("preprocessor_config.json")
    else:
        needed += ["tokenizer_config.json", "tokenizer.json"]
    if absent := next((name for name in needed if not (folder / name).is_file()), None):
        return absent
    names = {path.name for path in folder.iterdir() if path.is_file()}  # a dangling link is none
    weights = weight_names(section, names, lambda index: folder / index)
    return next((name for name in weights if name not in names), None) if weights else WEIGHTS[0]


def weight_names(section: Source, names: Collection[str], path_of: Callable[[str], Path]) -> list[str]:
    """Names of the files that transformers loads the weights from, sorted; empty if there are none.

    Args:
        names: files of the model's folder or repository.
        path_of: returns the local path of an index of the weights.

    Raises:
        InputError: the index is damaged.
    """
    found = next((name for name in WEIGHTS if name in names), None)
    if found is None or not found.endswith(".json"):
        return [found] if found else []
    try:
        parts = set(json.loads(path_of(found).read_text(encoding="utf-8"))["weight_map"].values())
        inside = next((part for part in parts if Path(part).name != part), None)
        if inside is None:
            return sorted(parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{key_of(section)}: {section.model}: {found}, the index of its weights, is damaged; download it again"
        ) from None
    raise InputError(
        f"{key_of(section)}: {section.model}: {found} names {inside}, but weights must lie "
        "beside it; save the model again with save_pretrained"
    )


def weight_files(section: ModelSection, folder: Path) -> list[Path]:
    """The files in ``folder`` that the model's weights are loaded from, sorted.

    Raises:
        InputError: there are none, or one that an index names is not there.
    """
    names = {path.name for path in folder.iterdir()}
    files = weight_names(section, names, lambda index: folder / index)
    where = f"{key_of(section)}: {section.model}"
    if not files:
        raise InputError(f"{where} has no weights (*.safetensors) in {folder}")
    if absent := next((name for name in files if name not in names), None):
        raise InputError(f"{where}: {absent}, which its index names, is not in {folder}; restore it")
    return [folder / name for name in files]
