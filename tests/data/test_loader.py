"""Loading of micro-batches: the same samples for any split of the work, and bad samples."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.clips import write_manifest, write_video
from vlmds.data.dataset import Dataset
from vlmds.data.index import ShardIndex
from vlmds.data.loader import Batches, SampleReader, TrainingPositions, evaluation_positions, training_collate
from vlmds.data.order import SampleOrder
from vlmds.demo.pretrain import train_tokenizer
from vlmds.errors import InputError, SampleError
from vlmds.models.sequences import SequenceBuilder
from vlmds.packing.pack import pack

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
    pack(source, out, store=request.param, num_frames=FRAMES, image_size=SIDE, shard_size=4, progress=False)
    return ShardIndex.open(out)


@pytest.fixture(scope="module")
def frames_store(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "out"
    pack(source, out, store="frames", num_frames=FRAMES, image_size=SIDE, shard_size=4, progress=False)
    return ShardIndex.open(out)


@pytest.fixture(scope="module")
def collate():
    return training_collate(SequenceBuilder(train_tokenizer(["0번"], 600), "무엇?", 3))


def reader(index, **options):
    return SampleReader(Dataset([index]), "train", FRAMES, SIDE, **options)


def global_batches(reader, collate, world, micro, workers, steps=(0, 3)):
    """Keys of each optimizer step's global batch, in order of position, as `world` ranks read it."""
    accumulation = 8 // (world * micro)
    parts = {}
    for rank in range(world):
        positions = TrainingPositions(*steps, accumulation, rank, global_batch=8, micro_batch=micro, world_size=world)
        for number, found in enumerate(Batches(reader, positions, collate, workers)):
            step, turn = divmod(number, accumulation)
            parts[step, turn, rank] = found["keys"]
    return [
        sum((parts[step, turn, rank] for turn in range(accumulation) for rank in range(world)), [])
        for step in range(steps[1] - steps[0])
    ]


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_global_batches_are_the_same_for_any_world_size_and_workers(frames_store, collate, workers):
    source = reader(frames_store, seed=5, window=2)
    expected = [[source.load(p).key for p in range(step * 8, step * 8 + 8)] for step in range(3)]
    for world, micro in [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (8, 1)]:
        if workers and (world, micro) not in [(1, 2), (2, 4), (4, 2), (8, 1)]:
            continue  # starting processes takes most of the time
        assert global_batches(source, collate, world, micro, workers) == expected, (world, micro)
    assert global_batches(source, collate, 2, 2, workers, steps=(1, 3)) == expected[1:]  # resumed


