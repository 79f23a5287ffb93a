"""Downloads pretrained models from the Hugging Face hub into its cache.

Of a repository only the small text files of the root and the weights are taken, in the one format
that transformers would load: safetensors, else PyTorch's ``.bin``. In a job one process for each
cache downloads, and the others wait for as long as bytes arrive.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx
from tqdm import tqdm

from vlmds.console.progress import phase, tell
from vlmds.console.quiet import quietly
from vlmds.console.units import size_text
from vlmds.distributed.ranks import gather, on_each_cache, on_main, together
from vlmds.errors import InputError
from vlmds.experiments.schema import Experiment
from vlmds.files import look_again, write
from vlmds.models.hub import (
    SMALL,
    Section,
    cached_folder,
    commit_of,
    hub_cache,
    is_commit,
    is_local,
    key_of,
    missing_file,
    snapshot,
    weight_names,
)

Answer = TypeVar("Answer")
TRIES, LONGEST_WAIT = 8, 30.0
"""Of a download that breaks off: attempts in a row that complete no file, and the longest wait in
seconds before the next."""
ASK_SECONDS = 10.0
"""Until the hub must have answered a question."""
VISIBLE_SECONDS = 90.0
"""Until what another node downloaded must be seen here: names on NFS may be a minute old."""
FULL = (errno.ENOSPC, errno.EDQUOT)


def config_folder(section: Section) -> Path:
    """A folder with the model's config.json, which alone is downloaded if it is not here.

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
        _bring(section, found, ["config.json"], lambda text: None)
        folder = snapshot(section.model, found.commit)
    return folder


def model_folder(section: Section) -> Path:
    """The folder that the model is loaded from; what is missing of it is downloaded.

    Raises:
        InputError: it cannot be had; the message names the reason and the fix.
    """
    return cached_folder(section) or download(section)


def pin_models(experiment: Experiment, recorded: Mapping[str, str | None] | None = None) -> Experiment:
    """The experiment with a commit as the ``revision`` of each model that is of the hub: the one it
    pins itself, or that is recorded; else the one that the cache has; else the newest. All ranks of a
    job call it alike, and get the same.

    Args:
        recorded: "vision" and "llm" -> the commit that a run used before.

    Raises:
        InputError: on every rank; the hub has to be asked, and cannot be, or has no such model.
    """
    commits = on_main(partial(_commits, experiment, recorded or {}))
    for part, commit in commits.items():
        if not is_local(getattr(experiment, part).model):
            experiment = _pinned(experiment, part, commit)
    return experiment


def fetch_models(experiment: Experiment) -> Experiment:
    """The experiment as :func:`pin_models` gives it, both of whose models are on this machine. All
    ranks of a job call it alike.

    Raises:
        InputError: on every rank, as :func:`model_folder`.
    """
    experiment = pin_models(experiment)
    sections = (experiment.vision, experiment.llm)

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
    for section in (experiment.vision, experiment.llm):
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


def _pinned(experiment: Experiment, part: str, commit: str | None) -> Experiment:
    section = getattr(experiment, part).model_copy(update={"revision": commit})
    return experiment.model_copy(update={part: section})


def _commits(experiment: Experiment, recorded: Mapping[str, str | None]) -> dict[str, str]:
    """ "vision" and "llm" -> the commit to use of each that is of the hub."""
    commits = {}
    for part in ("vision", "llm"):
        section = getattr(experiment, part)
        if is_local(section.model):
            continue
        commits[part] = section.revision or recorded.get(part)
        if not is_commit(commits[part]):
            folder = cached_folder(section)
            commits[part] = commit_of(folder) if folder else ask_hub(section).commit
            _note(section, commits[part])
    return commits


def _note(section: Section, commit: str | None) -> None:
    """Note in the cache which commit the model's revision stands for, as huggingface_hub does, so
    that a later start finds it without a network."""
    if commit is None or is_commit(section.revision):
        return
    path = snapshot(section.model, commit).parents[1] / "refs" / (section.revision or "main")
    with contextlib.suppress(OSError):  # a cache that may only be read
        if not path.is_file() or path.read_text().strip() != commit:
            write(path, commit)


