"""The pretrained models of an experiment: which commits, and their download from the hub.

Only the small text files in the repository's root and the weights are downloaded, in the one format
that transformers would load: safetensors, else PyTorch's ``.bin``. In a job one process for each
cache downloads, and the others wait for as long as bytes arrive.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vlmds.console.text import size_text
from vlmds.distributed.ranks import gather, on_each_cache, on_main, together
from vlmds.errors import InputError
from vlmds.experiments.schema import Experiment
from vlmds.files import refresh_listing
from vlmds.models.hub import (
    SMALL,
    ModelSection,
    cached_folder,
    commit_of,
    hub_cache,
    is_commit,
    is_local,
    key_of,
    missing_file,
    pretrained_models,
    snapshot,
    weight_names,
)
from vlmds.models.hub_download import ask_hub, bring, free_bytes, note_commit

VISIBLE_SECONDS = 90.0
"""Longest wait until another node's download is visible here: names on NFS may be a minute old."""


def config_folder(section: ModelSection) -> Path:
    """A folder with the model's config.json; if it is missing, that file alone is downloaded.

    Raises:
        InputError: as :func:`model_folder`.
    """
    pinned = snapshot(section.model, section.revision) if is_commit(section.revision) else None
    if pinned is not None and (pinned / "config.json").is_file():
        return pinned
    folder = cached_folder(section)
    if folder is None:
        found = ask_hub(section)
        if "config.json" not in found.sizes:
            raise InputError(
                f"{key_of(section)}: {section.model} has no config.json on the hub; name "
                "the repository of the whole model"
            )
        bring(section, found, ["config.json"])
        folder = snapshot(section.model, found.commit)
    return folder


def model_folder(section: ModelSection) -> Path:
    """The folder that the model is loaded from; what is missing of it is downloaded.

    Raises:
        InputError: it cannot be downloaded; the message names the reason and the fix.
    """
    return cached_folder(section) or download(section)


def pin_models(experiment: Experiment, recorded: Mapping[str, str | None] | None = None) -> Experiment:
    """The experiment with a commit as the ``revision`` of each model from the hub: the one it pins, or
    the recorded one; else the one in the cache; else the newest. All ranks of a job call it alike, and
    get the same.

    Args:
        recorded: "vision" and "llm" -> the commit that a run used before.

    Raises:
        InputError: on every rank, if the hub is needed and cannot be reached or has no such model.
    """
    commits = on_main(partial(_commits, experiment, recorded or {}))
    for part, section in pretrained_models(experiment).items():
        if part in commits and not is_local(section.model):  # a node may have a folder of that name
            pinned = section.model_copy(update={"revision": commits[part]})
            experiment = experiment.model_copy(update={part: pinned})
    return experiment


def fetch_models(experiment: Experiment) -> Experiment:
    """:func:`pin_models`, and the download of what is missing of both models on this machine. All ranks
    of a job call it alike.

    Raises:
        InputError: on every rank, as :func:`model_folder`.
    """
    experiment = pin_models(experiment)
    sections = pretrained_models(experiment).values()

    def work(report: Callable[[str], None]) -> None:
        for section in sections:
            if cached_folder(section) is None:
                download(section, report)

    incomplete = together(lambda: any(cached_folder(section) is None for section in sections))
    if any(gather(incomplete)):
        on_each_cache(work, hub_cache())
        together(lambda: _wait_until_visible(sections))
    return experiment


def fetch_newest(experiment: Experiment) -> Iterator[str]:
    """Download the newest commit of both models, or the one that the experiment pins. Yields a line
    for each when it is there. Raises InputError, as :func:`download`."""
    for section in pretrained_models(experiment).values():
        folder = cached_folder(section)
        if is_local(section.model):
            yield f"{section.model}: a folder, nothing to download"
            continue
        note = ""
        if folder is None:
            folder = download(section)
        elif commit_of(folder) != section.revision:
            try:
                folder = download(section)
            except InputError as error:
                note = f" (no newer one could be asked for: {str(error).partition('; ')[0]})"
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        yield f"{section.model}: commit {commit_of(folder)}, {size_text(size)}, in {folder}{note}"


def _commits(experiment: Experiment, recorded: Mapping[str, str | None]) -> dict[str, str]:
    """ "vision" and "llm" -> the commit to use, for those from the hub."""
    commits: dict[str, str] = {}
    for part, section in pretrained_models(experiment).items():
        if is_local(section.model):
            continue
        commit = section.revision or recorded.get(part)
        if not is_commit(commit):
            folder = cached_folder(section)
            commit = (commit_of(folder) if folder else None) or ask_hub(section).commit
            note_commit(section, commit)
        commits[part] = commit
    return commits


def _wait_until_visible(sections: Iterable[ModelSection]) -> None:
    """Wait for what another node downloaded: on a network drive it may be visible late. Raises InputError."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    for section in sections:
        while cached_folder(section) is None:
            if time.monotonic() > deadline:
                raise InputError(
                    f"{key_of(section)}: another process has downloaded {section.model}, "
                    f"but it does not show in {hub_cache()} here; start again"
                )
            refresh_listing(snapshot(section.model, section.revision or "main"))
            time.sleep(0.5)


@dataclass(frozen=True)
class Presence:
    """Whether a model is on this machine. here: it is, completely. missing: bytes to download, None if
    the hub could not be asked. text: one line without the model's name."""

    here: bool
    missing: int | None
    text: str


def presence(section: ModelSection) -> Presence:
    """Whether a start will find the model. Raises InputError: a path without a model."""
    folder = cached_folder(section)
    if folder is not None:
        commit = commit_of(folder)
        return Presence(True, 0, f"in {folder}" if commit is None else f"commit {commit[:12]} is in {hub_cache()}")
    try:
        missing = ask_hub(section, timeout=5.0).to_download(section)
    except InputError as error:
        reason = str(error).partition(": ")[2].removeprefix(f"{section.model} is not complete in {hub_cache()}, and ")
        return Presence(False, None, f"not in {hub_cache()}, and {reason}")
    return Presence(
        False,
        missing,
        f"{size_text(missing)} are to be downloaded to {hub_cache()} "
        f"({size_text(free_bytes())} free): a start does it, or ahead of it vlmds fetch",
    )


def download(section: ModelSection, report: Callable[[str], None] = lambda text: None) -> Path:
    """Download what the cache lacks of the newest commit of ``revision`` (null: of the main branch).
    Returns its folder.

    Args:
        report: called from another thread with a line of progress whenever bytes have arrived.

    Raises:
        InputError: no such repository, no permission, no network, no room.
    """
    name = section.model
    found = ask_hub(section)
    folder = snapshot(name, found.commit)
    bring(section, found, [file for file in found.sizes if file.endswith(SMALL)], report)
    weights = weight_names(section, found.sizes, lambda index: folder / index)
    absent = next((file for file in weights if file not in found.sizes), None)
    if not weights or absent:
        raise InputError(
            f"{key_of(section)}: {name} has no weights on the hub ("
            + (absent or "model.safetensors or pytorch_model.bin")
            + "); name the "
            "repository of the whole model"
        )
    bring(section, found, weights, report)
    if absent := missing_file(folder, section):
        raise InputError(
            f"{key_of(section)}: {name} has no {absent} on the hub; name the repository of the whole model"
        )
    note_commit(section, found.commit)
    return folder
