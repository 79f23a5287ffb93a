"""Conversion of one store to another."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import fsspec
import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image
from safetensors.torch import load

from tests import tiny
from tests.clips import write_manifest, write_video
from vlmds.console import progress as progress_module
from vlmds.console.progress import Phase
from vlmds.data.index import ShardIndex
from vlmds.data.stored import read_jpegs
from vlmds.errors import InputError
from vlmds.experiments.reading import load_experiment
from vlmds.files import as_path
from vlmds.models.vision import load_vision_tower
from vlmds.packing import convert as module
from vlmds.packing.convert import convert
from vlmds.packing.pack import pack
from vlmds.packing.report import write_report

FRAMES = dict(num_frames=tiny.FRAMES, image_size=tiny.SIDE)


def contents(folder, pattern="*"):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob(pattern)) if p.is_file()}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Six clips, and two rows without a video, which leave a shard empty."""
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for i in range(6):
        write_video(folder / f"v{i}.mp4", frames=10 + i, width=64 + 2 * i, height=48 if i else 96)
        rows.append({"video": f"v{i}.mp4", "caption": f"{i}번 <영상>입니다.", "split": "val" if i == 5 else "train"})
    rows[1] |= {"caption": ["하나", "둘"], "prompt": "무엇?"}
    (folder / "bad.mp4").write_bytes(b"no video")
    rows.insert(2, {"video": "bad.mp4", "caption": "없음", "split": "train"})
    rows.insert(3, {"video": "none.mp4", "caption": "없음", "split": "train"})
    rows.append({"video": "v3.mp4", "id": "한글 이름", "caption": "다시"})
    return write_manifest(folder / "m.jsonl", rows)


