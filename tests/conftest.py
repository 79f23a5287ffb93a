"""Shared fixtures: tiny models and a run of them; real clips and the full Qwen vocabulary, if they are
in a folder beside the project."""

import os
from pathlib import Path
from zlib import crc32

# No test asks the real hub; those of downloads have a hub of their own. Before the first import of it.
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from tests.clips import SHARED, SHARED_VIDEOS, write_manifest, write_video  # noqa: E402
from tests.training.fixtures import models, shards, two_ranks  # noqa: E402, F401
from vlmds.console import progress  # noqa: E402

# The same examples in every run, however slow the machine, and none kept where the tests run.
hypothesis.settings.register_profile(
    "suite", derandomize=True, database=None, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef):
    """What a fixture draws depends on nothing that ran before it (pytest-randomly seeds Python and
    NumPy, not PyTorch)."""
    torch.manual_seed(crc32(fixturedef.argname.encode()))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    torch.manual_seed(crc32(item.nodeid.encode()))


@pytest.fixture(autouse=True)
def same_environment():
    """Variables that a test, or what it tests, has set are gone after it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


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


def pytest_collection_modifyitems(items):
    """Tests marked ``gpu`` are skipped where CUDA has no GPU to use."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def shared_videos() -> Path:
    if not SHARED_VIDEOS.is_dir():
        pytest.skip(f"no videos at {SHARED_VIDEOS}")
    return SHARED_VIDEOS


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """A folder with v0.mp4 … v5.mp4, e0.mkv, and a manifest of all."""
    folder = tmp_path_factory.mktemp("videos")
    rows = []
    for i in range(6):
        write_video(folder / f"v{i}.mp4", frames=12 + i, width=64 + 2 * i)
        rows.append({"video": f"v{i}.mp4", "caption": f"{i}번 영상입니다."})
    write_video(folder / "e0.mkv", frames=9)
    rows.append({"video": "e0.mkv", "caption": ["하나", "둘"], "split": "val", "prompt": "무엇?"})
    write_manifest(folder / "manifest.jsonl", rows)
    return folder
