"""Wording that messages to the user share: counted nouns, sizes, install commands."""

from __future__ import annotations


def counted(number: float, noun: str, plural: str | None = None) -> str:
    """A number and its noun: "1 sample", "2,048 samples", "0.5 epochs".

    Args:
        plural: the noun's plural, if it is not the noun with an s.
    """
    shown = int(number) if number == int(number) else number
    return f"{shown:,} {noun if number == 1 else plural or f'{noun}s'}"


def install_hint(extra: str) -> str:
    """The command that installs an extra of pyproject.toml. vlmds is on no package index: the command
    is for the folder of its repository."""
    return f"pip install -c constraints.txt -e '.[{extra}]'"


def size_text(count: float) -> str:
    """A number of bytes with three digits and a decimal unit: "6.07 GB", "121 MB", "1.53 kB", "12 B"."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        shown = float(f"{count / size:.3g}")  # 999.6 MB is 1.00 GB
        if shown >= 1:
            return f"{count / size:,.{2 if shown < 10 else 1 if shown < 100 else 0}f} {unit}"
    return f"{count:,.0f} B"