@pytest.fixture(scope="module")
def sources(manifest, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    options = dict(shard_size=2, progress=False)
    pack(manifest, folder / "video", store="video", **options)
    pack(manifest, folder / "frames", store="frames", **FRAMES, **options)
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    models = tiny.make_models(tmp_path_factory.mktemp("models"))
    vision = load_experiment("e1", tiny.settings(models)).vision
    return load_vision_tower(vision, torch.float32, torch.device("cpu"))


def to_features(source, out, tower, **options):
    return convert(source, out, store="features", tower=tower, tower_name="clip", progress=False, **options)


def described(index):
    """Everything about the samples but the members that a store is for, and how to read those."""
    found = []
    for split in index.splits:
        for position, shard in enumerate(index.shards(split)):
            for i in range(shard.count):
                row = index.row(split, position, i)
                description = json.loads(index.read(row)["json"])
                description.pop("timing", None)
                found.append((shard.shard, replace(row, members=(), decoder=""), description))
    return found


def test_frames_made_of_a_video_store_are_those_packed_from_the_manifest(sources, tmp_path):
    summary = convert(sources / "video", tmp_path / "out", store="frames", progress=False, **FRAMES)
    packed, made = contents(sources / "frames", "*.tar"), contents(tmp_path / "out", "*.tar")
    assert made == packed and len(made) == 4
    for name in ("index.parquet", "ledger.jsonl", "dataset.json"):
        assert (tmp_path / "out" / name).read_bytes() == (sources / "frames" / name).read_bytes()
    assert summary.counts == {"train": 6, "val": 1} and summary.rejected == {}


def test_frames_of_a_span_are_those_of_the_stored_file(manifest, tmp_path):
    """A video store may contain another file than the manifest names: its span alone, encoded again."""
    (manifest.parent / "spans.jsonl").write_text(
        json.dumps({"video": "v3.mp4", "start": 0.3, "end": 0.9, "caption": "구간"}) + "\n"
    )
    for store in ("video", "frames"):
        pack(manifest.parent / "spans.jsonl", tmp_path / store, store=store, progress=False, **FRAMES)
    convert(tmp_path / "video", tmp_path / "out", store="frames", progress=False, **FRAMES)
    made, packed = (ShardIndex.open(tmp_path / name) for name in ("out", "frames"))
    a, b = (index.read(index.row("train", 0, 0)) for index in (made, packed))
    assert a.keys() == b.keys()
    for name in a.keys() - {"json"}:
        ours, theirs = (np.asarray(Image.open(io.BytesIO(m[name])), int) for m in (a, b))
        assert np.abs(ours - theirs).mean() < 8, name
    kept = json.loads(
        ShardIndex.open(tmp_path / "video").read(ShardIndex.open(tmp_path / "video").row("train", 0, 0))["json"]
    )
    del kept["timing"]  # of the video store's file
    assert {**json.loads(a["json"]), "timestamps": None} == {**kept, "timestamps": None}


@pytest.mark.parametrize("source", ["video", "frames"])
def test_a_features_store_keeps_samples_order_and_captions(sources, tower, tmp_path, source):
    options = {} if source == "frames" else {"num_frames": tiny.FRAMES}
    to_features(sources / source, tmp_path / "out", tower, **options)
    old, new = ShardIndex.open(sources / source), ShardIndex.open(tmp_path / "out")
    assert described(new) == described(old)
    assert [s.shard for s in new.shards("train")] == [s.shard for s in old.shards("train")] == [0, 2, 3]
    row = new.row("train", 0, 0)
    assert [m.ext for m in row.members] == ["json", "safetensors"]
    assert "<dd>features</dd>" in write_report(tmp_path / "out").read_text("utf-8")
    assert (tmp_path / "out/ledger.jsonl").read_bytes() == (sources / source / "ledger.jsonl").read_bytes()


def test_a_features_store_is_plain_webdataset_and_safetensors(sources, tower, tmp_path):
    to_features(sources / "frames", tmp_path / "out", tower)
    index = ShardIndex.open(tmp_path / "out")
    path = tmp_path / "out" / index.shards("train")[0].path
    samples = list(wds.WebDataset(str(path), shardshuffle=False))
    assert [s["__key__"] for s in samples] == ["v0", "v1"]
    frames = ShardIndex.open(sources / "frames")
    for i, sample in enumerate(samples):
        ((name, features),) = load(sample["safetensors"]).items()
        members = frames.read(frames.row("train", 0, i))
        pixels = torch.from_numpy(read_jpegs(members, frames.meta))[None]
        assert name == "features" and features.shape == (tiny.FRAMES * 4, 48)
        torch.testing.assert_close(features, tower(pixels)[0].to(torch.bfloat16))


def test_the_same_bytes_whatever_the_workers_and_the_start(sources, tower, tmp_path):
    to_features(sources / "frames", tmp_path / "a", tower, workers=1)
    summary = to_features(sources / "frames", tmp_path / "b", tower, workers=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") and summary.kept_shards == 0
    # Some shards are lost or half written; the others are kept.
    (tmp_path / "b/train/000002.json").unlink()
    (tmp_path / "b/dataset.json").unlink()
    (tmp_path / "b/val/000000.tar").write_bytes(b"short")
    kept = tmp_path / "b/train/000000.tar"
    before = kept.stat().st_mtime_ns
    summary = to_features(sources / "frames", tmp_path / "b", tower)
    assert summary.kept_shards == 2 and kept.stat().st_mtime_ns == before
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("progress", [True, False])
def test_a_conversion_says_what_it_does_unless_it_is_to_be_silent(sources, tmp_path, monkeypatch, progress):
    shown = []

    @contextmanager
    def recorded(what, total=None, *more, **how):
        shown.append((what, total, progress_module._silenced == 0))
        yield Phase(what, total, *more, **how)

    monkeypatch.setattr(module, "phase", recorded)
    convert(sources / "video", tmp_path, store="frames", progress=progress, **FRAMES)
    assert shown == [("converting to frames", 7, progress), ("writing the index", None, progress)]


def test_tasks_share_a_conversion(sources, tower, tmp_path):
    to_features(sources / "frames", tmp_path / "one", tower)
    for task in (1, 0, 2):
        part = to_features(sources / "frames", tmp_path / "out", tower, task=(task, 3))
        assert not part.finished
        assert not (tmp_path / "out/dataset.json").exists()
        if task == 1:  # of shards train 0, 2, 3 and val 0, the second
            assert [p.name for p in (tmp_path / "out").rglob("*.json")] == ["000002.json"]
        if task != 2:
            with pytest.raises(InputError, match=r"--finish: .* not converted yet: \d of 4 shards, "):
                to_features(sources / "frames", tmp_path / "out", tower, finish=True)
    summary = to_features(sources / "frames", tmp_path / "out", tower, finish=True)
    assert summary.kept_shards == summary.shards == 4
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_a_killed_conversion_goes_on(sources, tmp_path):
    out, reached = tmp_path / "out", tmp_path / "reached"
    code = (
        "import sys, time, pathlib\n"
        "from vlmds.packing import convert\n"
        "real = convert.write_shard\n"
        "def slow(out, shard, replies):\n"
        "    if shard.name == 'train/000002':\n"
        "        pathlib.Path(sys.argv[3]).touch(); time.sleep(600)\n"
        "    real(out, shard, replies)\n"
        "convert.write_shard = slow\n"
        "convert.convert(sys.argv[1], sys.argv[2], store='frames', progress=False, "
        f"num_frames={tiny.FRAMES}, image_size={tiny.SIDE})\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(sources / "video"), str(out), str(reached)], start_new_session=True
    )
    try:
        end = time.monotonic() + 60
        while not reached.exists() and time.monotonic() < end and process.poll() is None:
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
    assert reached.exists()
    assert (out / "train/000000.json").is_file() and not (out / "dataset.json").exists()
    summary = convert(sources / "video", out, store="frames", progress=False, **FRAMES)
    assert summary.kept_shards == 1
    assert contents(out, "*.tar") == contents(sources / "frames", "*.tar")
    assert not list(out.rglob(".*.tmp"))


def test_a_sample_that_cannot_be_decoded_goes_to_the_ledger(manifest, tmp_path):
    """Damage that packing with verify=False did not find."""
    folder = tmp_path / "clips"
    folder.mkdir()
    source = write_video(folder / "a.mp4", frames=40)
    data = bytearray(source.read_bytes())
    at = len(data) // 2  # behind the first frame, which packing does decode
    data[at : at + 500] = bytes(500)
    (folder / "b.mp4").write_bytes(data)
    rows = [
        {"video": f"{name}.mp4", "id": f"{name}{i}", "caption": name, "start": i / 10} for i, name in enumerate("aab")
    ]
    pack(write_manifest(folder / "m.jsonl", rows), tmp_path / "video", verify=False, progress=False)
    summary = convert(tmp_path / "video", tmp_path / "out", store="frames", progress=False, **FRAMES)
    assert summary.counts == {"train": 2} and summary.rejected == {"cannot be decoded": 1}
    (entry,) = [json.loads(line) for line in (tmp_path / "out/ledger.jsonl").open()]
    assert (entry["id"], entry["video"], entry["shard"]) == ("b2", "b.mp4", 0)
    index = ShardIndex.open(tmp_path / "out")
    assert [index.row("train", 0, i).key for i in range(2)] == ["a0", "a1"]


@pytest.mark.parametrize(
    ("source", "store", "message"),
    [
        ("video", "video", "a video store cannot become a video store; it is one already"),
        ("frames", "frames", "it is one already"),
        ("frames", "video", "a frames store cannot become a video store; pack the manifest with"),
    ],
)
def test_impossible_conversions_are_refused(sources, tmp_path, source, store, message):
    with pytest.raises(InputError, match=message):
        convert(sources / source, tmp_path / "out", store=store, progress=False)
    assert not (tmp_path / "out").exists()


def test_features_cannot_be_turned_back(sources, tower, tmp_path):
    to_features(sources / "frames", tmp_path / "features", tower)
    for store in ("video", "frames", "features"):
        with pytest.raises(InputError, match=f"a features store cannot become a {store} store"):
            convert(
                tmp_path / "features", tmp_path / "out", store=store, tower=tower, tower_name="clip", progress=False
            )


def test_options_that_do_not_fit_are_refused_with_both_numbers(sources, tower, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="--vision"):
        convert(sources / "frames", out, store="features", progress=False)
    with pytest.raises(InputError, match="num_frames 4, not 8"):
        to_features(sources / "frames", out, tower, num_frames=8)
    with pytest.raises(InputError, match="--image-size: 64, but clip takes 28"):
        to_features(sources / "video", out, tower, image_size=64)
    assert not out.exists()


def test_a_damaged_source_is_refused_by_name(sources, tower, tmp_path):
    shutil.copytree(sources / "frames", tmp_path / "copy")
    tar = tmp_path / "copy/train/000002.tar"
    data = bytearray(tar.read_bytes())
    data[3000] ^= 1
    tar.write_bytes(data)
    with pytest.raises(InputError, match="train/000002.tar: damaged"):
        to_features(tmp_path / "copy", tmp_path / "out", tower)
    assert not (tmp_path / "out/dataset.json").exists()


def test_a_damaged_description_is_refused_by_its_shards_name(sources, tmp_path):
    source = shutil.copytree(sources / "video", tmp_path / "source")
    member = next(m for m in ShardIndex.open(source).row("train", 0, 0).members if m.ext == "json")
    with (source / "train" / "000000.tar").open("r+b") as file:
        file.seek(member.offset)
        file.write(b"X")
    with pytest.raises(InputError, match="000000.tar: damaged, its sha256"):
        convert(source, tmp_path / "out", store="frames", num_frames=2, image_size=28, progress=False)


def test_a_conversion_may_go_to_a_url(sources, tmp_path):
    fs = fsspec.filesystem("memory")
    options = dict(store="frames", num_frames=2, image_size=28, progress=False)
    convert(sources / "video", tmp_path / "out", **options)
    try:
        convert(sources / "video", "memory://converted", **options)
        assert str(write_report(as_path("memory://converted"))).endswith("pack_report.html")
        shards = [path for path in fs.find("/converted") if path.endswith(".tar")]
        assert shards and all(
            fs.cat(path) == (tmp_path / "out" / path.removeprefix("/converted/")).read_bytes() for path in shards
        )
    finally:
        fs.rm("/converted", recursive=True)


def test_another_target_in_the_same_folder_is_refused(sources, tower, tmp_path):
    convert(sources / "video", tmp_path / "out", store="frames", progress=False, **FRAMES)
    before = contents(tmp_path / "out")
    with pytest.raises(InputError, match="choose another folder"):
        convert(sources / "video", tmp_path / "out", store="frames", num_frames=2, image_size=tiny.SIDE, progress=False)
    assert contents(tmp_path / "out") == before
    index = ShardIndex.open(tmp_path / "out")
    image = index.read(index.row("train", 0, 0))["0.jpg"]
    (tmp_path / "x.jpg").write_bytes(image)
    assert Image.open(tmp_path / "x.jpg").size == (tiny.SIDE, tiny.SIDE)


def test_features_record_how_their_frames_were_fitted(sources, tower, tmp_path):
    """As the frames store records it, which an older vlmds may have made; its shards are others."""
    path = shutil.copytree(sources / "frames", tmp_path / "older") / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "resizer": "another"}))
    hashes = []
    for source in (sources / "frames", tmp_path / "older"):
        out = tmp_path / f"of-{source.name}"
        to_features(source, out, tower)
        assert ShardIndex.open(out).meta["resizer"] == ShardIndex.open(source).meta["resizer"]
        hashes.append(json.loads((out / "train/000000.json").read_bytes())["options_hash"])
    assert hashes[0] != hashes[1]
