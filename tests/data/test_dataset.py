"""Blends, remote datasets and their cache."""

import multiprocessing
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.clips import write_manifest, write_video
from tests.training.forked import fork_context
from vlmds.cli import main
from vlmds.data.blend import BLOCK, Blend, shares
from vlmds.data.cache import ShardCache
from vlmds.data.dataset import Dataset, DatasetOrder, open_dataset
from vlmds.data.index import ShardIndex
from vlmds.data.loader import SampleReader
from vlmds.errors import InputError, SampleError
from vlmds.experiments.schema import BlendPart, DataConfig
from vlmds.files import as_path
from vlmds.packing.pack import pack


def packed(folder: Path, name: str, count: int, val: int = 0) -> Path:
    rows = []
    folder = folder / name
    folder.mkdir()
    for i in range(count):
        write_video(folder / f"{name}{i}.mp4", frames=6 + i)
        rows.append({"video": f"{name}{i}.mp4", "caption": f"{i}번", "split": "val" if i < val else "train"})
    pack(
        write_manifest(folder / "m.jsonl", rows),
        folder / "out",
        store="frames",
        num_frames=2,
        image_size=28,
        shard_size=3,
        progress=False,
    )
    return folder / "out"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return packed(folder, "a", 8, val=2), packed(folder, "b", 5, val=1)


@settings(max_examples=100)
@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), seed=st.integers(0, 2**40))
def test_a_blend_is_exact_over_a_block_and_near_it_anywhere(weights, seed):
    counts = shares(weights)
    assert counts.sum() == BLOCK and counts.min() >= 1
    exact = np.asarray(weights) / np.sum(weights) * BLOCK
    assert np.abs(counts - exact).max() <= len(weights)
    blend = Blend(weights, seed)
    start = BLOCK - 300
    located = [blend.locate(p) for p in range(start, BLOCK + 300)]
    for place in (0, 299, 300, 431, 599):  # whatever was asked before
        assert Blend(weights, seed).locate(start + place) == located[place]
    for part, share in enumerate(counts):
        places = [place for found, place in located if found == part]
        assert places == list(range(places[0], places[0] + len(places))) if places else True
        # Less than one away at each end in time, and in places by what the other parts are.
        assert abs(len(places) - 600 * share / BLOCK) < 2 * max(1, len(weights) - 1)


def test_a_blend_reads_each_part_once_before_any_twice(two):
    a, b = map(ShardIndex.open, two)
    dataset = Dataset([a, b], [3.0, 1.0])
    assert dataset.count("train") == 6 + 4 and dataset.count("val") == 3
    order = DatasetOrder(dataset, "train", seed=7)
    places = [order.locate(p) for p in range(4 * 10)]
    rows = [order.row(dataset, "train", p) for p in range(4 * 10)]
    assert sum(place.part == 0 for place in places) == pytest.approx(30, abs=2)
    for part, size in ((0, 6), (1, 4)):
        keys = [row.key for row, place in zip(rows, places) if place.part == part]
        assert all(key.startswith("ab"[part]) for key in keys)
        for epoch in range(len(keys) // size):
            assert len(set(keys[epoch * size : (epoch + 1) * size])) == size
        assert places[[p.part for p in places].index(part)].epoch == 0
    val = DatasetOrder(dataset, "val", shuffle=False)
    assert [val.row(dataset, "val", p).key for p in range(3)] == ["a0", "a1", "b0"]
    reader = SampleReader(dataset, "train", 2, 28, seed=7)
    assert [reader.load(p).key for p in range(10)] == [row.key for row in rows[:10]]
    assert Dataset([a, b], [3.0, 1.0]).fingerprint == dataset.fingerprint
    assert len({Dataset([a, b], [1.0, 1.0]).fingerprint, dataset.fingerprint, a.fingerprint}) == 3


def test_a_part_that_is_not_there_is_refused(two, tmp_path):
    parts = [BlendPart(path=str(path)) for path in (two[0], tmp_path / "gone")]
    with pytest.raises(InputError, match=r"data.blend.1.path: .*gone does not exist"):
        open_dataset(DataConfig(blend=parts))


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({}, False),  # a video store, named second
        ({}, True),
        ({"store": "frames", "num_frames": 4, "image_size": 28}, False),
        ({"store": "frames", "num_frames": 2, "image_size": 20}, False),
    ],
)
def test_the_command_named_makes_parts_fit_that_do_not(two, tmp_path, options, first):
    """Pasted into a shell; only where the manifest lies is for the user to fill in."""
    folder = tmp_path / "my clips"
    folder.mkdir()
    write_video(folder / "v.mp4")
    manifest = write_manifest(folder / "m.jsonl", [{"video": "v.mp4", "caption": "가"}])
    pack(manifest, folder / "out", progress=False, **options)
    paths = [str(folder / "out"), str(two[0])] if first else [str(two[0]), str(folder / "out")]

    def blend():
        return open_dataset(DataConfig(blend=[BlendPart(path=path) for path in paths]))

    with pytest.raises(InputError) as caught:
        blend()
    message = str(caught.value)
    assert message.startswith("data.blend: ") and "\n" not in message
    assert all(path in message for path in paths), message
    assert bool(options) != ("a video store" in message), message
    command, new, number = re.search(r": (vlmds pack .*); then name (.*) in data\.blend\.(\d)\.path$", message).groups()
    assert main([*shlex.split(command.replace("MANIFEST", shlex.quote(str(manifest))))[1:], "--no-report"]) == 0
    paths[int(number)] = new
    assert blend().store == "frames"


