"""Packed clips of several formats, and evaluations of three runs whose captions are planted."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.clips import write_manifest, write_video
from vlmds.packing.pack import pack

RUNS = ("alpha-linear", "beta-mlp", "gamma-perceiver")
CLIPS = 12
WORDS = "빨간 파란 노란 작은 큰 원이 별이 강아지가 고양이가 남자가 위로 아래로 왼쪽으로 오른쪽으로 천천히 빠르게 움직입니다".split()
FORMATS = {4: ("avi", {"codec": "mpeg2video"}), 5: ("webm", {"codec": "libvpx"})}
"""Of clips that are not MP4 with H.264."""


def references(clip: int) -> list[str]:
    return [f"{clip}번 영상입니다.", f"정답 캡션 {clip}"]


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """A manifest of clips, two of each video, and one with a span."""
    folder = tmp_path_factory.mktemp("videos")
    rows = []
    for clip in range(CLIPS):
        suffix, options = FORMATS.get(clip, ("mp4", {}))
        name = f"v{clip}.{suffix}"
        write_video(folder / name, frames=30, **options)
        row = {"video": name, "caption": references(clip), "id": f"c{clip:03d}", "split": "val", "kind": "ab"[clip % 2]}
        rows.append(
            row | ({"start": 1.0, "end": 2.0} if clip == 3 else {}) | ({"prompt": "무엇?"} if clip == 6 else {})
        )
    return write_manifest(folder / "manifest.jsonl", rows)


@pytest.fixture(scope="session")
def shards(videos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "packed"
    pack(videos, out, keep_columns=["kind"], shard_size=4, progress=False, workers=1)
    return out


def plant(folder: Path, captions: dict[str, str], data: Path | None = None, **changes) -> Path:
    """An evaluation of a run: {clip: caption}. changes: of each line, by name, given the clip."""
    number = {clip: int(clip[1:]) for clip in captions}
    lines = [
        {
            "key": clip,
            "position": number[clip],
            "source": f"v{number[clip]}.{FORMATS.get(number[clip], ('mp4',))[0]}",
            "references": references(number[clip]),
            "caption": caption,
            "duration": 3.0,
            "scores": {},
            "statistics": {},
            "reference_log_probability": {"real": -1.0, "shuffled": -2.0, "blank": -2.0},
            **{name: change(clip) for name, change in changes.items()},
        }
        for clip, caption in captions.items()
    ]
    out = folder / "evaluation" / "val"
    out.mkdir(parents=True)
    (out / "predictions.jsonl").write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8"
    )
    settings = {"split": "val", "data": str(data or ""), "prompt": "이 영상을 설명해주세요."}
    metrics = {"format": "vlmds-evaluation", "version": 1, "settings": settings, "clips": len(lines)}
    (out / "metrics.json").write_text(json.dumps(metrics))
    return folder


def captions_of(run: int, clips=range(CLIPS)) -> dict[str, str]:
    random = np.random.default_rng(run)
    return {f"c{clip:03d}": " ".join(random.choice(WORDS, 6)) + f" {run}-{clip}." for clip in clips}


@pytest.fixture
def runs(tmp_path, shards) -> list[Path]:
    return [plant(tmp_path / "runs" / name, captions_of(number), shards) for number, name in enumerate(RUNS)]
