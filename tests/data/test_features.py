"""The features store: its members, and training on it against training on frames."""

import json
import re
import shlex
import shutil

import pytest
import torch
from safetensors.torch import save

from tests import tiny
from tests.clips import write_manifest, write_video
from vlmds.cli import main
from vlmds.data.alike import converted, tower_keys
from vlmds.data.dataset import Dataset
from vlmds.data.features import bytes_per_sample, check_features, decode_features, encode_features
from vlmds.data.index import ShardIndex
from vlmds.data.loader import Batches, SampleReader, training_collate
from vlmds.errors import InputError, SampleError
from vlmds.experiments.reading import load_experiment
from vlmds.experiments.schema import VisionConfig
from vlmds.files import as_path
from vlmds.inference.video_captioner import VideoCaptioner
from vlmds.models.artifact import save_artifact
from vlmds.models.assemble import load_model
from vlmds.models.captioner import IGNORE
from vlmds.models.sequences import SequenceBuilder
from vlmds.models.vision import load_vision_tower
from vlmds.packing.convert import convert
from vlmds.packing.pack import pack

CPU = torch.device("cpu")
META = {"num_frames": 2, "vision": {"patches": 3, "width": 4}}


@pytest.fixture(scope="module")
def stores(models, tmp_path_factory):
    """One dataset as frames and as features, pooled and not: a folder."""
    folder = tmp_path_factory.mktemp("stores")
    rows = []
    for i in range(6):
        write_video(folder / f"v{i}.mp4", frames=9 + i, width=64 + 2 * i)
        rows.append({"video": f"v{i}.mp4", "caption": f"{i}번 영상입니다.", "split": "train" if i < 4 else "val"})
    manifest = write_manifest(folder / "m.jsonl", rows)
    tiny.pack_frames(manifest, folder / "frames", shard_size=2)
    for name, pool in (("features", 1), ("pooled", 2)):
        vision = experiment_on(models, f"vision.pool={pool}").vision
        tower = load_vision_tower(vision, torch.float32, CPU)
        convert(
            folder / "frames", folder / name, store="features", tower=tower, tower_name=vision.model, progress=False
        )
    return folder


def experiment_on(models, *overrides):
    return load_experiment("e3", [*tiny.settings(models), *overrides])


def batches(model, index, split="train"):
    reader = SampleReader(Dataset([index]), split, tiny.FRAMES, tiny.SIDE, seed=1)
    collate = training_collate(SequenceBuilder(model.tokenizer, "무엇?", model.captioner.projector.num_tokens))
    count = len(reader)
    return list(Batches(reader, [range(i, min(i + 2, count)) for i in range(0, count, 2)], collate, 0))


def test_features_travel_as_bfloat16():
    features = torch.randn(6, 4)
    data = encode_features(features)
    found = decode_features({"safetensors": data}, META)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, features.to(torch.bfloat16))
    assert encode_features(features) == data
    assert 0 < len(data) - bytes_per_sample(2, 3, 4) < 100
    assert bytes_per_sample(8, 576, 1024) == 9_437_184


def test_a_still_picture_has_the_features_of_one_frame():
    """Of older stores those of the first copy; other shapes are refused."""
    features = torch.randn(6, 4).to(torch.bfloat16)
    one, copies = ({"safetensors": encode_features(tensor)} for tensor in (features[:3], features))
    assert torch.equal(decode_features(one, META, still=True), features[:3])
    found = decode_features(copies, META, still=True)
    assert torch.equal(found, features[:3]) and found.untyped_storage().nbytes() == 2 * 3 * 4
    with pytest.raises(SampleError, match=r"\[3, 4\], not torch.bfloat16 \[6, 4\]"):
        decode_features(one, META)
    with pytest.raises(SampleError, match=r"\[5, 4\], not torch.bfloat16 \[3, 4\]"):
        decode_features({"safetensors": encode_features(features[:5])}, META, still=True)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"safetensors": b"no tensor"}, "features cannot be read"),
        ({"0.jpg": b""}, "features cannot be read"),
        ({"safetensors": save({"other": torch.zeros(1)})}, "features cannot be read"),
        ({"safetensors": encode_features(torch.zeros(5, 4))}, r"\[5, 4\], not torch.bfloat16 \[6, 4\]"),
        ({"safetensors": save({"features": torch.zeros(6, 4)})}, "float32"),
    ],
)
def test_what_is_no_feature_tensor_is_a_bad_sample(members, message):
    with pytest.raises(SampleError, match=message):
        decode_features(members, META)


