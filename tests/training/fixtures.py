"""Tiny models, a packed dataset and a run, made once a session; tests/conftest.py has them for all."""

from pathlib import Path

import pytest

from tests import tiny
from tests.data.conftest import write_manifest, write_video
from tests.training.launch import arguments, train
from vlmds.data.pack import pack


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    return tiny.make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("packed"))


def make_shards(folder: Path) -> Path:
    """10 training and 3 validation clips as a frames store, in three shards."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(13):
        write_video(folder / f"v{i}.mp4", frames=8 + i)
        rows.append({"video": f"v{i}.mp4", "caption": f"{i}번 영상입니다." + " 네." * (i % 3),
                     "split": "val" if i >= 10 else "train"})
    manifest = write_manifest(folder / "manifest.jsonl", rows)
    pack(manifest, folder / "out", store="frames", num_frames=tiny.FRAMES, image_size=tiny.SIDE,
         shard_size=5, progress=False)
    return folder / "out"


@pytest.fixture(scope="session")
def two_ranks(models, shards, tmp_path_factory):
    """An undisturbed run of e3 on two ranks, under the deepspeed launcher."""
    run = tmp_path_factory.mktemp("runs") / "two"
    done = train(2, *arguments(models, shards, run), fresh=True)
    assert "finetune step 6/6" in done.stdout
    assert "vlmds: global batch 4 = micro_batch 2 × accumulation 1 × 2 ranks\n" in done.stdout
    return run
