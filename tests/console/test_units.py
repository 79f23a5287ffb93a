"""Quantities as a person reads them."""

import pytest

from vlmds.console.units import size_text


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