@pytest.mark.parametrize(("name", "pool"), [("features", 1), ("pooled", 2)])
def test_losses_on_features_equal_those_on_frames(models, stores, name, pool):
    """Same samples in the same order, and, but for bfloat16's rounding, the same losses."""
    experiment = experiment_on(models, f"vision.pool={pool}")
    index = ShardIndex.open(stores / name)
    model = load_model(experiment, CPU)
    blind = load_model(experiment, CPU, stored_tower=index.meta["vision"]["fingerprint"])
    assert blind.tower is None and blind.tower_fingerprint() == model.tower_fingerprint()
    on_frames = batches(model, ShardIndex.open(stores / "frames"))
    on_features = batches(blind, index)
    assert len(on_frames) == len(on_features) >= 2
    for a, b in zip(on_frames, on_features, strict=True):
        assert a["keys"] == b["keys"] and "frames" not in b
        assert torch.equal(a["input_ids"], b["input_ids"])
        features = model.features(a)
        assert b["features"].dtype == torch.bfloat16
        # Other batch sizes may round differently, by one step of bfloat16 at most.
        torch.testing.assert_close(b["features"].float(), features, rtol=2**-7, atol=1e-4)
        assert not torch.equal(b["features"].float(), features)
        labels, ids = a["labels"], a["input_ids"]
        tokens = (labels != IGNORE).sum()
        exact = model.captioner(features, ids, labels) / tokens
        stored = blind.captioner(blind.features(b), ids, labels) / tokens
        torch.testing.assert_close(stored, exact, rtol=2e-3, atol=2e-3)


def test_reader_processes_hand_features_over(models, stores):
    index = ShardIndex.open(stores / "features")
    reader = SampleReader(Dataset([index]), "train", tiny.FRAMES, tiny.SIDE)
    model_tokens = tiny.FRAMES * 4
    collate = training_collate(SequenceBuilder(load_model(experiment_on(models), CPU).tokenizer, "무엇?", model_tokens))
    positions = [range(2), range(2, 4)]
    (a, b), (c, d) = (list(Batches(reader, positions, collate, n)) for n in (0, 2))
    assert torch.equal(a["features"], c["features"]) and torch.equal(b["features"], d["features"])


@pytest.mark.parametrize(("name", "pool"), [("features", 1), ("pooled", 2)])
def test_the_experiments_tower_passes_by_its_fingerprint(models, stores, name, pool):
    experiment, index = experiment_on(models, f"vision.pool={pool}"), ShardIndex.open(stores / name)
    tower = load_vision_tower(experiment.vision, torch.float32, CPU)
    assert tower.fingerprint() == index.meta["vision"]["fingerprint"]
    check_features(index, experiment, tower)  # or InputError
    check_features(index, experiment)
    index.meta["vision"]["fingerprint"] = "0" * 64
    with pytest.raises(InputError, match="is another one"):
        check_features(index, experiment, tower)


def test_other_stores_need_no_tower(models, stores):
    with pytest.raises(InputError, match="/none"):
        check_features(ShardIndex.open(stores / "features"), experiment_on(models, "vision.model=/none"))
    check_features(ShardIndex.open(stores / "frames"), experiment_on(models, "vision.model=/none"))  # not loaded


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("vision.pool=2", r"vision\.pool 1, but the experiment has 2"),
        ("vision.feature_layer=-2", r"vision\.feature_layer -1, but the experiment has -2"),
    ],
)
def test_other_features_are_refused_without_reading_weights(models, stores, override, message):
    experiment = experiment_on(models, override, "vision.model=/nowhere")
    with pytest.raises(InputError, match=message):
        check_features(ShardIndex.open(stores / "features"), experiment)


@pytest.fixture(scope="module")
def other_clip(models, tmp_path_factory):
    """The same shape, other weights."""
    from transformers import CLIPModel

    folder = shutil.copytree(models / "clip", tmp_path_factory.mktemp("other") / "clip2")
    clip = CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        next(clip.vision_model.encoder.layers[0].parameters()).mul_(1.5)
    clip.save_pretrained(folder)
    return folder


def test_another_tower_is_refused_naming_both(models, stores, other_clip):
    experiment = experiment_on(models, f"vision.model={other_clip}")
    with pytest.raises(InputError) as caught:
        check_features(ShardIndex.open(stores / "features"), experiment)
    message = str(caught.value)
    assert str(models / "clip") in message and str(other_clip) in message and "\n" not in message


