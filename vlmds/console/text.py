"""Wording that messages to the user share."""

from __future__ import annotations


def counted(number: float, noun: str, plural: str | None = None) -> str:
    """ "1 sample", "2,048 samples", "0.5 epochs". plural: where it is not the noun and an s."""
    shown = int(number) if number == int(number) else number
    return f"{shown:,} {noun if number == 1 else plural or f'{noun}s'}"


def install_hint(extra: str) -> str:
    """The command that adds an extra of pyproject.toml. vlmds is on no package index: the command is
    to be typed in the folder of its repository."""
    return f"pip install -c constraints.txt -e '.[{extra}]'"
