"""The index of a packed dataset: look-up, damage, memory."""

import errno
import gc
import json
import multiprocessing
import os
import pickle
import shutil
from types import SimpleNamespace

import pytest

from tests.clips import write_manifest
from vlmds.data.index import ShardIndex
from vlmds.data.shard_reader import CACHED_SHARDS
from vlmds.errors import InputError, SampleError
from vlmds.packing.pack import pack


@pytest.fixture(scope="module")
def packed(tmp_path_factory, videos):
    out = tmp_path_factory.mktemp("packed")
    pack(videos / "manifest.jsonl", out, shard_size=1, num_frames=2, progress=False)
    return out


@pytest.fixture
def dataset(tmp_path, packed):
    return shutil.copytree(packed, tmp_path / "dataset")


def keys(index, split="train"):
    return [index.row(split, s, i).key for s, shard in enumerate(index.shards(split)) for i in range(shard.count)]


def test_rows_are_found_by_position(packed):
    index = ShardIndex.open(packed)
    assert index.splits == ["train", "val"] and index.store == "video"
    assert (index.count("train"), index.count("val")) == (6, 1)
    assert keys(index) == [f"v{i}" for i in range(6)] and keys(index, "val") == ["e0"]
    assert index.fingerprint == json.loads((packed / "dataset.json").read_text())["index_sha256"]
    with pytest.raises(IndexError):
        index.row("train", 0, 1)
    with pytest.raises(InputError, match="no split 'test'; it has train, val"):
        index.shards("test")


def damage(path, at=600):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda d: (d / "dataset.json").unlink(), "dataset.json: No such file"),
        (lambda d: (d / "dataset.json").write_text("{"), "dataset.json: damaged"),
        (lambda d: (d / "dataset.json").write_text('{"format": "x"}'), "not a vlmds dataset"),
        (lambda d: (d / "dataset.json").write_text('{"format": "vlmds", "version": 9}'), "version 9"),
        (lambda d: (d / "index.parquet").unlink(), "index.parquet: missing"),
        (lambda d: damage(d / "index.parquet"), "index.parquet: damaged"),
    ],
)
def test_a_damaged_dataset_is_refused_at_start(dataset, break_it, message):
    break_it(dataset)
    with pytest.raises(InputError, match=message) as error:
        ShardIndex.open(dataset).verify_index()
    assert str(dataset) in str(error.value) and "\n" not in str(error.value)


def test_an_index_that_another_machine_has_replaced_is_not_called_damaged(packed, monkeypatch):
    """On NFS, where the open file is gone with the old one."""

    def gone(*_, **__):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    index = ShardIndex.open(packed)
    monkeypatch.setattr(index, "_index", SimpleNamespace(read_row_group=gone))
    with pytest.raises(InputError, match="not the one that was opened; .*: start again"):
        index.row("train", 0, 0)


def test_a_damaged_page_of_the_index_is_never_used(dataset):
    """Opening checks the footer, reading a row its pages."""
    size = (dataset / "index.parquet").stat().st_size
    refused = 0
    for at in range(40, size, 61):
        damage(dataset / "index.parquet", at)
        try:
            index = ShardIndex.open(dataset)
            rows = [index.row("train", shard, 0) for shard in range(len(index.shards("train")))]
            assert all(row.key.startswith("v") for row in rows)
        except InputError as error:
            refused += 1
            assert "index.parquet: damaged" in str(error)
        damage(dataset / "index.parquet", at)
    assert refused > 0


@pytest.mark.parametrize("same_footer", [False, True])
def test_an_index_that_is_replaced_after_opening_is_never_used(tmp_path, videos, same_footer):
    rows = [json.loads(line) for line in (videos / "manifest.jsonl").read_text().splitlines()]
    for row in rows:
        row["video"] = str(videos / row["video"])
    out = tmp_path / "out"
    options = {"shard_size": 1, "num_frames": 2, "progress": False}
    pack(write_manifest(tmp_path / "m1.jsonl", rows[:1] + rows[-1:]), out, **options)
    opened = ShardIndex.open(out)
    pack(write_manifest(tmp_path / "m2.jsonl", rows), out, append=True, **options)
    if same_footer:  # an index that contradicts its dataset.json
        opened.meta["index_footer_sha256"] = ShardIndex.open(out).meta["index_footer_sha256"]
    message = "is not where dataset.json says" if same_footer else "not the one that was opened"
    with pytest.raises(InputError, match=f"index.parquet: .*{message}"):
        opened.row("val", 0, 0)
    assert ShardIndex.open(out).row("val", 0, 0).key == "e0"


def test_damaged_shards_are_named(dataset):
    index = ShardIndex.open(dataset)
    shards = index.shards("train")
    index.verify(shards, "sha256")
    damage(dataset / "train/000001.tar")
    index.verify(shards, "size")
    with pytest.raises(InputError, match="train/000001.tar: damaged, its sha256"):
        index.verify(shards, "sha256")
    with (dataset / "train/000002.tar").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(InputError, match="train/000002.tar: damaged, it has 1000 bytes"):
        index.verify(shards[2:])
    (dataset / "train/000003.tar").unlink()
    with pytest.raises(InputError, match="train/000003.tar: missing"):
        index.verify(shards[3:])


def test_damaged_members_are_named(dataset):
    index = ShardIndex.open(dataset)
    rows = [index.row("train", s, 0) for s in range(4)]
    damage(dataset / "train/000001.tar", at=rows[1].members[1].offset)
    with (dataset / "train/000002.tar").open("r+b") as file:
        file.truncate(rows[2].members[1].offset + 10)
    (dataset / "train/000003.tar").unlink()
    assert set(index.read(rows[0])) == {"json", "mp4"}
    for row, message in zip(
        rows[1:], ("v1.mp4: damaged", "v2.mp4: the shard ends before it", "v3.json: No such file"), strict=True
    ):
        with pytest.raises(SampleError, match=f"train/00000{row.shard}.tar: {message}"):
            index.read(row)


def _read_all(index, queue):
    queue.put([sorted(index.read(index.row("train", s, 0))) for s in range(6)])


def test_use_after_a_pickle_and_in_a_fork(packed):
    index = ShardIndex.open(packed)
    index.read(index.row("train", 0, 0))
    copy = pickle.loads(pickle.dumps(index))
    assert keys(copy) == keys(index) and copy.fingerprint == index.fingerprint
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_read_all, args=(index, queue))
    process.start()
    assert queue.get(timeout=120) == [["json", "mp4"]] * 6
    process.join()
    assert index.read(index.row("train", 1, 0))


def test_open_files_are_bounded(dataset):
    """Many shards: the same index rows under other shard numbers."""
    index = ShardIndex.open(dataset)
    row = index.row("train", 0, 0)
    many = [type(row)(**vars(row) | {"shard": 100 + i}) for i in range(2 * CACHED_SHARDS)]
    for other in many:
        os.link(dataset / "train/000000.tar", dataset / f"train/{other.shard:06d}.tar")
    before = len(os.listdir("/proc/self/fd"))
    for other in many:
        index.read(other)
    assert len(os.listdir("/proc/self/fd")) - before <= CACHED_SHARDS
    del index
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before
