"""What the tests share: tiny models and a run of them; real clips and the full Qwen vocabulary,
when they lie beside the project."""

import os
from pathlib import Path

# No test asks the real hub; those of downloads have a hub of their own. Before the first import of it.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from tests.training.fixtures import models, shards, two_ranks  # noqa: E402, F401

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def qwen_tokenizer_folder():
    folder = SHARED / "qwen3-tokenizer"
    if not folder.is_dir():
        pytest.skip("needs the full Qwen vocabulary")
    return folder


def pytest_collection_modifyitems(items):
    """Tests marked ``gpu`` are skipped where CUDA has no GPU to use."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
