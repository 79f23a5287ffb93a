"""What the tests share: tiny models and a run of them; real clips and the full Qwen vocabulary,
when they lie beside the project."""

from pathlib import Path

import pytest

from tests.training.fixtures import models, shards, two_ranks  # noqa: F401
from vlmds import progress

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def qwen_tokenizer_folder():
    folder = SHARED / "qwen3-tokenizer"
    if not folder.is_dir():
        pytest.skip("needs the full Qwen vocabulary")
    return folder


@pytest.fixture(autouse=True)
def no_progress(monkeypatch):
    """What a test finds on stderr must not depend on how fast the machine is."""
    monkeypatch.setattr(progress, "QUIET_SECONDS", 3600.0)
