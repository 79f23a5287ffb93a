"""A tiny model that captions, and a folder of videos."""

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.data.conftest import write_video
from tests.test_inference import made
from vlmds.inference import VideoCaptioner


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    return tiny.make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def artifact(models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "artifact"
    torch.manual_seed(1)  # or the projector, and so whether it says anything, depends on earlier tests
    made(models, folder)
    return folder


@pytest.fixture(scope="session")
def captioner(artifact) -> VideoCaptioner:
    return VideoCaptioner.from_pretrained(artifact)


@pytest.fixture
def folder(tmp_path) -> Path:
    """a.mp4 (4 s), b.mp4 (2 s), bad.mp4 (no video), c/a.mkv (3.1 s), and what is no video."""
    folder = tmp_path / "videos"
    (folder / "c").mkdir(parents=True)
    write_video(folder / "a.mp4", frames=40)
    write_video(folder / "b.mp4", frames=20, width=80)
    write_video(folder / "c" / "a.mkv", frames=31)
    (folder / "bad.mp4").write_bytes(b"not a video")
    (folder / "notes.txt").write_text("no video")
    (folder / "._a.mp4").write_bytes(b"what macOS leaves beside a.mp4")
    return folder
