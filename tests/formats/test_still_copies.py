"""Stores of version 2, in which a still picture's frame or features stand `num_frames` times (`still_copies/`: two
pictures around a clip, 3 frames each), are read as one frame of each picture, and can be converted and appended to."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load

from tests.clips import write_manifest, write_video
from tests.formats.test_formats import FOLDERS
from vlmds.data.dataset import open_dataset
from vlmds.data.index import ShardIndex
from vlmds.data.loader import SampleReader
from vlmds.data.stored import read_jpeg
from vlmds.experiments.reading import load_experiment
from vlmds.models.vision import load_vision_tower
from vlmds.packing.convert import convert
from vlmds.packing.pack import pack

STORES = Path(__file__).parent / "still_copies"
FRAMES, SIDE, PATCHES = 3, 32, 4


def samples(folder):
    reader = SampleReader(open_dataset(str(folder)), "train", FRAMES, SIDE, shuffle=False)
    return [reader.load(position) for position in range(len(reader))]


def members(folder, number: int):
    index = ShardIndex.open(folder)
    return index.read(index.row("train", 0, number))


def test_a_picture_of_a_frames_store_is_its_first_copy():
    assert {"0.jpg", "1.jpg", "2.jpg"} <= {*members(STORES / "frames", 0)}
    found = samples(STORES / "frames")
    assert [sample.still for sample in found] == [True, False, True]
    assert [len(sample.frames) for sample in found] == [1, FRAMES, 1]
    for number, sample in enumerate(found):
        stored = members(STORES / "frames", number)
        for frame, pixels in enumerate(sample.frames):
            assert np.array_equal(pixels, read_jpeg(stored, frame, SIDE))


def test_a_picture_of_a_features_store_is_its_first_copy():
    found = samples(STORES / "features")
    assert [len(sample.features) for sample in found] == [PATCHES, FRAMES * PATCHES, PATCHES]
    for number, sample in enumerate(found):
        (stored,) = load(members(STORES / "features", number)["safetensors"]).values()
        assert len(stored) == FRAMES * PATCHES
        assert torch.equal(sample.features, stored[: len(sample.features)])


def test_its_conversion_keeps_one(tmp_path):
    models = FOLDERS[0] / "models"
    vision = load_experiment("e4", [f"vision.model={models / 'clip'}"]).vision
    tower = load_vision_tower(vision, torch.float32, torch.device("cpu"))
    convert(STORES / "frames", tmp_path, store="features", tower=tower, tower_name="clip", progress=False)
    for number, (made, kept) in enumerate(zip(samples(tmp_path), samples(STORES / "features"), strict=True)):
        (stored,) = load(members(tmp_path, number)["safetensors"]).values()
        assert torch.equal(stored, made.features)
        torch.testing.assert_close(
            made.features, kept.features, rtol=2**-7, atol=1e-2
        )  # another CPU rounds differently


@pytest.fixture
def appended(tmp_path) -> Path:
    write_video(tmp_path / "one.mp4", frames=1)
    write_video(tmp_path / "new.mp4", frames=7)
    rows = [{"video": f"{name}.mp4", "caption": "새 영상", "split": "train"} for name in ("one", "new")]
    out = shutil.copytree(STORES / "frames", tmp_path / "out")
    options = dict(store="frames", num_frames=FRAMES, image_size=SIDE, progress=False)
    pack(write_manifest(tmp_path / "m.jsonl", rows), out, append=True, **options)
    return out


def test_one_that_was_appended_to_has_pictures_of_both_kinds(appended):
    index = ShardIndex.open(appended)
    assert (ShardIndex.open(STORES / "frames").meta["version"], index.meta["version"]) == (2, 3)
    assert [s.count for s in index.shards("train")] == [3, 2]
    assert {*index.read(index.row("train", 1, 0))} == {"json", "0.jpg"}
    found, old = samples(appended), samples(STORES / "frames")
    assert [(sample.still, len(sample.frames)) for sample in found[3:]] == [(True, 1), (False, FRAMES)]
    for a, b in zip(found, old):
        assert (a.key, a.captions, a.still) == (b.key, b.captions, b.still) and np.array_equal(a.frames, b.frames)
