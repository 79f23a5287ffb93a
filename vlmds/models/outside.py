"""Models that vlmds did not train: their folder, their download from the hub, and their licence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from vlmds.distributed.ranks import gather, on_each_cache, together
from vlmds.errors import InputError
from vlmds.models.hub import SMALL, HubArtifact, cached_snapshot, commit_of, hub_cache, is_local, snapshot, weight_names
from vlmds.models.hub_download import ask_hub, bring, note_commit

KEY = "--model"
CARD = "README.md"


@dataclass(frozen=True)
class OutsideModel:
    """A model's folder. revision: commit of the hub; None of a folder of one's own. licence: as the model card
    names it, if it does."""

    name: str
    folder: Path
    revision: str | None
    licence: str | None


def outside_model(name: str) -> OutsideModel:
    """The model in a folder, or of the hub (``owner/name`` or ``owner/name@revision``), of which one process for each
    cache downloads what is missing. All ranks of a job call it alike.

    Raises:
        InputError: on every rank: no such folder, or a repository that cannot be downloaded.
    """
    if is_local(name):
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            raise InputError(f"{KEY} {name}: not a model folder (no config.json in it)")
        return OutsideModel(name, folder, None, _licence(folder))
    repository, _, revision = name.partition("@")
    source = HubArtifact(repository, revision or None, KEY)

    def work(report: Callable[[str], None]) -> None:
        _download(source, report)

    if any(gather(together(lambda: _complete(source) is None))):
        on_each_cache(work, hub_cache())
    folder = together(lambda: _found(source))
    return OutsideModel(repository, folder, commit_of(folder), _licence(folder))


def _complete(source: HubArtifact) -> Path | None:
    """The model's snapshot in the cache, if it has a configuration and all weights."""
    folder = cached_snapshot(source)
    if folder is None or not (folder / "config.json").is_file():
        return None
    names = {path.name for path in folder.iterdir() if path.is_file()}
    weights = weight_names(source, names, lambda index: folder / index)
    return folder if weights and names.issuperset(weights) else None


def _found(source: HubArtifact) -> Path:
    if folder := _complete(source):
        return folder
    raise InputError(f"{KEY} {source.model}: was downloaded, but is not complete in {hub_cache()}; start again")


def _download(source: HubArtifact, report: Callable[[str], None]) -> None:
    found = ask_hub(source)
    folder = snapshot(source.model, found.commit)
    small = [file for file in found.sizes if "/" not in file and (file.endswith(SMALL) or file == CARD)]
    bring(source, found, small, report)
    weights = weight_names(source, found.sizes, lambda index: folder / index)
    if absent := [file for file in weights if file not in found.sizes] or not weights:
        raise InputError(
            f"{KEY} {source.model}: has no {absent[0] if isinstance(absent, list) else 'weights'} on the hub; name the "
            "repository of the whole model"
        )
    bring(source, found, weights, report)
    note_commit(source, found.commit)


def _licence(folder: Path) -> str | None:
    """What the front matter of the model card names."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        found = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(found, dict):
        return None
    licence = found.get("license_name") if found.get("license") == "other" else found.get("license")
    return str(licence) if licence else None
