"""Folders and disks that cannot be read or written: one line with the owner and the fix."""

import errno
import os
import pwd
import re
import stat
from pathlib import Path

from vlmds.errors import InputError
from vlmds.files import is_url

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
"""Errors of a disk or a path that the user named, as opposed to bugs."""


def check_writable(path: Path, option: str, inside: tuple[str, ...] = ()) -> None:
    """Raise :class:`InputError`, naming the owner, unless files can be created in the folder `path`, or
    if it does not exist, in the folder where it would be created.

    Args:
        inside: names of files and folders in it that must be writable if they exist.
    """
    # A Path of a URL has one slash.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise InputError(f"{option} {path}: must be a local path, not a URL")
    there = path.absolute()
    while not os.path.exists(there):  # Path.exists raises if a parent folder may not be searched
        there = there.parent
    missing = None if there == path.absolute() else path
    if not there.is_dir():
        raise InputError(f"{option} {path}: {there} is not a folder; choose another {option}")
    for place in (there, *(path.absolute() / name for name in inside)):
        wanted = os.W_OK | os.X_OK if place.is_dir() else os.W_OK
        if os.path.exists(place) and not os.access(place, wanted):
            raise InputError(f"{option} {path}: {_refused(place, 'written', missing)}, or choose another {option}")


def unusable_place(error: BaseException) -> str | None:
    """One line with the problem of a disk or a path, and the fix; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in UNUSABLE or error.filename is None:
        return None
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not is_url(error.filename):
        return denied(Path(error.filename))
    return f"{error.filename}: {error.strerror}; make room there, or name another place"


def denied(path: Path) -> str:
    """One line: why this user may not read or write the file or folder, and the fix."""
    place = path.absolute()
    while not os.path.exists(place):
        place = place.parent
    readable = os.access(place, os.R_OK | os.X_OK if place.is_dir() else os.R_OK)
    missing = None if place == path.absolute() else path
    refused = _refused(place, "written" if readable else "read", missing)
    return f"{path}: {refused}, or name another place"


def _refused(place: Path, what: str, missing: Path | None) -> str:
    """Why the existing file or folder `place` cannot be used, and the fix.

    Args:
        what: "read" or "written".
        missing: the wanted path, if it does not exist and `place` is the nearest folder above it. That may
            be / or /home, so the fix does not change its mode recursively.
    """
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
    except KeyError:  # the user exists on another machine only
        return f"user {number}"
