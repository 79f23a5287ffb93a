"""Wording that messages share: counted nouns, install hints, sizes."""

import re
from pathlib import Path

import pytest

from vlmds.console.text import counted, install_hint, size_text

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


def test_no_message_names_a_package_that_no_index_has():
    """vlmds is on no package index; only install_hint says how to install its extras."""
    asked = [
        str(path)
        for path in (ROOT / "vlmds").rglob("*.py")
        if re.search(r"pip install [^\n]*vlmds\[", path.read_text("utf-8"))
    ]
    assert not asked
    extra = install_hint("serve").rpartition("[")[2].partition("]")[0]
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text("utf-8")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.4, "999 B"),
        (999.6, "1.00 kB"),
        (1000, "1.00 kB"),
        (1530, "1.53 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_940, "99.9 kB"),
        (99_960, "100 kB"),
        (999_400, "999 kB"),
        (999_600, "1.00 MB"),
        (60_727_000, "60.7 MB"),
        (6_072_700_000, "6.07 GB"),
        (9.996e9, "10.0 GB"),
        (99.96e9, "100 GB"),
        (999.4e9, "999 GB"),
        (999.6e9, "1.00 TB"),
        (2.5e14, "250 TB"),
        (1.2345e15, "1,234 TB"),
    ],
)
def test_a_size_has_three_digits_and_its_unit(count, text):
    assert size_text(count) == text