@settings(max_examples=200)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    window=st.integers(1, 5),
    world=st.sampled_from([1, 2, 4, 8]),
    micro=st.sampled_from([1, 2, 4]),
    factor=st.integers(1, 3),
    seed=st.integers(0, 2**34),
    first=st.integers(0, 5),
    steps=st.integers(1, 4),
)
def test_every_split_of_the_work_reads_the_same_positions_and_each_sample_once(
    counts, window, world, micro, factor, seed, first, steps
):
    """Whatever the shards, world size, micro-batch and the step that a run goes on from."""
    batch = world * micro * factor
    seen = {step: [] for step in range(first, first + steps)}
    for rank in range(world):
        positions = TrainingPositions(
            first, first + steps, factor, rank, global_batch=batch, micro_batch=micro, world_size=world
        )
        assert len(positions) == steps * factor  # equal steps on every rank
        for number, part in enumerate(positions):
            assert len(part) == micro
            seen[first + number // factor] += part
    for step, found in seen.items():
        assert sorted(found) == list(range(step * batch, (step + 1) * batch))
    order = SampleOrder(counts, seed, window)
    for epoch in (0, 1):
        places = [order.locate(epoch * sum(counts) + p) for p in range(sum(counts))]
        assert sorted(places) == [(s, i) for s, count in enumerate(counts) for i in range(count)]
    p = first * batch  # any position at once, from a fresh object, as a resumed run asks for it
    assert SampleOrder(counts, seed, window).locate(p) == order.locate(p)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_reads_every_sample_once(world):
    parts = [evaluation_positions(11, 3, rank, world) for rank in range(world)]
    assert sorted(p for part in parts for batch in part for p in batch) == list(range(11))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_come_in_order_whatever_the_workers(dataset, collate, workers):
    positions = [range(i, i + 2) for i in range(0, 22, 2)]  # two epochs
    source = reader(dataset, seed=3, window=2)
    expected = [source.load(p) for p in range(22)]
    batches = list(Batches(source, positions, collate, workers))
    assert [k for b in batches for k in b["keys"]] == [s.key for s in expected]
    assert sorted(s.key for s in expected[:11]) == sorted(s.key for s in expected[11:])
    frames = torch.cat([b["frames"] for b in batches])
    assert frames.dtype == torch.uint8 and frames.shape == (22, FRAMES, 3, SIDE, SIDE)
    assert np.array_equal(frames.numpy(), np.stack([s.frames for s in expected]))
    assert all(b["bad"] == [] and b["positions"] <= b["input_ids"].numel() for b in batches)


def test_the_ranks_of_a_node_share_its_cores(dataset, collate, monkeypatch):
    source, positions = reader(dataset), [range(i, i + 1) for i in range(22)]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    for ranks, asked, started in (("1", 16, 16), ("8", 16, 2), ("8", 1, 1), ("32", 4, 1), ("32", 0, 0)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert Batches(source, positions, collate, asked)._workers == started


def test_captions_take_turns_over_the_epochs(dataset):
    source = reader(dataset)
    shown = [s.caption for s in map(source.load, range(33)) if s.key == "v0"]
    assert shown == ["0번", "영 번", "0번"]


def test_both_stores_show_the_same_frames(source, tmp_path):
    loaded = {}
    for store in ("frames", "video"):
        pack(source, tmp_path / store, store=store, num_frames=FRAMES, image_size=SIDE, progress=False)
        samples = map(reader(ShardIndex.open(tmp_path / store)).load, range(11))
        loaded[store] = {s.key: s.frames.astype(int) for s in samples}
    for key, frames in loaded["video"].items():
        assert np.abs(frames - loaded["frames"][key]).mean() < 4, key  # JPEG at quality 95


def test_a_damaged_sample_is_replaced_and_reported(dataset, collate, tmp_path):
    shutil.copytree(dataset.root, tmp_path / "copy")
    copy = ShardIndex.open(tmp_path / "copy")
    source = reader(copy)
    row = source.order.row(source.dataset, "train", 5)
    with (tmp_path / "copy" / f"train/{row.shard:06d}.tar").open("r+b") as file:
        file.seek(row.members[0].offset + 100)
        file.write(b"damage")
    sample = source.load(5)
    (record,) = sample.bad
    assert record["key"] == row.key != sample.key and record["position"] == 5
    assert "crc32" in record["reason"]
    assert sample.key == reader(dataset).load((5 + 7919) % 11).key  # replaced by position
    (batch,) = Batches(source, [range(4, 7)], collate, 0)
    assert batch["bad"] == [record] and len(batch["keys"]) == 3


@pytest.mark.parametrize(
    "name, data, reason",
    [
        ("json", b'{"captions": []}', "captions is not a list"),
        ("json", b'["x"]', "cannot be read"),
        ("json", '{"captions": ["가"], "prompt": 5}'.encode(), "prompt is not a text"),
        ("0.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 28\n", "frame 0: cannot identify"),
        ("0.jpg", None, f"{FRAMES - 1} frames, not {FRAMES}"),
        ("mp4", None, "0 videos instead of one"),
        ("mp4", b"v=0\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n", "cannot be "),
    ],
)
def test_a_sample_that_is_not_what_a_store_contains_is_replaced(dataset, collate, monkeypatch, name, data, reason):
    """Its checksums are right: somebody else packed it."""
    source = reader(dataset)
    row = source.row(0)
    if not any(member.ext == name for member in row.members):
        pytest.skip("the other store's")
    read = ShardIndex.read

    def other(index, asked):
        members = read(index, asked)
        if asked.key != row.key:
            return members
        return {k: v for k, v in {**members, name: data}.items() if v is not None}

    monkeypatch.setattr(ShardIndex, "read", other)
    (batch,) = Batches(source, [range(3)], collate, 0)
    (record,) = batch["bad"]
    assert record["key"] == row.key and reason in record["reason"]
    assert len(batch["keys"]) == 3 and row.key != batch["keys"][0]


def test_a_deleted_shard_is_named(dataset, tmp_path):
    shutil.copytree(dataset.root, tmp_path / "copy")
    source = reader(ShardIndex.open(tmp_path / "copy"))
    for tar in (tmp_path / "copy").rglob("*.tar"):
        tar.unlink()
    with pytest.raises(SampleError, match=r"16 samples in a row.*\.tar.*No such file"):
        source.load(0)


def test_frames_of_another_size_or_number_are_refused(source, tmp_path):
    pack(source, tmp_path / "out", store="frames", num_frames=FRAMES, image_size=SIDE, progress=False)
    index = ShardIndex.open(tmp_path / "out")
    with pytest.raises(InputError, match=r"num_frames 4, but the experiment needs 8"):
        SampleReader(Dataset([index]), "train", 8, SIDE)
    with pytest.raises(InputError, match=r"image_size 28, but the experiment needs 336"):
        SampleReader(Dataset([index]), "train", FRAMES, 336)


def test_the_prompt_of_a_sample_is_used(tmp_path, collate):
    write_video(tmp_path / "a.mp4")
    manifest = write_manifest(
        tmp_path / "m.jsonl",
        [{"video": "a.mp4", "caption": "가", "prompt": "누구?"}, {"video": "a.mp4", "id": "b", "caption": "가"}],
    )
    pack(manifest, tmp_path / "out", progress=False)
    source = reader(ShardIndex.open(tmp_path / "out"), shuffle=False)
    assert [source.load(p).prompt for p in (0, 1)] == ["누구?", None]
    assert json.dumps(source.load(0).captions, ensure_ascii=False) == '["가"]'


def test_what_cannot_be_read_at_all_travels_as_a_failure(dataset, collate, tmp_path):
    shutil.copytree(dataset.root, tmp_path / "copy")
    source = reader(ShardIndex.open(tmp_path / "copy"))
    for tar in (tmp_path / "copy").rglob("*.tar"):
        tar.unlink()
    for workers in (0, 1):
        (batch,) = Batches(source, [range(2)], collate, workers)
        assert "16 samples in a row" in batch["failure"] and ".tar" in batch["failure"]


@pytest.mark.parametrize("damage", ["deleted", "cut in a header", "cut in a member", "flipped", "replaced"])
def test_a_shard_damaged_during_the_run_is_replaced_and_named(dataset, collate, tmp_path, damage):
    """Another shard stands in; the ledger names shard, key and what is wrong."""
    shutil.copytree(dataset.root, tmp_path / "copy")
    source = reader(ShardIndex.open(tmp_path / "copy"))
    row = source.order.row(source.dataset, "train", 0)
    tar = tmp_path / "copy" / f"train/{row.shard:06d}.tar"
    data = tar.read_bytes()
    tar.unlink()  # also where an old file is still open
    first = row.members[0]
    if damage == "cut in a header":
        tar.write_bytes(data[: first.offset - 100])
    elif damage == "cut in a member":
        tar.write_bytes(data[: first.offset + first.size // 2])
    elif damage == "flipped":
        at = first.offset + first.size // 2
        tar.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    elif damage == "replaced":
        other = next(p for p in sorted((tmp_path / "copy").rglob("*.tar")))
        tar.write_bytes(other.read_bytes())
    sample = source.load(0)
    assert {record["shard"] for record in sample.bad} == {row.shard}
    assert sample.bad[0]["key"] == row.key and f"train/{row.shard:06d}.tar" in sample.bad[0]["reason"]
    assert sample.key != row.key


def test_shards_from_elsewhere_are_never_executed_nor_written(dataset, tmp_path):
    """Members with pickles' extensions are bytes like any other; paths that lead out are refused."""
    shutil.copytree(dataset.root, tmp_path / "copy")
    path = tmp_path / "copy" / "dataset.json"
    meta = json.loads(path.read_text())
    for evil in ("../../x/000000.tar", "/etc/passwd"):
        entry = {**meta["shards"][0], "path": evil}
        path.write_text(json.dumps({**meta, "shards": [entry, *meta["shards"][1:]]}))
        with pytest.raises(InputError, match="is not one that vlmds writes"):
            ShardIndex.open(tmp_path / "copy")
    path.write_text(json.dumps({**meta, "shards": [{**meta["shards"][0], "split": "../x", "path": "../x/000000.tar"}]}))
    with pytest.raises(InputError, match="is not one that vlmds writes"):
        ShardIndex.open(tmp_path / "copy")
    path.write_text(json.dumps({**meta, "shards": [{**meta["shards"][0], "sha256": "../x"}]}))
    with pytest.raises(InputError, match="'../x' for its sha256"):
        ShardIndex.open(tmp_path / "copy")
    path.write_text(json.dumps(meta))
    source = reader(ShardIndex.open(tmp_path / "copy"))
    row = source.order.row(source.dataset, "train", 0)
    index = source.dataset.parts[0]
    evil = tuple(replace(member, ext="pyd" if member.ext != "json" else "json") for member in row.members)
    opened = []
    before = set(tmp_path.rglob("*"))
    unpickle, pickle.loads = pickle.loads, lambda *a, **k: opened.append(a)
    try:
        members = index.read(replace(row, members=evil))
    finally:
        pickle.loads = unpickle
    assert set(members) == {"json", "pyd"} and not opened
    assert set(tmp_path.rglob("*")) == before


def test_the_sample_of_a_stuck_reader_is_reported(frames_store, collate, tmp_path):
    """A reader process at a FIFO that nobody writes to; then it is killed, as for lack of memory."""
    shutil.copytree(frames_store.root, tmp_path / "copy")
    index = ShardIndex.open(tmp_path / "copy")
    source = reader(index)
    row = source.order.row(source.dataset, "train", 0)
    tar = tmp_path / "copy" / f"train/{row.shard:06d}.tar"
    tar.unlink()
    os.mkfifo(tar)
    batches = Batches(source, [range(2)], collate, 1)
    reading = iter(batches)
    seen = []

    def kill():
        deadline = time.monotonic() + 60
        while not batches.in_progress() and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append(batches.in_progress())
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RuntimeError, match=f"reader process died.*has been reading sample {row.key} "):
        next(reading)
    killer.join()
    assert seen[0].startswith(f"reader 0 has been reading sample {row.key} (position 0) for ")


def test_readers_outlive_signals_to_the_whole_job(dataset, collate):
    source = reader(dataset)
    reading = iter(Batches(source, [range(i, i + 1) for i in range(9)], collate, 1))
    keys = list(next(reading)["keys"])
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        for child in multiprocessing.active_children():
            os.kill(child.pid, number)
    keys += [key for batch in reading for key in batch["keys"]]
    assert keys == [source.load(p).key for p in range(9)]
