"""Files and folders that appear whole or not at all, also when the power goes.

They may lie on NFS, of which this is assumed: `rename` within a folder is atomic on the server; a
file is written by one process at a time; who opens a file after another machine closed it sees
what was written ("close-to-open"); and who lists a folder sees what is in it now, while asking for
one name may give an answer that is up to a minute old (:func:`look_again`). A removed file that a
process of this machine has open stays in its folder as `.nfs…` until it is closed: so a folder is
first renamed, and what cannot be removed from it stays under that name.

Modes are those that `open` and `mkdir` give: of the umask, or of the folder's default ACL, with the
group of a setgid folder. Libraries that write through temporary files of mode 0600 (safetensors)
are corrected when a folder is published.
"""

import errno
import hashlib
import os
import platform
import pwd
import re
import shutil
import stat
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from glob import escape
from pathlib import Path
from typing import BinaryIO

from fsspec import get_filesystem_class
from upath import UPath

from vlmds.console.text import install_hint
from vlmds.errors import InputError

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
"""The extra of pyproject.toml that brings a protocol's driver."""

UNUSABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ESTALE,
}
"""What is wrong with a disk or a path that the user named, and not with the program."""


def as_path(place: str | os.PathLike) -> Path:
    """A ``Path``, or for a URL that fsspec knows (``s3://…``, ``memory://…``) a ``UPath``, which
    offers the same methods.

    Raises:
        InputError: a URL whose protocol nobody knows, or whose driver is not installed.
    """
    if "://" not in str(place):
        return Path(place)
    check_driver(str(place))
    return UPath(place)


def check_driver(url: str) -> None:
    """Raise :class:`InputError` unless fsspec can open such a URL."""
    if advice := driver_advice(url):
        raise InputError(f"{url}: {advice}")
    for protocol in _protocols(url):
        try:
            get_filesystem_class(protocol)  # also what was registered as a class
        except ValueError:
            raise InputError(
                f"{url}: there is no protocol {protocol}://; give a path, or a URL such as s3://bucket/folder"
            ) from None


def driver_advice(url: str) -> str | None:
    """What to install to open such a URL; None if the driver is there, or nobody knows the
    protocol."""
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
    """ "simplecache::s3://bucket" -> simplecache and s3."""
    return url.partition("://")[0].split("::")