def test_every_part_of_a_blend_must_have_what_is_trained_on(two, tmp_path):
    other = packed(tmp_path, "c", 2, val=2)
    dataset = Dataset([ShardIndex.open(two[0]), ShardIndex.open(other)], [1.0, 9.0])
    with pytest.raises(InputError, match=f"data.blend: no split 'train' in {other}"):
        DatasetOrder(dataset, "train", seed=1)
    only = Dataset([ShardIndex.open(two[1]), ShardIndex.open(other)], [1.0, 1.0])
    assert len(DatasetOrder(only, "val", shuffle=False)) == 3


@pytest.fixture
def remote(two):
    """Dataset a at a URL."""
    fs = fsspec.filesystem("memory")
    for path in two[0].rglob("*"):
        if path.is_file():
            fs.pipe(f"/bucket/{path.relative_to(two[0])}", path.read_bytes())
    yield "memory://bucket"
    fs.rm("/bucket", recursive=True)


def all_frames(root, cache=None):
    index = ShardIndex.open(root, cache)
    index.verify_index()
    index.verify(index.shards("train"), "sha256")
    reader = SampleReader(Dataset([index]), "train", 2, 28)
    return [reader.load(p).frames for p in range(len(reader))]


def test_a_remote_dataset_reads_like_a_local_one(two, remote, tmp_path):
    expected = all_frames(two[0])
    for cache in (None, ShardCache(tmp_path / "cache", 1e9)):
        assert np.array_equal(all_frames(remote, cache), expected)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2
    assert all_frames(two[0].as_uri())[0].shape == expected[0].shape  # file://


def test_the_cache_keeps_to_its_limit_and_drops_what_was_used_longest_ago(remote, tmp_path):
    index = ShardIndex.open(remote)
    first, second = index.shards("train")
    third = index.shards("val")[0]
    cache = ShardCache(tmp_path / "cache", first.bytes + second.bytes)

    def fetch(shard):
        return cache.fetch(as_path(f"{remote}/{shard.path}"), shard.sha256, shard.bytes)

    for shard in (first, second):
        os.close(fetch(shard))
    paths = [tmp_path / "cache" / f"{shard.sha256}.tar" for shard in (first, second)]
    os.utime(paths[0], (1, 1))
    os.utime(paths[1], (2, 2))
    os.close(fetch(first))  # now used last
    (tmp_path / "cache" / f"{'0' * 64}.tmp").write_bytes(b"x" * 9999)  # of a killed download
    held = ShardIndex.open(remote, cache)
    os.close(fetch(third))
    assert paths[0].is_file() and not paths[1].is_file()
    assert not list((tmp_path / "cache").glob("*.tmp"))
    paths[0].write_bytes(paths[0].read_bytes()[:1000])  # cut short by a crash
    os.close(fetch(first))
    assert paths[0].stat().st_size == first.bytes
    assert sum(p.stat().st_size for p in (tmp_path / "cache").glob("*.tar")) <= cache.limit
    assert held.read(held.row("train", 1, 0))  # fetched again