def _wait_until_visible(sections: Iterable[Section]) -> None:
    """What another node downloaded may show late on a network drive."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    for section in sections:
        while cached_folder(section) is None:
            if time.monotonic() > deadline:
                raise InputError(
                    f"{key_of(section)}: another process has downloaded {section.model}, "
                    f"but it does not show in {hub_cache()} here; start again"
                )
            look_again(snapshot(section.model, section.revision or "main"))
            time.sleep(0.5)


@dataclass(frozen=True)
class Repository:
    """A commit as the hub describes it. sizes: bytes of each file in its root."""

    commit: str
    sizes: dict[str, int]

    def to_download(self, section: Section) -> int:
        """About how many bytes are missing here; an index of weights is not read for it, but every
        file of its kind counted."""
        folder = snapshot(section.model, self.commit)
        found = weight_names(
            section, {name for name in self.sizes if not name.endswith(".index.json")}, lambda name: folder / name
        )
        if not found:
            end = next(
                (end for end in (".safetensors", ".bin") if any(name.endswith(end) for name in self.sizes)), None
            )
            found = [name for name in self.sizes if end and name.endswith(end)]
        wanted = {name for name in self.sizes if name.endswith(SMALL)} | set(found)
        return sum(self.sizes[name] for name in wanted if not (folder / name).is_file())


def ask_hub(section: Section, timeout: float = ASK_SECONDS) -> Repository:
    """What the hub has under the model's name and revision.

    Raises:
        InputError: the hub cannot be asked, or it has no such model.
    """
    try:
        with _translated(section):
            if constants.is_offline_mode():
                raise OfflineModeIsEnabled
            with phase(f"asking {constants.ENDPOINT} for {section.model}"):
                info = _within(
                    timeout,
                    lambda: HfApi().model_info(
                        section.model, revision=section.revision, files_metadata=True, timeout=timeout
                    ),
                )
    except _Interrupted as error:
        raise InputError(str(error)) from None
    if not info.sha:
        raise InputError(
            f"{key_of(section)}: {constants.ENDPOINT} does not say which commit of "
            f"{section.model} it has; set HF_ENDPOINT to a complete mirror of the hub"
        )
    return Repository(
        info.sha, {file.rfilename: file.size or 0 for file in info.siblings or () if "/" not in file.rfilename}
    )


@dataclass(frozen=True)
class Presence:
    """Whether a model is on this machine. here: all of it is. missing: bytes to download, None if the
    hub could not be asked. text: one line without the model's name."""

    here: bool
    missing: int | None
    text: str


def presence(section: Section, timeout: float = 5.0) -> Presence:
    """What a start will find. timeout: seconds for the hub to answer. Raises InputError: a path
    without a model."""
    folder = cached_folder(section)
    if folder is not None:
        commit = commit_of(folder)
        return Presence(True, 0, f"in {folder}" if commit is None else f"commit {commit[:12]} is in {hub_cache()}")
    try:
        missing = ask_hub(section, timeout).to_download(section)
    except InputError as error:
        reason = str(error).partition(": ")[2].removeprefix(f"{section.model} is not complete in {hub_cache()}, and ")
        return Presence(False, None, f"not in {hub_cache()}, and {reason}")
    return Presence(
        False,
        missing,
        f"{size_text(missing)} are to be downloaded to {hub_cache()} "
        f"({size_text(_free_bytes())} free): a start does it, or ahead of it vlmds fetch",
    )


def download(section: Section, report: Callable[[str], None] = lambda text: None) -> Path:
    """Bring the newest commit of ``revision`` (null: of the main branch) into the cache, as far as it
    is not there. Returns its folder.

    Args:
        report: called from another thread, with how far it is, whenever bytes have arrived.

    Raises:
        InputError: no such repository, no permission, no network, no room.
    """
    name = section.model
    found = ask_hub(section)
    folder = snapshot(name, found.commit)
    _bring(section, found, [file for file in found.sizes if file.endswith(SMALL)], report)
    weights = weight_names(section, found.sizes, lambda index: folder / index)
    absent = next((file for file in weights if file not in found.sizes), None)
    if not weights or absent:
        raise InputError(
            f"{key_of(section)}: {name} has no weights on the hub ("
            + (absent or "model.safetensors or pytorch_model.bin")
            + "); name the "
            "repository of the whole model"
        )
    _bring(section, found, weights, report)
    if absent := missing_file(folder, section):
        raise InputError(
            f"{key_of(section)}: {name} has no {absent} on the hub; name the repository of the whole model"
        )
    _note(section, found.commit)
    return folder


def _bring(section: Section, found: Repository, files: Iterable[str], report: Callable[[str], None]) -> None:
    """Download those of the files that are not in the cache, also over a connection that breaks."""
    folder = snapshot(section.model, found.commit)
    missing = [file for file in files if not (folder / file).is_file()]
    if not missing:
        return
    total = sum(found.sizes[file] for file in missing)
    _check_room(section, total)
    with phase(f"downloading {section.model}", total, "bytes", each_node=True) as shown:

        def advance(count: float) -> None:
            shown.advance(count)
            report(shown.under_way())

        def absent() -> list[str]:
            return [file for file in missing if not (folder / file).is_file()]

        failures = 0
        while left := absent():
            shown.done = total - sum(found.sizes[file] for file in left)
            try:
                with _translated(section), quietly():
                    snapshot_download(
                        section.model, revision=found.commit, allow_patterns=left, tqdm_class=_byte_counter(advance)
                    )
                if absent():  # without a listing of the repository that is no error there
                    raise _Interrupted(
                        f"{key_of(section)}: {section.model}: {constants.ENDPOINT} gave "
                        f"no list of its files; try again later"
                    )
            except _Interrupted as error:
                # Whole files count: a part of one is not kept when its download breaks off.
                failures = 1 if len(absent()) < len(left) else failures + 1
                if failures == TRIES:
                    raise InputError(str(error)) from None
                wait = min(2.0 ** (failures - 1), LONGEST_WAIT)
                tell(f"vlmds: {str(error).partition('; ')[0]}; trying again in {wait:.0f} s", sys.stderr)
                time.sleep(wait)


