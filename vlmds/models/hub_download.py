"""Downloads of files from the Hugging Face hub into its cache, and the hub's list of a repository's files.

Temporary failures, such as a broken connection, are tried again; others are one line with the fix.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
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

from vlmds.console.progress import log_line, phase
from vlmds.console.quiet import quietly
from vlmds.console.text import size_text
from vlmds.errors import InputError
from vlmds.files import write
from vlmds.models.hub import (
    SMALL,
    HubArtifact,
    ModelSection,
    Source,
    hub_cache,
    is_commit,
    key_of,
    snapshot,
    weight_names,
)

Answer = TypeVar("Answer")
TRIES, LONGEST_WAIT = 8, 30.0
"""Attempts in a row that complete no file before a download fails, and the longest wait between them in
seconds."""
ASK_SECONDS = 10.0
"""Time for the hub to answer a question."""
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Repository:
    """A commit of a repository. sizes: bytes of each file; of a model, only of the files in its root."""

    commit: str
    sizes: dict[str, int]

    def to_download(self, section: ModelSection) -> int:
        """About how many bytes are missing here: instead of reading an index of weights, every file
        with the ending of weights is counted."""
        folder = snapshot(section.model, self.commit)
        names = {name for name in self.sizes if not name.endswith(".index.json")}
        found = weight_names(section, names, lambda name: folder / name)
        if not found:
            end = next(
                (end for end in (".safetensors", ".bin") if any(name.endswith(end) for name in self.sizes)), None
            )
            found = [name for name in self.sizes if end and name.endswith(end)]
        wanted = {name for name in self.sizes if name.endswith(SMALL)} | set(found)
        return sum(self.sizes[name] for name in wanted if not (folder / name).is_file())


def ask_hub(source: Source, timeout: float = ASK_SECONDS) -> Repository:
    """The newest commit of the source's revision on the hub, and its files.

    Raises:
        InputError: the hub cannot be asked, or it has no such repository.
    """
    try:
        with _translated(source):
            if constants.is_offline_mode():
                raise OfflineModeIsEnabled
            with phase(f"asking {constants.ENDPOINT} for {source.model}"):
                info = _within(
                    timeout,
                    lambda: HfApi().model_info(
                        source.model, revision=source.revision, files_metadata=True, timeout=timeout
                    ),
                )
    except _Interrupted as error:
        raise InputError(str(error)) from None
    if not info.sha:
        raise InputError(
            f"{key_of(source)}: {constants.ENDPOINT} does not say which commit of "
            f"{source.model} it has; set HF_ENDPOINT to a complete mirror of the hub"
        )
    whole = isinstance(source, HubArtifact)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    return Repository(info.sha, {name: size for name, size in sizes.items() if whole or "/" not in name})


def note_commit(source: Source, commit: str | None) -> None:
    """Record in the cache which commit the source's revision stands for, as huggingface_hub does. A
    later start then finds it without a network."""
    if commit is None or is_commit(source.revision):
        return
    path = snapshot(source.model, commit).parents[1] / "refs" / (source.revision or "main")
    with contextlib.suppress(OSError):  # a cache that may only be read
        if not path.is_file() or path.read_text().strip() != commit:
            write(path, commit)


def bring(
    source: Source, found: Repository, files: Iterable[str], report: Callable[[str], None] = lambda text: None
) -> None:
    """Download those of the files that are not in the cache, with retries. report: called from another
    thread with a line of progress.

    Raises:
        InputError: no permission, no network, no room.
    """
    folder = snapshot(source.model, found.commit)
    missing = [file for file in files if not (folder / file).is_file()]
    if not missing:
        return
    total = sum(found.sizes[file] for file in missing)
    _check_room(source, total)
    with phase(f"downloading {source.model}", total, "bytes", each_node=True) as shown:

        def advance(count: float) -> None:
            shown.advance(count)
            report(shown.progress_line())

        def absent() -> list[str]:
            return [file for file in missing if not (folder / file).is_file()]

        failures = 0
        while left := absent():
            shown.done = total - sum(found.sizes[file] for file in left)
            try:
                with _translated(source), quietly():
                    snapshot_download(
                        source.model, revision=found.commit, allow_patterns=left, tqdm_class=_byte_counter(advance)
                    )
                if absent():  # without a listing of the repository that is no error there
                    raise _Interrupted(
                        f"{key_of(source)}: {source.model}: {constants.ENDPOINT} gave "
                        f"no list of its files; try again later"
                    )
            except _Interrupted as error:
                # Whole files count: a part of one is not kept when its download breaks off.
                failures = 1 if len(absent()) < len(left) else failures + 1
                if failures == TRIES:
                    raise InputError(str(error)) from None
                wait = min(2.0 ** (failures - 1), LONGEST_WAIT)
                log_line(f"vlmds: {str(error).partition('; ')[0]}; trying again in {wait:.0f} s", sys.stderr)
                time.sleep(wait)


def _check_room(source: Source, wanted: int) -> None:
    """Raise InputError if the cache's disk has no room for so many bytes."""
    if (free := free_bytes()) < wanted:
        raise InputError(
            f"{key_of(source)}: {source.model} needs {size_text(wanted)} in "
            f"{hub_cache()}, but only {size_text(free)} are free; free some, or set "
            "HF_HOME to a folder on another disk"
        )


def _within(seconds: float, ask: Callable[[], Answer]) -> Answer:
    """The result of ``ask``, which may hang: the DNS look-up of the hub's name has no timeout.

    Raises:
        httpx.TimeoutException: no answer in twice the time.
    """
    answer: Future[Answer] = Future()

    def work() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:  # it belongs to the caller
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return answer.result(timeout=2 * seconds)
    except TimeoutError:
        raise httpx.TimeoutException(f"no answer within {2 * seconds:.0f} s") from None


def free_bytes() -> int:
    """Free bytes on the disk of the hub's cache, whose folder may not exist yet."""
    there = next(path for path in (hub_cache(), *hub_cache().parents) if path.exists())
    return shutil.disk_usage(there).free


def _byte_counter(advance: Callable[[float], None]) -> type[tqdm]:
    """A progress bar that shows nothing and reports how many bytes are written to disk."""

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
    """A temporary failure; its message is for the user if it persists."""


@contextmanager
def _translated(source: Source) -> Iterator[None]:
    """Context in which the hub's errors become one line with the fix.

    Raises:
        InputError: another attempt would not help. _Interrupted: it might.
    """
    key, name = key_of(source), source.model
    log_in = "log in (hf auth login, or HF_TOKEN) with an account that may read it"
    full = f"{key}: {name}: the disk of {hub_cache()} is full; free some, or set HF_HOME to a folder on another disk"
    ahead = (
        "copy its folder to this machine and name that"
        if isinstance(source, HubArtifact)
        else f"run vlmds fetch where there is a network and copy or share HF_HOME, or name a folder: --set {key}=DIR"
    )
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
            f"{source.revision}; take one that {constants.ENDPOINT}/{name}/commits lists"
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
        # hf_xet raises a RuntimeError for everything that fails inside it.
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
