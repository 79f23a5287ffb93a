"""data.fit in every store, in training's record, in artifacts, and where two of them differ."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests import tiny
from tests.clips import write_manifest, write_video
from tests.formats.make import FRAMES as OLD_FRAMES
from tests.formats.make import SIDE as OLD_SIDE
from vlmds.cli import main
from vlmds.data.alike import sampling_of
from vlmds.data.dataset import Dataset
from vlmds.data.index import ShardIndex
from vlmds.data.loader import SampleReader
from vlmds.errors import InputError
from vlmds.experiments.reading import load_experiment
from vlmds.inference.video_captioner import VideoCaptioner
from vlmds.models.artifact import artifact_experiment
from vlmds.models.vision import load_vision_tower
from vlmds.packing.convert import convert
from vlmds.packing.manifest import ManifestRow
from vlmds.packing.pack import pack
from vlmds.packing.shards import PackOptions, options_hash
from vlmds.video.fit import RESIZERS

FITS = tuple(RESIZERS)
OLD = Path(__file__).parents[1] / "formats" / "v0_1"
SIZE = {"num_frames": tiny.FRAMES, "image_size": tiny.SIDE}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny.make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A wide and a tall clip: m.jsonl, video/, and crop/, pad/, stretch/ (frames)."""
    folder = tmp_path_factory.mktemp("stores")
    write_video(folder / "wide.mp4", frames=12, width=96, height=48)
    write_video(folder / "tall.mp4", frames=12, width=48, height=96)
    rows = [{"video": f"{name}.mp4", "caption": name} for name in ("wide", "tall")]
    manifest = write_manifest(folder / "m.jsonl", rows)
    pack(manifest, folder / "video", progress=False)
    for fit in FITS:
        pack(manifest, folder / fit, store="frames", fit=fit, progress=False, **SIZE)
    return folder


def read(folder, fit):
    """All frames or features of a store."""
    reader = SampleReader(Dataset([ShardIndex.open(folder)]), "train", *SIZE.values(), shuffle=False, fit=fit)
    samples = [reader.load(position) for position in range(len(reader))]
    return np.stack([s.frames if s.features is None else s.features.float().numpy() for s in samples])


@pytest.mark.parametrize("fit", FITS)
def test_a_frames_store_has_the_frames_that_the_video_store_gives(stores, tmp_path, fit):
    assert ShardIndex.open(stores / fit).meta["resizer"] == RESIZERS[fit]
    decoded, stored = read(stores / "video", fit), read(stores / fit, fit)
    assert np.abs(decoded.astype(int) - stored).mean() < 6  # JPEG
    others = [np.abs(decoded.astype(int) - read(stores / other, other)).mean() for other in FITS if other != fit]
    assert min(others) > 8
    convert(stores / "video", tmp_path / "out", store="frames", fit=fit, progress=False, **SIZE)
    assert (tmp_path / "out/train/000000.tar").read_bytes() == (stores / fit / "train/000000.tar").read_bytes()
    assert ShardIndex.open(tmp_path / "out").meta["resizer"] == RESIZERS[fit]


@pytest.mark.parametrize("fit", FITS)
def test_features_are_of_frames_with_their_fit(models, stores, tmp_path, fit):
    vision = load_experiment("e3", tiny.settings(models)).vision
    tower = load_vision_tower(vision, torch.float32, torch.device("cpu"))
    options = dict(store="features", tower=tower, tower_name=vision.model, progress=False)
    convert(stores / "video", tmp_path / "direct", fit=fit, num_frames=tiny.FRAMES, **options)
    convert(stores / fit, tmp_path / "staged", **options)
    want = tower(torch.from_numpy(read(stores / "video", fit))).to(torch.bfloat16).float().numpy()
    assert np.array_equal(read(tmp_path / "direct", fit), want)
    for name in ("direct", "staged"):
        assert ShardIndex.open(tmp_path / name).meta["resizer"] == RESIZERS[fit]
        with pytest.raises(InputError, match=f"packed with fit {fit}, but the experiment has data.fit "):
            read(tmp_path / name, FITS[FITS.index(fit) - 1])
    other = FITS[FITS.index(fit) - 1]
    with pytest.raises(InputError, match=f"packed with --fit {fit}, not {other}; convert the video store"):
        convert(stores / fit, tmp_path / "no", fit=other, **options)