def test_captioning_with_another_tower_is_refused_naming_both(models, other_clip, tmp_path):
    experiment = experiment_on(models)
    model = load_model(experiment, CPU)
    save_artifact(tmp_path / "a", model.captioner, experiment, "align", {"tower": model.tower_fingerprint()})
    VideoCaptioner.from_pretrained(tmp_path / "a", device="cpu")
    with pytest.raises(InputError) as caught:
        VideoCaptioner.from_pretrained(tmp_path / "a", device="cpu", overrides=[f"vision.model={other_clip}"])
    message = str(caught.value)
    assert str(models / "clip") in message and str(other_clip) in message and "\n" not in message


def test_a_blend_needs_one_tower_but_not_one_name(stores, tmp_path):
    pooled, plain = (ShardIndex.open(stores / name) for name in ("pooled", "features"))
    with pytest.raises(InputError, match=r"data\.blend: .*pool 2.*pool 1"):
        Dataset([plain, pooled], [1.0, 1.0])
    copy = shutil.copytree(stores / "features", tmp_path / "copy")
    meta = json.loads((copy / "dataset.json").read_text())
    meta["vision"]["model"] = "where/another/machine/has/it"
    (copy / "dataset.json").write_text(json.dumps(meta))
    both = Dataset([plain, ShardIndex.open(copy)], [1.0, 1.0])
    assert both.store == "features" and both.count("train") == 2 * plain.count("train")


def test_the_command_named_makes_features_of_another_part(stores, tmp_path):
    """Of a video or frames store, like those of the other part."""
    source = tmp_path / "my videos"
    pack(stores / "m.jsonl", source, progress=False)
    for plain in (source, stores / "frames"):
        with pytest.raises(InputError) as caught:
            Dataset([ShardIndex.open(stores / "pooled"), ShardIndex.open(plain)], [1.0, 1.0])
        command, new = re.search(
            r"convert one: (.*); then name (.*) in data\.blend\.1\.path$", str(caught.value)
        ).groups()
        assert main([*shlex.split(command)[1:], "--no-report"]) == 0
        both = Dataset([ShardIndex.open(stores / "pooled"), ShardIndex.open(new)], [1.0, 1.0])
        assert both.count("train") > 0
        shutil.rmtree(new)


@pytest.mark.parametrize("store", ["features", "frames"])
def test_another_number_of_frames_is_refused_naming_the_command(stores, tmp_path, store):
    with pytest.raises(InputError, match="num_frames 4, but the experiment needs 8") as caught:
        SampleReader(Dataset([ShardIndex.open(stores / store)]), "train", 8, tiny.SIDE)
    command = re.search(r"again from .*?: (vlmds pack .*), or set data.num_frames=4$", str(caught.value))[1]
    pack(stores / "m.jsonl", tmp_path / "video", progress=False)
    words = shlex.split(command)[1:]
    words[1:3] = [
        {"MANIFEST": str(stores / "m.jsonl"), "VIDEO_STORE": str(tmp_path / "video")}[words[1]],
        str(tmp_path / "new"),
    ]
    assert main([*words, "--no-report"]) == 0
    new = ShardIndex.open(tmp_path / "new")
    SampleReader(Dataset([new]), new.splits[0], 8, tiny.SIDE)


def test_a_command_names_the_towers_revision_and_the_new_place_beside_the_old(stores):
    meta = ShardIndex.open(stores / "frames").meta
    index = ShardIndex(as_path("memory://vlmds-command/a/"), meta)
    vision = VisionConfig(model="owner/clip", revision="v1", pool=2)
    like = {"store": "features", "num_frames": 4, "vision": tower_keys(vision)}
    command, out = converted(index, like)
    assert out == "memory://vlmds-command/a-features"
    assert command == (
        f"vlmds pack memory://vlmds-command/a {out} --store features --num-frames 4 --vision owner/clip@v1 --pool 2"
    )
    assert tower_keys(VisionConfig(model="/models/clip"))["model"] == "/models/clip"


def test_dataset_json_records_the_tower(models, stores):
    meta = json.loads((stores / "pooled" / "dataset.json").read_text())
    vision = meta["vision"]
    assert (meta["store"], meta["num_frames"], meta["image_size"]) == ("features", 4, tiny.SIDE)
    assert (vision["pool"], vision["feature_layer"], vision["patches"], vision["width"]) == (2, -1, 1, 48)
    assert vision["model"] == str(models / "clip") and len(vision["fingerprint"]) == 64
