"""Wording that messages to the user share."""

from __future__ import annotations


def counted(number: float, noun: str, plural: str | None = None) -> str:
    """"1 sample", "2,048 samples". plural: where it is not the noun and an s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def install_hint(extra: str) -> str:
    """The command that adds an extra of pyproject.toml. vlmds is on no package index, so pip needs
    the repository, in whose folder the command is to be typed."""
    return f"pip install -c constraints.txt -e '.[{extra}]' in vlmds's repository"
