"""Hashes of weight files, computed once while a file stays unchanged."""

import hashlib
import json
import multiprocessing
import os
import time

import pytest

from vlmds.errors import InputError
from vlmds.models import hashes
from vlmds.models.hashes import weight_sha256, weights_sha256


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache directory that remembers files of any size."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "SMALL", 0)
    # For the time of a file's inode, which cannot be set.
    monkeypatch.setattr(hashes, "RACY_SECONDS", 0)
    return tmp_path / "cache" / "vlmds" / "sha256"


@pytest.fixture
def read(monkeypatch):
    """The files that were really read, one after another."""
    found = []
    original = hashes.sha256_of

    def counted(path, advance):
        found.append(path.name)
        return original(path, advance)

    monkeypatch.setattr(hashes, "sha256_of", counted)
    return found


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights" * 1000)
    time.sleep(0.05)  # the kernel's clock of files goes in steps of up to 10 ms
    return path


def truth(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_that_stays_is_read_once(weights, read):
    assert weight_sha256(weights) == weight_sha256(weights) == truth(weights)
    assert read == [weights.name]


def test_a_file_that_changed_is_read_again(weights, read):
    weight_sha256(weights)
    before = weights.stat()
    with weights.open("r+b") as file:
        file.write(b"W")
    # Another content of the same size in the same inode, and the old time put back, as rsync does.
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weight_sha256(weights) == truth(weights)
    assert len(read) == 2


def test_another_file_under_the_name_is_read(weights, tmp_path, read):
    weight_sha256(weights)
    other = tmp_path / "other"
    other.write_bytes(b"WEIGHTS" * 1000)
    os.replace(other, weights)
    assert weight_sha256(weights) == truth(weights)
    assert len(read) == 2


def test_what_was_just_changed_is_not_remembered(weights, read, cache, monkeypatch):
    """It may change again within the granularity of its times."""
    monkeypatch.setattr(hashes, "RACY_SECONDS", 60)
    weight_sha256(weights)
    assert not cache.exists()
    weight_sha256(weights)
    assert len(read) == 2


def test_what_changes_while_it_is_read_is_not_remembered(weights, cache):
    def change(size):
        with weights.open("r+b") as file:
            file.write(b"W")

    weight_sha256(weights, change)
    assert not cache.exists()


def test_a_large_file_of_the_hub_cache_is_not_read(tmp_path, monkeypatch):
    """Its name says it. What is in it here would give something else."""
    name = hashlib.sha256(b"the real content").hexdigest()
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / name).write_bytes(b"never read")
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{name}")
    seen = []
    assert weight_sha256(snapshot / "model.safetensors", seen.append) == name
    assert seen == [len(b"never read")]


@pytest.mark.parametrize(
    "place, name",
    [
        ("blobs", hashlib.sha1(b"x").hexdigest()),  # a small file: kept by its git hash
        ("models", hashlib.sha256(b"x").hexdigest()),  # a link of somebody's own
    ],
)
def test_other_links_are_read(tmp_path, place, name):
    (tmp_path / place).mkdir()
    (tmp_path / place / name).write_bytes(b"content")
    (tmp_path / "model.safetensors").symlink_to(f"{place}/{name}")
    assert weight_sha256(tmp_path / "model.safetensors") == hashlib.sha256(b"content").hexdigest()


@pytest.mark.parametrize("damage", ["", "{}", "[]", "null", '{"state": 1', "\0"])
def test_a_damaged_memory_is_ignored_and_replaced(weights, cache, read, damage):
    weight_sha256(weights)
    (memo,) = cache.iterdir()
    memo.write_text(damage)
    assert weight_sha256(weights) == truth(weights)
    assert json.loads(memo.read_text())["sha256"] == truth(weights)
    assert len(read) == 2


def test_without_a_place_to_remember_it_is_read_each_time(weights, tmp_path, monkeypatch, read):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert weight_sha256(weights) == weight_sha256(weights) == truth(weights)
    assert len(read) == 2


def test_small_files_leave_nothing_in_the_cache(weights, cache, monkeypatch):
    monkeypatch.setattr(hashes, "SMALL", 16 << 20)
    assert weight_sha256(weights) == truth(weights)
    assert not cache.exists()


def _remember(files, start):
    start.wait()
    for _ in range(20):
        for file in files:
            weight_sha256(file)


def test_processes_that_remember_at_once_lose_nothing(tmp_path, cache, read):
    files = []
    for number in range(8):
        files.append(tmp_path / f"model-{number}.safetensors")
        files[-1].write_bytes(bytes([number]) * 1000)
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    processes = [context.Process(target=_remember, args=(files, start)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(list(cache.iterdir())) == 8  # and no temporary file
    assert weights_sha256({file.name: file for file in files}) == {file.name: truth(file) for file in files}
    assert read == []


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    missing = tmp_path / "model.safetensors"
    with pytest.raises(InputError, match=rf"^{missing}: cannot be read: No such file"):
        weights_sha256({"llm/model.safetensors": missing})


def test_the_default_is_the_user_s_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hashes.cache_folder() == tmp_path / ".cache" / "vlmds"