def test_a_shard_that_arrives_damaged_is_not_kept(remote, tmp_path):
    fs = fsspec.filesystem("memory")
    index = ShardIndex.open(remote, ShardCache(tmp_path / "cache", 1e9))
    shard = index.shards("train")[0]
    data = bytearray(fs.cat(f"/bucket/{shard.path}"))
    data[700] ^= 1
    fs.pipe(f"/bucket/{shard.path}", bytes(data))
    with pytest.raises(SampleError, match="its sha256 is not the one in dataset.json"):
        index.read(index.row("train", 0, 0))
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"]


def test_shards_that_have_left_the_cache_take_no_room(remote, tmp_path):
    index = ShardIndex.open(remote)
    largest = max(shard.bytes for shard in index.shards("train"))
    index = ShardIndex.open(remote, ShardCache(tmp_path / "cache", largest))
    for _ in range(2):
        for shard in (0, 1):
            assert index.read(index.row("train", shard, 0))
    links = [
        os.readlink(f"/proc/self/fd/{name}")
        for name in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{name}")
    ]
    assert not [link for link in links if str(tmp_path) in link and "deleted" in link]
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1


def test_a_cached_shard_that_goes_bad_is_fetched_again(remote, tmp_path):
    index = ShardIndex.open(remote, ShardCache(tmp_path / "cache", 1e9))
    row = index.row("train", 0, 1)
    expected = index.read(row)
    copy = tmp_path / "cache" / f"{index.shards('train')[0].sha256}.tar"
    good = copy.read_bytes()
    data = bytearray(good)
    data[row.members[1].offset + 9] ^= 1
    copy.write_bytes(data)
    assert index.read(row) == expected and copy.read_bytes() == good
    wrong = replace(row.members[0], crc32=row.members[0].crc32 ^ 1)  # the index, not the copy
    with pytest.raises(SampleError, match="its crc32 is not the index's"):
        index.read(replace(row, members=(wrong,)))
    assert copy.read_bytes() == good


def test_a_cache_that_cannot_be_written_costs_speed_only(two, remote, tmp_path, capsys):
    expected = all_frames(two[0])
    assert np.array_equal(all_frames(remote, ShardCache(tmp_path / "small", 100)), expected)
    assert capsys.readouterr().err.count("larger than data.cache_gb allows") == 1


class AsyncFiles(AsyncFileSystem):
    """Local files behind the machinery of http, s3 and gs, which does not survive a fork."""

    protocol = "asyncfiles"
    local = LocalFileSystem()

    async def _info(self, path, **_):
        return {**self.local.info(path), "name": path}

    async def _cat_file(self, path, start=None, end=None, **_):
        return self.local.cat_file(path, start, end)

    def _open(self, path, mode="rb", **_):
        return AsyncFile(self, path, mode, size=self.local.size(path))


class AsyncFile(AbstractBufferedFile):
    def _fetch_range(self, start, end):
        return self.fs.cat_file(self.path, start=start, end=end)


def _read_forked(index, queue):
    queue.put([_read_or_say(index, shard) for shard in (0, 1)])


def _read_or_say(index, shard):
    try:
        return index.read(index.row("train", shard, 1))["json"]
    except (SampleError, InputError) as error:
        return str(error)


@pytest.mark.parametrize("cached", [False, True])
def test_a_remote_dataset_is_read_on_in_a_fork(two, tmp_path, cached):
    fsspec.register_implementation("asyncfiles", AsyncFiles, clobber=True)
    cache = ShardCache(tmp_path / "cache", 1e9) if cached else None
    index = ShardIndex.open(f"asyncfiles://{two[0]}", cache)
    expected = [_read_or_say(ShardIndex.open(two[0]), shard) for shard in (0, 1)]
    assert _read_or_say(index, 0) == expected[0]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_read_forked, args=(index, queue))
    child.start()
    try:
        assert queue.get(timeout=120) == expected
    finally:
        child.kill()
        child.join()
    assert _read_or_say(index, 1) == expected[1]


def _fetch_in_a_process(root, folder, queue):
    index = ShardIndex.open(root, ShardCache(folder, 1e9))
    queue.put([index.read(index.row("train", shard, 0))["json"] for shard in (0, 1)])


def test_many_processes_may_share_a_cache(two, tmp_path):
    context = fork_context()
    queue = context.Queue()
    workers = [
        context.Process(target=_fetch_in_a_process, args=(two[0].as_uri(), tmp_path / "cache", queue)) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    try:
        results = [queue.get(timeout=120) for _ in workers]
    finally:
        for worker in workers:
            worker.join(10)
            worker.kill()
    assert results[0] == results[1] == results[2]
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2
