"""Fixtures: a tiny model that generates captions, and a folder of videos."""

from pathlib import Path

import pytest

from tests import tiny
from tests.clips import write_video
from vlmds.inference.video_captioner import VideoCaptioner
from vlmds.video.pool import Clip, decode_videos

SAYINGS = (
    "빨간 원이 왼쪽으로 움직입니다",
    "파란 별이 오른쪽으로 움직입니다",
    "노란 사각형이 위로 움직입니다",
    "하얀 고리가 아래로 움직입니다",
)
"""What it says to the four seconds of the videos here, each of which begins where the last ended;
and the first two to "누구?" and "무엇이 보입니까?" about the first four seconds."""


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    return tiny.make_models(tmp_path_factory.mktemp("models"), speaking=True)


@pytest.fixture(scope="session")
def artifact(models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    video = str(write_video(folder / "v.mp4", frames=40))
    *windows, whole = decode_videos(
        [*(Clip(video, i, i + 1) for i in range(4)), Clip(video)], tiny.FRAMES, tiny.SIDE, workers=1
    )
    lessons = [(frames, None, text) for frames, text in zip(windows, SAYINGS, strict=True)]
    lessons += [(whole, "누구?", SAYINGS[0]), (whole, "무엇이 보입니까?", SAYINGS[1])]
    tiny.make_speaker(models, folder / "artifact", "e7", lessons)
    return folder / "artifact"


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