def as_spelled(path: str) -> str:
    """The path as the file system spells it: macOS writes "가" as two characters (NFD), others as one
    (NFC). A path that is not there in either form, and a URL, stay as they are."""
    if path.isascii() or "://" in path or os.path.lexists(path):
        return path
    folder, name = os.path.split(path.rstrip("/"))
    folder = as_spelled(folder) if folder else ""
    forms = (os.path.join(folder, unicodedata.normalize(form, name)) for form in ("NFC", "NFD"))
    return next((found for found in forms if os.path.lexists(found)), path)


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
    for left in path.parent.glob(f".{escape(path.name)}~*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    temporary = path.with_name(f".{path.name}.tmp")
    if temporary.exists():
        remove_folder(temporary)
    temporary.mkdir(parents=True)
    return temporary


def publish_folder(temporary: Path, path: Path) -> None:
    """Give every file of the folder its usual mode, flush it to disk and give the folder its
    name."""
    usual_modes(temporary)
    for file in temporary.rglob("*"):
        sync_folder(file) if file.is_dir() else sync_file(file)
    sync_folder(temporary)
    if path.exists():
        remove_folder(path)
    temporary.rename(path)
    sync_folder(path.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder: its name at once, so that nobody finds it with files missing; and of its
    files those that can be removed. Raises OSError if it cannot be renamed."""
    name = folder.name.removeprefix(".").removesuffix(".tmp")
    shutil.rmtree(folder.rename(folder.with_name(f".{name}~{time.time_ns()}.tmp")), ignore_errors=True)


def copy_files(source: Path, target: Path, leave_out: tuple[str, ...] = ()) -> None:
    """Copy the files below a folder into another one, but those of these names: what is in them,
    and not the modes and ACLs that they had there, as ``copytree`` does."""
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
            # Some file systems have one mode for all; and who may not change it can still train.
            with suppress(OSError):
                file.chmod(usual)


def _usual_mode(folder: Path) -> int:
    """Found by making a file: the umask cannot be read without setting it, which other threads
    would notice, and where the folder has a default ACL, it does not count."""
    probe = folder / f".mode.{machine()}~{os.getpid()}.tmp"
    probe.unlink(missing_ok=True)
    try:
        with probe.open("xb") as file:
            return stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    finally:
        probe.unlink(missing_ok=True)


def check_writable(path: Path, option: str, inside: tuple[str, ...] = ()) -> None:
    """Raise :class:`InputError`, naming the owner, unless files can be made in the folder `path`,
    or if it is not there, in the one where it would be made.

    inside: names of files and folders in it that must be writable where they are there.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise InputError(f"{option} {path}: must be a local path, not a URL")
    there = path.absolute()
    while not os.path.exists(there):  # Path.exists raises where a folder above may not be searched
        there = there.parent
    missing = None if there == path.absolute() else path
    if not there.is_dir():
        raise InputError(f"{option} {path}: {there} is not a folder; choose another {option}")
    for place in (there, *(path.absolute() / name for name in inside)):
        wanted = os.W_OK | os.X_OK if place.is_dir() else os.W_OK
        if os.path.exists(place) and not os.access(place, wanted):
            raise InputError(f"{option} {path}: {_refused(place, 'written', missing)}, or choose another {option}")


def unusable_place(error: BaseException) -> str | None:
    """What is wrong with a disk or a path, and the fix, in one line; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in UNUSABLE or error.filename is None:
        return None
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and "://" not in str(error.filename):
        return denied(Path(error.filename))
    return f"{error.filename}: {error.strerror}; make room there, or name another place"


def denied(path: Path) -> str:
    """Why this user may not read or write the file or folder, and what to do about it: one line."""
    place = path.absolute()
    while not os.path.exists(place):
        place = place.parent
    readable = os.access(place, os.R_OK | os.X_OK if place.is_dir() else os.R_OK)
    missing = None if place == path.absolute() else path
    refused = _refused(place, "written" if readable else "read", missing)
    return f"{path}: {refused}, or name another place"


def _refused(place: Path, what: str, missing: Path | None) -> str:
    """what: "read" or "written". missing: the path that is wanted, where it does not exist and
    `place` is the nearest folder above it. That may be / or /home, whose modes are to stay."""
    found = place.stat()
    if what == "written" and os.statvfs(place).f_flag & os.ST_RDONLY:
        return f"{place} is on a read-only file system; make it writable"
    mine = found.st_uid == os.geteuid()
    owner = "you" if mine else _user(found.st_uid)
    letters = "rwX" if what == "written" else "rX"
    if missing is None:
        fix = f"chmod -R {'u' if mine else 'g'}+{letters} {place}"
        fix = fix if mine else f"have {owner} run {fix}"
    elif mine:
        fix = f"chmod u+{letters} {place}"
    elif what == "written":
        fix = f"have {owner} make {missing} and give it to you"
    else:
        fix = f"have {owner} give you access to {missing}"
    return f"{place} cannot be {what}, it belongs to {owner} (mode {stat.S_IMODE(found.st_mode):04o}); {fix}"


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:  # of another machine
        return f"user {number}"


def is_there(path: Path) -> bool:
    """Whether there is such a file; on NFS, also if another machine has made it (and its folder)
    just now."""
    look_again(path)
    return path.is_file()


def look_again(path: Path) -> None:
    """On NFS, let what another machine has made under this name be found at once, or what it has
    put in the place of the folder that it is in."""
    for folder in (path.parent.parent, path.parent):
        with suppress(OSError):
            os.listdir(folder)  # which shows the system what it remembers wrongly


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk, where the file system can do that (SMB and some FUSE file
    systems cannot; an NFS server does it with every rename)."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(folder)


def sha256_of(path: Path, advance: Callable[[int], object] = lambda size: None) -> str:
    """The file's sha256 in hexadecimal. advance: called with the size in bytes of
    each piece that is read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()
