import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.conftest import write_manifest, write_video
from vlmds.data.index import ShardIndex
from vlmds.data.loader import (
    SampleReader,
    TrainingPositions,
    evaluation_positions,
    read_batches,
    training_collate,
)
from vlmds.data.pack import pack
from vlmds.data.prompt import SequenceBuilder
from vlmds.demo.pretrain import train_tokenizer
from vlmds.errors import InputError, SampleError

SIDE, FRAMES = 28, 4


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """11 clips, the captions of which name them; one has two captions."""
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for i in range(11):
        write_video(folder / f"v{i}.mp4", frames=8 + i, width=64 + 2 * i)
        rows.append({"video": f"v{i}.mp4", "caption": f"{i}번" if i else ["0번", "영 번"]})
    return write_manifest(folder / "manifest.jsonl", rows)


@pytest.fixture(scope="module", params=["frames", "video"])
def dataset(request, source, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "out"
    pack(source, out, store=request.param, num_frames=FRAMES, image_size=SIDE, shard_size=4,
         progress=False)
    return ShardIndex.open(out)


@pytest.fixture(scope="module")
def collate():
    return training_collate(SequenceBuilder(train_tokenizer(["0번"], 600), "무엇?", 3))


def reader(dataset, **options):
    return SampleReader(dataset, "train", FRAMES, SIDE, **options)


@settings(max_examples=60, deadline=None)
@given(world=st.sampled_from([1, 2, 4]), micro=st.sampled_from([1, 2, 4]),
       first=st.integers(0, 5), steps=st.integers(1, 4))
def test_every_split_of_the_work_reads_the_same_global_batches(world, micro, first, steps):
    batch = 16
    accumulation = batch // (world * micro)
    seen = {step: [] for step in range(first, first + steps)}
    for rank in range(world):
        positions = TrainingPositions(first, first + steps, accumulation, rank, global_batch=batch,
                                      micro_batch=micro, world_size=world)
        assert len(positions) == steps * accumulation
        for number, part in enumerate(positions):
            seen[first + number // accumulation] += part
    for step, found in seen.items():
        assert sorted(found) == list(range(step * batch, (step + 1) * batch))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_reads_every_sample_once(world):
    parts = [evaluation_positions(11, 3, rank, world) for rank in range(world)]
    assert sorted(p for part in parts for batch in part for p in batch) == list(range(11))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_come_in_order_whatever_the_workers(dataset, collate, workers):
    positions = [range(i, i + 2) for i in range(0, 22, 2)]  # two epochs
    source = reader(dataset, seed=3, window=2)
    expected = [source.load(p) for p in range(22)]
    batches = list(read_batches(source, positions, collate, workers))
    assert [k for b in batches for k in b["keys"]] == [s.key for s in expected]
    assert sorted(s.key for s in expected[:11]) == sorted(s.key for s in expected[11:])
    frames = torch.cat([b["frames"] for b in batches])
    assert frames.dtype == torch.uint8 and frames.shape == (22, FRAMES, 3, SIDE, SIDE)
    assert np.array_equal(frames.numpy(), np.stack([s.frames for s in expected]))
    assert all(b["bad"] == [] and b["positions"] <= b["input_ids"].numel() for b in batches)


def test_captions_take_turns_over_the_epochs(dataset):
    source = reader(dataset)
    shown = [s.caption for s in map(source.load, range(33)) if s.key == "v0"]
    assert shown == ["0번", "영 번", "0번"]


def test_both_stores_show_the_same_frames(source, tmp_path):
    loaded = {}
    for store in ("frames", "video"):
        pack(source, tmp_path / store, store=store, num_frames=FRAMES, image_size=SIDE,
             progress=False)
        samples = map(reader(ShardIndex.open(tmp_path / store)).load, range(11))
        loaded[store] = {s.key: s.frames.astype(int) for s in samples}
    for key, frames in loaded["video"].items():
        assert np.abs(frames - loaded["frames"][key]).mean() < 4, key  # JPEG at quality 95


def test_a_damaged_sample_is_replaced_and_told(dataset, collate, tmp_path):
    shutil.copytree(dataset.root, tmp_path / "copy")
    copy = ShardIndex.open(tmp_path / "copy")
    source = reader(copy)
    row = copy.row("train", *source.order.locate(5))
    with (tmp_path / "copy" / f"train/{row.shard:06d}.tar").open("r+b") as file:
        file.seek(row.members[0].offset + 100)
        file.write(b"damage")
    sample = source.load(5)
    (record,) = sample.bad
    assert record["key"] == row.key != sample.key and record["position"] == 5
    assert "crc32" in record["reason"]
    assert sample.key == reader(dataset).load((5 + 7919) % 11).key  # replaced by position
    (batch,) = read_batches(source, [range(4, 7)], collate, 0)
    assert batch["bad"] == [record] and len(batch["keys"]) == 3


def test_a_deleted_shard_is_named(dataset, tmp_path):
    shutil.copytree(dataset.root, tmp_path / "copy")
    source = reader(ShardIndex.open(tmp_path / "copy"))
    for tar in (tmp_path / "copy").rglob("*.tar"):
        tar.unlink()
    with pytest.raises(SampleError, match=r"16 samples in a row.*\.tar.*No such file"):
        source.load(0)


def test_frames_of_another_size_or_number_are_refused(source, tmp_path):
    pack(source, tmp_path / "out", store="frames", num_frames=FRAMES, image_size=SIDE,
         progress=False)
    index = ShardIndex.open(tmp_path / "out")
    with pytest.raises(InputError, match=r"num_frames 4, but the experiment needs 8"):
        SampleReader(index, "train", 8, SIDE)
    with pytest.raises(InputError, match=r"image_size 28, but the experiment needs 336"):
        SampleReader(index, "train", FRAMES, 336)


def test_the_prompt_of_a_sample_is_used(tmp_path, collate):
    write_video(tmp_path / "a.mp4")
    manifest = write_manifest(tmp_path / "m.jsonl", [
        {"video": "a.mp4", "caption": "가", "prompt": "누구?"}, {"video": "a.mp4", "id": "b",
                                                              "caption": "가"}])
    pack(manifest, tmp_path / "out", progress=False)
    source = SampleReader(ShardIndex.open(tmp_path / "out"), "train", FRAMES, SIDE, shuffle=False)
    assert [source.load(p).prompt for p in (0, 1)] == ["누구?", None]
    assert json.dumps(source.load(0).captions, ensure_ascii=False) == '["가"]'