@pytest.mark.parametrize("stored, wanted", [("crop", "pad"), ("pad", "crop"), ("pad", "stretch")])
def test_another_fit_is_refused_naming_the_command(stores, tmp_path, stored, wanted):
    with pytest.raises(InputError) as caught:
        read(stores / stored, wanted)
    found = re.fullmatch(
        rf"\S+: packed with fit {stored}, but the experiment has data.fit {wanted}; make it again from its "
        rf"manifest: (vlmds pack .*), or set data.fit={stored}",
        str(caught.value),
    )
    words = shlex.split(found[1])[1:]
    words[1:3] = [str(stores / "m.jsonl"), str(tmp_path / "new")]
    assert main([*words, "--no-report"]) == 0
    assert np.array_equal(read(tmp_path / "new", wanted), read(stores / wanted, wanted))


def test_a_blend_takes_videos_of_any_record_but_frames_of_one_fit(stores, tmp_path):
    Dataset([ShardIndex.open(OLD / "video"), ShardIndex.open(stores / "video")], [1.0, 1.0])
    with pytest.raises(InputError, match="data.blend: .* has resizer 'pil-bicubic-stretch', but .*; make one again"):
        Dataset([ShardIndex.open(stores / "pad"), ShardIndex.open(stores / "stretch")], [1.0, 1.0])
    with pytest.raises(InputError) as caught:
        Dataset([ShardIndex.open(stores / "stretch"), ShardIndex.open(stores / "video")], [1.0, 1.0])
    assert " --fit stretch; then name" in str(caught.value)


def test_appending_with_another_fit_is_refused(stores):
    with pytest.raises(InputError, match="was packed with fit 'crop', not 'pad'; append with the same"):
        pack(stores / "m.jsonl", stores / "crop", store="frames", append=True, progress=False, **SIZE)


def test_crop_has_the_shards_of_older_versions(tmp_path):
    row = ManifestRow(1, "k", "v", "/x/v.mp4", "v.mp4", ["가"], None, None, "train", None)
    want = {
        "video": "bffcf0848b433c17f736b64e850bb25cf4d0d135038dc75d30ce35866173dd36",
        "frames": "fa587b84015b0319338b0355e3031c7642b2aa4bc1e522a37f8fc284a3e05e5e",
    }
    assert {store: options_hash([row], PackOptions(store, fit="crop")) for store in want} == want
    assert options_hash([row], PackOptions("video")) == want["video"]
    assert options_hash([row], PackOptions("frames")) != want["frames"]


def test_stores_of_older_versions_are_crops(models):
    for name in ("frames", "features"):
        index = ShardIndex.open(OLD / name)
        SampleReader(Dataset([index]), "train", OLD_FRAMES, OLD_SIDE, fit="crop")
        with pytest.raises(InputError, match=r"packed with fit crop, .*, or set data.fit=crop$"):
            SampleReader(Dataset([index]), "train", OLD_FRAMES, OLD_SIDE)
        assert sampling_of(index.meta, "crop")["resizer"] == RESIZERS["crop"]


def test_a_run_records_what_was_done_with_videos(stores):
    meta = ShardIndex.open(stores / "video").meta
    assert meta["resizer"] == RESIZERS["crop"]  # as older versions wrote
    assert sampling_of(meta, "stretch")["resizer"] == RESIZERS["stretch"]


@pytest.mark.parametrize("fit", FITS)
def test_an_artifact_captions_the_frames_of_its_training(models, stores, tmp_path, fit):
    experiment = tmp_path / "e.yaml"
    experiment.write_text(f"extends: e1\nname: e\ndata: {{fit: {fit}}}\n")
    tiny.make_speaker(models, tmp_path / "artifact", str(experiment))
    captioner = VideoCaptioner.from_pretrained(tmp_path / "artifact", device="cpu")
    seen = np.stack(list(captioner.frames([stores / "wide.mp4", stores / "tall.mp4"], workers=1)))
    assert np.array_equal(seen, read(stores / "video", captioner.experiment.data.fit))
    other = FITS[FITS.index(fit) - 1]
    with pytest.raises(InputError, match=f"--set data.fit={other}: .* was trained with {fit}; leave it out"):
        VideoCaptioner.from_pretrained(tmp_path / "artifact", device="cpu", overrides=[f"data.fit={other}"])


def test_runs_and_artifacts_without_the_key_have_crop(tmp_path):
    for folder in (OLD / "run", OLD / "run/artifacts/finetune"):
        assert "fit" not in yaml.safe_load((folder / "experiment.yaml").read_text())["data"]
        assert load_experiment(folder / "experiment.yaml").data.fit == "crop"
    assert artifact_experiment(OLD / "run/artifacts/finetune").data.fit == "crop"
    copied = tmp_path / "experiment.yaml"  # of neither: a new experiment
    copied.write_bytes((OLD / "run/experiment.yaml").read_bytes())
    assert load_experiment(copied).data.fit == load_experiment("e1").data.fit == "pad"
    (tmp_path / "run.json").write_text(json.dumps({}))
    assert load_experiment(copied).data.fit == "crop"
