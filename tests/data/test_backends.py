"""Every row of the table in backend_table.py."""

import pytest
from tests.data.backend_table import ROWS, Checker, missing_encoder, problems, shared_rows


@pytest.fixture(scope="module")
def checker():
    with Checker() as checker:
        yield checker


@pytest.mark.parametrize("row", ROWS + shared_rows(), ids=lambda row: row.name)
def test_backends_equal_a_full_sequential_decode(row, checker, tmp_path):
    if reason := missing_encoder(row):
        pytest.skip(reason)
    assert problems(row, checker.check(row.make(tmp_path))) == []
