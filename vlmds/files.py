"""Files and folders that appear complete or not at all, even after a power failure.

They may be on NFS, of which this is assumed: `rename` within a folder is atomic on the server; one
process at a time writes a file; opening a file after another machine closed it shows what was
written ("close-to-open"); listing a folder shows its current content, while a lookup of a single
name may be up to a minute out of date (:func:`refresh_listing`). A removed file that a process of this
machine still has open stays in its folder as `.nfs…`; a folder is therefore renamed first, and files
that cannot be removed stay under that name.

File modes are those that `open` and `mkdir` give: from the umask or the folder's default ACL, with
the group of a setgid folder. Libraries that write through temporary files of mode 0600 (safetensors)
are corrected when a folder is published.
"""

import errno
import hashlib
import os
import platform
import shutil
import stat
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from glob import escape
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from vlmds.console.text import install_hint
from vlmds.errors import InputError

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
"""The extra of pyproject.toml that installs a protocol's driver."""


def is_url(place: str | os.PathLike) -> bool:
    """Whether this is a URL: of any protocol, also chained ("simplecache::s3://bucket")."""
    return "://" in str(place)


def as_path(place: str | os.PathLike) -> Path:
    """A ``Path``, or for a URL that fsspec knows (``s3://…``, ``memory://…``) a ``UPath``, which
    has the same methods.

    Raises:
        InputError: a URL of an unknown protocol, or whose driver is not installed.
    """
    if not is_url(place):
        return Path(place)
    check_driver(str(place))
    from upath import UPath  # with fsspec 0.2 s, which decoding processes of local files do not need

    return cast(Path, UPath(place))


def check_driver(url: str) -> None:
    """Raise :class:`InputError` unless fsspec can open this URL."""
    from fsspec import get_filesystem_class

    if advice := driver_advice(url):
        raise InputError(f"{url}: {advice}")
    for protocol in _protocols(url):
        try:
            get_filesystem_class(protocol)  # also finds protocols that were registered as a class
        except ValueError:
            raise InputError(
                f"{url}: there is no protocol {protocol}://; give a path, or a URL such as s3://bucket/folder"
            ) from None


def driver_advice(url: str) -> str | None:
    """What to install to open this URL; None if the driver is installed, or the protocol is unknown."""
    from fsspec import get_filesystem_class

    for protocol in _protocols(url):
        try:
            get_filesystem_class(protocol)
        except ImportError as error:
            extra = EXTRAS.get(protocol)
            install = install_hint(extra) if extra else str(error)
            named = f"the extra {extra}" if extra else "a driver"
            return f"{protocol}:// needs {named}: {install}"
        except ValueError:
            pass
    return None


def _protocols(url: str) -> list[str]:
    """The protocols of a URL: "simplecache::s3://bucket" has simplecache and s3."""
    return url.partition("://")[0].split("::")


def path_in(place: str) -> PurePosixPath:
    """The path itself, or that of a URL: without its query."""
    return PurePosixPath(place.split("?")[0] if is_url(place) else place)


def as_spelled(path: str) -> str:
    """The path as the file system spells it: macOS writes "가" as two characters (NFD), others as one
    (NFC). A path that is not there in either form, and a URL, stay as they are."""
    if path.isascii() or is_url(path) or os.path.lexists(path):
        return path
    folder, name = os.path.split(path.rstrip("/"))
    folder = as_spelled(folder) if folder else ""
    forms = (os.path.join(folder, unicodedata.normalize(form, name)) for form in ("NFC", "NFD"))
    return next((found for found in forms if os.path.lexists(found)), path)


