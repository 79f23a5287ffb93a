"""Files and folders that appear whole or not at all, also when the power goes."""

import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

from upath import UPath


def as_path(place: str | os.PathLike) -> Path:
    """A ``Path``, or for a URL that fsspec knows (``s3://…``, ``memory://…``) a ``UPath``, which
    offers the same methods."""
    return UPath(place) if "://" in str(place) else Path(place)


def absolute(place: str | os.PathLike) -> str:
    """A path as it is found from any working folder; a URL stays as it is."""
    return str(place) if "://" in str(place) else str(Path(place).absolute())


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name whole and on disk, or (after an error) not at all.

    At a URL the file is made on this machine and then uploaded; object stores show an upload when
    it is complete.
    """
    if hasattr(path, "fs"):
        with tempfile.NamedTemporaryFile() as file:
            yield file
            file.flush()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.fs.put_file(file.name, path.path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a write that fails does not say where
        raise
    sync_folder(path.parent)


def temporary_owner(path: Path) -> tuple[bool, str]:
    """Whether a temporary file of :func:`replacing` is of this machine (and container), and its
    writer's process id there."""
    rest, _, pid = path.name.removesuffix(".tmp").rpartition("~")
    return rest.endswith(f".{machine()}"), pid


@cache
def machine() -> str:
    """Names where a process id means the same process: this start of this machine, and in it this
    namespace of process ids. Host names may be the same on many machines, and in containers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    parts = [platform.node(), boot.read_text().strip() if boot.is_file() else "",
             os.readlink("/proc/self/ns/pid") if os.path.islink("/proc/self/ns/pid") else ""]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def write(path: Path, data: bytes | str) -> None:
    """Replace the file's content, atomically."""
    with replacing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_once(path: Path, data: bytes) -> None:
    """Make the file, whole and on disk, unless there is one: of processes that start together the
    first one's stays. (At a URL the last one's may.)"""
    if hasattr(path, "fs"):
        if not path.exists():
            write(path, data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # some file systems have no links; there, the last one's may stay
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _temporary(path: Path) -> Path:
    """Where this process writes what will be `path`."""
    return path.with_name(f".{path.name}.{machine()}~{os.getpid()}.tmp")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which then appears under its name with all its files on disk; after an
    error it is removed. A folder that stands there already is replaced."""
    temporary = temporary_folder(path)
    try:
        yield temporary
        publish_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def temporary_folder(path: Path) -> Path:
    """An empty folder beside `path`, for :func:`publish_folder`. Its name does not vary, so that
    what a killed process left there is removed by the next one."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def publish_folder(temporary: Path, path: Path) -> None:
    """Flush every file of the folder to disk and give it its name."""
    for file in temporary.rglob("*"):
        sync_folder(file) if file.is_dir() else sync_file(file)
    sync_folder(temporary)
    if path.exists():
        shutil.rmtree(path)
    temporary.rename(path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sha256_of(path: Path, advance: Callable[[int], object] = lambda size: None) -> str:
    """The file's sha256 in hexadecimal. advance: told of the bytes of each piece that is read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()
