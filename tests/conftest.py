"""What the tests share: real clips and the full Qwen vocabulary, when they lie beside the project."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def qwen_tokenizer_folder():
    folder = SHARED / "qwen3-tokenizer"
    if not folder.is_dir():
        pytest.skip("needs the full Qwen vocabulary")
    return folder
