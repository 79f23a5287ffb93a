"""Wording that messages share."""

import re
from pathlib import Path

import pytest

from vlmds.console.text import counted, install_hint

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (1, "sample", "1 sample"),
        (0, "rank", "0 ranks"),
        (2048, "clip", "2,048 clips"),
        (2.0, "epoch", "2 epochs"),
        (1.0, "epoch", "1 epoch"),
        (0.5, "epoch", "0.5 epochs"),
    ],
)
def test_a_noun_agrees_with_its_number(number, noun, text):
    assert counted(number, noun) == text


def test_another_plural():
    assert counted(2, "copy", "copies") == "2 copies" and counted(1, "copy", "copies") == "1 copy"


def test_no_message_asks_for_a_package_that_is_not_to_be_had():
    """vlmds is on no package index; only install_hint, in one place, says how its extras come."""
    asked = [
        str(path)
        for path in (ROOT / "vlmds").rglob("*.py")
        if re.search(r"pip install [^\n]*vlmds\[", path.read_text("utf-8"))
    ]
    assert not asked
    extra = install_hint("serve").rpartition("[")[2].partition("]")[0]
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text("utf-8")
