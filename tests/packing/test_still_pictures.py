"""A still picture in frames and features stores: one frame, and the same batches as from copies of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests import tiny
from tests.clips import picture, write_manifest, write_video
from vlmds.data.dataset import open_dataset
from vlmds.data.features import bytes_per_sample, decode_features
from vlmds.data.index import ShardIndex
from vlmds.data.loader import Batches, SampleReader, TrainingPositions, training_collate
from vlmds.experiments.reading import load_experiment
from vlmds.models.assemble import load_model
from vlmds.models.sequences import SequenceBuilder
from vlmds.packing import convert as converting
from vlmds.packing.convert import ROW, convert
from vlmds.packing.finish import finish_dataset
from vlmds.packing.manifest import ManifestRow
from vlmds.packing.pack import pack
from vlmds.packing.report import write_report
from vlmds.packing.shards import Shard, write_shard
from vlmds.planning.prices import prices
from vlmds.video.decode_work import VideoReply

PICTURES, CLIPS = 5, 3
FRAMES = dict(num_frames=tiny.FRAMES, image_size=tiny.SIDE)
SHAPE = dict(**FRAMES, patches=4, width=48, fit="pad")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for i in range(PICTURES):
        name = f"p{i}.{('jpg', 'png', 'webp')[i % 3]}"
        Image.fromarray(picture(i, 64, 48)).save(folder / name)
        rows.append({"video": name, "caption": f"{i}번 사진입니다.", "split": "train"})
    for i in range(CLIPS):
        write_video(folder / f"c{i}.mp4", frames=9 + i)
        rows.insert(2 * i, {"video": f"c{i}.mp4", "caption": ["하나", f"{i}번."], "split": "train"})
    return write_manifest(folder / "m.jsonl", rows)


@pytest.fixture(scope="module")
def model(models):
    return load_model(load_experiment("e3", tiny.settings(models)), torch.device("cpu"))


@pytest.fixture(scope="module")
def stores(manifest, model, tmp_path_factory) -> Path:
    """The data in each store, and in `old-frames` and `old-features` with copies of the pictures."""
    folder = tmp_path_factory.mktemp("stores")
    for store in ("video", "frames"):
        pack(manifest, folder / store, store=store, shard_size=3, progress=False, **FRAMES)
    rewritten(folder / "frames", folder / "old-frames", picture_frames=tiny.FRAMES, clip_frames=tiny.FRAMES)
    to_features = dict(store="features", tower=model.tower, tower_name="clip", progress=False)
    convert(folder / "frames", folder / "features", **to_features)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(converting, "kept_frames", lambda frames, num_frames: num_frames)
        convert(folder / "old-frames", folder / "old-features", **to_features)
    for name in ("old-frames", "old-features"):
        path = folder / name / "dataset.json"
        path.write_text(json.dumps({**json.loads(path.read_bytes()), "version": 2}))
    return folder


def rewritten(source: Path, out: Path, picture_frames: int, clip_frames: int) -> None:
    """A frames store with other numbers of frames: of a picture its one so many times, as in version 2; of a clip the
    first ones."""
    index, shards = ShardIndex.open(source), []
    for position, info in enumerate(index.shards("train")):
        rows, replies = [], []
        for place in range(info.count):
            row = index.row("train", position, place)
            members = index.read(row)
            found = json.loads(members.pop("json"))
            captions = found["captions"]
            rows.append(ManifestRow(1, row.key, found["id"], "", found["source"], captions, None, None, "train", None))
            facts = {name: value for name, value in found.items() if name not in ROW} | {"decoder": row.decoder}
            if row.frames == 1:
                members = {f"{copy}.jpg": members["0.jpg"] for copy in range(picture_frames)}
                facts["timestamps"] = facts["timestamps"] * picture_frames
            else:
                members = {f"{number}.jpg": members[f"{number}.jpg"] for number in range(clip_frames)}
            replies.append(VideoReply(None, facts, members))
        shard = Shard("train", info.shard, rows, "0")
        write_shard(out, shard, iter(replies))
        shards.append(replace(shard, rows=[]))
    names = ("store", "sampler", "resizer", "num_frames", "image_size", "quality", "shard_size", "shard_bytes")
    finish_dataset(out, shards, [], {name: index.meta[name] for name in names})


def rows_of(index):
    return [index.row("train", at, i) for at, info in enumerate(index.shards("train")) for i in range(info.count)]


def batches(model, folder: Path) -> list[dict]:
    """The micro-batches of two ranks in six steps: more than two epochs."""
    projector = model.captioner.projector
    builder = SequenceBuilder(model.tokenizer, "무엇?", projector.num_tokens)
    collate = training_collate(builder, projector.tokens_of(projector.patches))
    reader = SampleReader(open_dataset(str(folder)), "train", tiny.FRAMES, tiny.SIDE, seed=5)
    shape = dict(global_batch=4, micro_batch=2, world_size=2)
    return [
        batch
        for rank in (0, 1)
        for batch in Batches(reader, TrainingPositions(0, 6, 1, rank, **shape), collate, num_workers=0)
    ]


@pytest.mark.parametrize("store", ["frames", "features"])
def test_training_gets_the_same_bits_as_from_copies(model, stores, store):
    new, old = batches(model, stores / store), batches(model, stores / f"old-{store}")
    assert len(new) == len(old) == 12
    mixed = 0
    for a, b in zip(new, old, strict=True):
        assert a.keys() == b.keys() and store in a
        for name in a.keys() - {store}:
            same = torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
            assert same, name
        mixed += isinstance(a[store], list)
        assert type(a[store]) is type(b[store]) and a["bad"] == []
        for one, other in zip(a[store], b[store], strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)
    assert mixed  # pictures and clips in one micro-batch


def test_a_picture_is_stored_once(stores):
    for name, copies in (("frames", 1), ("old-frames", tiny.FRAMES)):
        for row in rows_of(ShardIndex.open(stores / name)):
            assert sum(m.ext.endswith(".jpg") for m in row.members) == (copies if row.frames == 1 else tiny.FRAMES)
    for name, copies in (("features", 1), ("old-features", tiny.FRAMES)):
        index = ShardIndex.open(stores / name)
        for row in rows_of(index):
            (size,) = [m.size for m in row.members if m.ext == "safetensors"]
            kept = bytes_per_sample(copies if row.frames == 1 else tiny.FRAMES, 4, 48)
            assert kept < size < kept + 100
            assert json.loads(index.read(row)["json"]).get("still", False) is (row.frames == 1)


def test_conversions_of_every_source_keep_it_once(model, stores, tmp_path):
    """Frames of a video store are byte for byte those packed from the manifest."""
    convert(stores / "video", tmp_path / "frames", store="frames", progress=False, **FRAMES)
    for made in sorted((tmp_path / "frames").rglob("*.tar")):
        assert made.read_bytes() == (stores / made.relative_to(tmp_path)).read_bytes()
    for source, options in (("video", {"num_frames": tiny.FRAMES}), ("old-frames", {})):
        out = tmp_path / f"of-{source}"
        tower = dict(tower=model.tower, tower_name="clip")
        convert(stores / source, out, store="features", progress=False, **tower, **options)
        index = ShardIndex.open(out)
        for row in rows_of(index):
            features = decode_features(index.read(row), index.meta, still=row.frames == 1)
            assert len(features) == 4 * (1 if row.frames == 1 else tiny.FRAMES)
    for made in sorted((tmp_path / "of-old-frames").rglob("*.tar")):
        assert made.read_bytes() == (stores / "features" / made.relative_to(tmp_path / "of-old-frames")).read_bytes()


def test_a_clip_with_one_frame_is_a_bad_sample(model, stores, tmp_path):
    """In training another one takes its place; a conversion puts it on the ledger."""
    rewritten(stores / "frames", tmp_path / "hostile", picture_frames=1, clip_frames=1)
    reader = SampleReader(open_dataset(str(tmp_path / "hostile")), "train", tiny.FRAMES, tiny.SIDE, shuffle=False)
    samples = [reader.load(position) for position in range(len(reader))]
    assert len(samples) == PICTURES + CLIPS and all(sample.still for sample in samples)
    bad = {record["key"]: record["reason"] for sample in samples for record in sample.bad}
    assert bad == {f"c{i}": f"1 frames, not {tiny.FRAMES}" for i in range(CLIPS)}
    tower = dict(tower=model.tower, tower_name="clip")
    summary = convert(tmp_path / "hostile", tmp_path / "out", store="features", progress=False, **tower)
    assert summary.counts == {"train": PICTURES} and summary.rejected == {f"1 frames, not {tiny.FRAMES}": CLIPS}


def test_the_report_and_the_prices_count_pictures_once(stores):
    for name in ("frames", "old-frames", "video"):
        page = write_report(stores / name).read_text("utf-8")
        assert f"<dd>{PICTURES}</dd>" in page and "정지 이미지" in page
        assert page.count("data:image/jpeg") == PICTURES * (4 if name == "old-frames" else 1) + CLIPS * 4
    video, frames, features, old = (
        {p.store: p.bytes for p in prices([ShardIndex.open(stores / name)], **SHAPE)}
        for name in ("video", "frames", "features", "old-features")
    )
    mean = bytes_per_sample(1, 4, 48) * (PICTURES + CLIPS * tiny.FRAMES) / (PICTURES + CLIPS)
    assert video["features"] == pytest.approx(mean) and frames["features"] == pytest.approx(mean)
    tars = sum(path.stat().st_size for path in (stores / "features").rglob("*.tar"))
    assert features["features"] == tars / (PICTURES + CLIPS) < old["features"]
    one = {p.store: p.bytes for p in prices([ShardIndex.open(stores / "video")], **SHAPE | {"num_frames": 1})}
    assert one["frames"] < video["frames"] < frames["frames"]
