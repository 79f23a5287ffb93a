"""Tiny models, a packed dataset and a run, made once a session; tests/conftest.py has them for all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import tiny
from tests.clips import write_manifest, write_video
from tests.training.launch import arguments, train


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """For a fixture that all tests share: at its end nothing in the folder has changed."""

    def state():
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}

    before = state()
    yield
    after = state()
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert not changed, f"a test changed what others read: {sorted(map(str, changed))}"


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Iterator[Path]:
    folder = tiny.make_models(tmp_path_factory.mktemp("models"))
    with kept(folder):
        yield folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Iterator[Path]:
    folder = make_shards(tmp_path_factory.mktemp("packed"))
    with kept(folder):
        yield folder


def make_shards(folder: Path) -> Path:
    """10 training and 3 validation clips as a frames store, in three shards."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(13):
        write_video(folder / f"v{i}.mp4", frames=8 + i)
        rows.append(
            {
                "video": f"v{i}.mp4",
                "caption": f"{i}번 영상입니다." + " 네." * (i % 3),
                "split": "val" if i >= 10 else "train",
            }
        )
    manifest = write_manifest(folder / "manifest.jsonl", rows)
    return tiny.pack_frames(manifest, folder / "out", shard_size=5)


@pytest.fixture(scope="session")
def two_ranks(models, shards, tmp_path_factory) -> Iterator[Path]:
    """An undisturbed run of e3 on two ranks, under the deepspeed launcher; its logs beside it."""
    run = tmp_path_factory.mktemp("runs") / "two"
    done = train(2, *arguments(models, shards, run), fresh=True)
    assert "finetune step 6/6" in done.stdout
    assert "vlmds: global batch 4 = micro_batch 2 × accumulation 1 × 2 ranks\n" in done.stdout
    with kept(run.parent):
        yield run