def _check_room(section: Section, wanted: int) -> None:
    """Raise InputError if the cache's disk has no room for so many bytes."""
    if (free := _free_bytes()) < wanted:
        raise InputError(
            f"{key_of(section)}: {section.model} needs {size_text(wanted)} in "
            f"{hub_cache()}, but only {size_text(free)} are free; free some, or set "
            "HF_HOME to a folder on another disk"
        )


def _within(seconds: float, ask: Callable[[], Answer]) -> Answer:
    """What ``ask`` returns or raises; a look-up of the hub's name has no timeout of its own.

    Raises:
        httpx.TimeoutException: no answer in twice the time.
    """
    answers: queue.SimpleQueue[tuple[Answer | None, Exception | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((ask(), None))
        except Exception as error:  # it belongs to the caller
            answers.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        answer, error = answers.get(timeout=2 * seconds)
    except queue.Empty:
        raise httpx.TimeoutException(f"no answer within {2 * seconds:.0f} s") from None
    if error is not None:
        raise error
    return answer


def _free_bytes() -> int:
    """On the disk of the hub's cache, which may not be there yet."""
    there = next(path for path in (hub_cache(), *hub_cache().parents) if path.exists())
    return shutil.disk_usage(there).free


def _byte_counter(advance: Callable[[float], None]) -> type[tqdm]:
    """A progress bar that shows nothing and passes on how many bytes are written to disk."""

    class ByteCounter(tqdm):
        def __init__(self, *args, **options):
            options.pop("name", None)
            # snapshot_download has three bars: files, bytes received, and bytes "reconstructed".
            self._counts = "Reconstruct" in (options.get("desc") or "")
            super().__init__(*args, **{**options, "file": open(os.devnull, "w")})  # noqa: SIM115

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts and n:
                advance(n)
            return super().update(n)

        def close(self) -> None:
            super().close()
            self.fp.close()

    return ByteCounter


class _Interrupted(Exception):
    """The connection failed in a way that may pass. The message is for the user if it does not."""


@contextmanager
def _translated(section: Section) -> Iterator[None]:
    """Turn the hub's errors into one line with the fix.

    Raises:
        InputError: trying again would not help. _Interrupted: it might.
    """
    key, name = key_of(section), section.model
    log_in = "log in (hf auth login, or HF_TOKEN) with an account that may read it"
    full = f"{key}: {name}: the disk of {hub_cache()} is full; free some, or set HF_HOME to a folder on another disk"
    ahead = f"run vlmds fetch where there is a network and copy or share HF_HOME, or name a folder: --set {key}=DIR"
    try:
        yield
    except OfflineModeIsEnabled:
        raise InputError(
            f"{key}: {name} is not complete in {hub_cache()}, and HF_HUB_OFFLINE forbids "
            f"downloads; unset it, or {ahead}"
        ) from None
    except GatedRepoError:
        raise InputError(
            f"{key}: {name} is gated: ask for access at {constants.ENDPOINT}/{name}, then {log_in}"
        ) from None
    except RevisionNotFoundError:
        raise InputError(
            f"{key.replace('.model', '.revision')}: {name} has no revision "
            f"{section.revision}; take one that {constants.ENDPOINT}/{name}/commits lists"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{key}: {constants.ENDPOINT} has no repository {name}, or it is private; correct the name, or {log_in}"
        ) from None
    except HFValidationError:
        raise InputError(f"{key}: {name} is neither a folder here nor a name of the hub (owner/name)") from None
    except HfHubHTTPError as error:
        status = _status(error)
        line = f"{key}: {name}: {constants.ENDPOINT} answers {status}: {_one_line(error)}"
        if status in (401, 403):
            raise InputError(f"{line}; {log_in}") from None
        raise _Interrupted(f"{line}; try again later, or {ahead}") from None
    except (httpx.HTTPError, LocalEntryNotFoundError, RuntimeError) as error:
        # A RuntimeError is what hf_xet makes of everything that fails under it.
        if isinstance(error, RuntimeError) and re.search("os error 28|No space left", str(error)):
            raise InputError(full) from None
        if _status(error.__cause__) in (401, 403):
            raise InputError(f"{key}: {constants.ENDPOINT} refuses {name} to this account; {log_in}") from None
        raise _Interrupted(
            f"{key}: {name} is not complete in {hub_cache()}, and {constants.ENDPOINT} "
            f"cannot be reached ({_one_line(error)}); {ahead}"
        ) from None
    except OSError as error:
        if error.errno in FULL:
            raise InputError(full) from None
        if error.errno is None:  # a file of another size than was promised
            raise _Interrupted(f"{key}: {name}: {_one_line(error)}") from None
        raise InputError(
            f"{key}: {name}: {error.filename or hub_cache()}: {error.strerror}; set HF_HOME to "
            "a folder that you may write"
        ) from None


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that an error of the hub's client stands for."""
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def _one_line(error: BaseException) -> str:
    """The innermost reason, short."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).partition("For more information")[0]
    return " ".join(text.split())[:160] or type(error).__name__
