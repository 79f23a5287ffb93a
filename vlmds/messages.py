"""Wording that messages to the user share."""

from __future__ import annotations

import errno
from pathlib import Path

from vlmds.files import denied

UNUSABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR,
            errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ESTALE}
"""What is wrong with a disk or a path that the user named, and not with the program."""


def counted(number: float, noun: str, plural: str | None = None) -> str:
    """"1 sample", "2,048 samples", "0.5 epochs". plural: where it is not the noun and an s."""
    shown = int(number) if number == int(number) else number
    return f"{shown:,} {noun if number == 1 else plural or f'{noun}s'}"


def install_hint(extra: str) -> str:
    """The command that adds an extra of pyproject.toml. vlmds is on no package index: the command is
    to be typed in the folder of its repository."""
    return f"pip install -c constraints.txt -e '.[{extra}]'"


def unusable_place(error: BaseException) -> str | None:
    """What is wrong with a disk or a path, and the fix, in one line; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in UNUSABLE or error.filename is None:
        return None
    if (error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
            and "://" not in str(error.filename)):
        return denied(Path(error.filename))
    return f"{error.filename}: {error.strerror}; make room there, or name another place"