def absolute(place: str | os.PathLike) -> str:
    """The absolute form of a path; a URL as it is."""
    return str(place) if is_url(place) else str(Path(place).absolute())


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which appears under its name complete and on disk, or after an error not at all.

    For a URL, the file is written on this machine and then uploaded; object stores show an upload
    once it is complete.
    """
    if is_url(path):
        from upath import UPath

        with tempfile.NamedTemporaryFile() as local:
            yield cast(BinaryIO, local)
            local.flush()
            path.parent.mkdir(parents=True, exist_ok=True)
            remote = UPath(path)
            remote.fs.put_file(local.name, remote.path)
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
            error.filename = str(path)  # the error of a write does not name the file
        raise
    sync_folder(path.parent)


def temporary_owner(path: Path) -> tuple[bool, str]:
    """Whether a temporary file of :func:`replacing` was written on this machine (and in this container),
    and the process id of its writer there."""
    rest, _, pid = path.name.removesuffix(".tmp").rpartition("~")
    return rest.endswith(f".{machine()}"), pid


@cache
def machine() -> str:
    """An id of the scope in which process ids are unique: this boot of this machine, and its process
    namespace. Host names are not enough: machines and containers may share one."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    parts = [
        platform.node(),
        boot.read_text().strip() if boot.is_file() else "",
        os.readlink("/proc/self/ns/pid") if os.path.islink("/proc/self/ns/pid") else "",
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def write(path: Path, data: bytes | str) -> None:
    """Replace the file's content, atomically."""
    with replacing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_once(path: Path, data: bytes) -> None:
    """Write the file, complete and on disk, unless it exists: of several processes, the first wins. (At a
    URL the last one may.)"""
    if is_url(path):
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
        except OSError:  # some file systems have no links; there the last one may win
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _temporary(path: Path) -> Path:
    """The file that this process writes before it is renamed to `path`."""
    return path.with_name(f".{path.name}.{machine()}~{os.getpid()}.tmp")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which then appears under its name with all its files on disk; after an
    error it is removed. An existing folder of that name is replaced."""
    temporary = temporary_folder(path)
    try:
        yield temporary
        publish_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def temporary_folder(path: Path) -> Path:
    """An empty folder beside `path`, for :func:`publish_folder`. Its name is fixed, and the next process
    removes what a killed one left there."""
    for left in path.parent.glob(f".{escape(path.name)}~*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    temporary = path.with_name(f".{path.name}.tmp")
    if temporary.exists():
        remove_folder(temporary)
    temporary.mkdir(parents=True)
    return temporary


def publish_folder(temporary: Path, path: Path) -> None:
    """Give every file of the folder its usual mode, flush all to disk, and rename the folder to `path`."""
    usual_modes(temporary)
    for file in temporary.rglob("*"):
        sync_folder(file) if file.is_dir() else sync_file(file)
    sync_folder(temporary)
    if path.exists():
        remove_folder(path)
    temporary.rename(path)
    sync_folder(path.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder: rename it first, so that no reader finds it incomplete, then delete the files that
    can be deleted. Raises OSError if it cannot be renamed."""
    name = folder.name.removeprefix(".").removesuffix(".tmp")
    shutil.rmtree(folder.rename(folder.with_name(f".{name}~{time.time_ns()}.tmp")), ignore_errors=True)


def copy_files(source: Path, target: Path, leave_out: tuple[str, ...] = ()) -> None:
    """Copy the files below a folder into another one, except files named in ``leave_out``. Only contents
    are copied: unlike ``copytree``, not modes and ACLs."""
    for file in source.rglob("*"):
        if file.is_file() and file.name not in leave_out:
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def usual_modes(folder: Path) -> None:
    """Give every file below the folder the mode that ``open`` gives a new file there."""
    usual = _usual_mode(folder)
    for file in folder.rglob("*"):
        if file.is_file() and stat.S_IMODE(file.stat().st_mode) != usual:
            # Some file systems have one mode for all files; a mode that cannot be changed is no reason to fail.
            with suppress(OSError):
                file.chmod(usual)


def _usual_mode(folder: Path) -> int:
    """The mode of a new file in the folder, found by making one: the umask cannot be read without
    setting it, which would affect other threads, and a default ACL of the folder overrides it."""
    probe = folder / f".mode.{machine()}~{os.getpid()}.tmp"
    probe.unlink(missing_ok=True)
    try:
        with probe.open("xb") as file:
            return stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    finally:
        probe.unlink(missing_ok=True)


def is_there(path: Path) -> bool:
    """Whether the file exists; on NFS, also if another machine has just created it (and its folder)."""
    refresh_listing(path)
    return path.is_file()


def refresh_listing(path: Path) -> None:
    """On NFS, make a file of this name visible that another machine has just created, or whose folder it
    has just replaced."""
    for folder in (path.parent.parent, path.parent):
        with suppress(OSError):
            os.listdir(folder)  # makes the client drop outdated entries


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk, if the file system can (SMB and some FUSE file systems cannot; an
    NFS server does it at every rename)."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(folder)


def sha256_of(path: Path, advance: Callable[[int], object] = lambda size: None) -> str:
    """The file's sha256 in hexadecimal.

    Args:
        advance: called with the size in bytes of each block that is read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()
