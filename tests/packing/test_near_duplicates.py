"""Near-duplicates: which pairs are reported, where, and that the search finds them without comparing all."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.clips import scene, write_frames, write_manifest
from tests.packing.test_pack import contents
from tests.packing.test_report import Page
from vlmds.cli import main
from vlmds.data.index import ShardIndex
from vlmds.packing import near_duplicates
from vlmds.packing.near_duplicates import Hashed, candidates, near_duplicate_lines
from vlmds.packing.pack import pack
from vlmds.packing.report import write_report

FAST = {"shard_size": 3, "image_size": 32, "progress": False}


def smaller(frames: np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(frame).resize((80, 48))) for frame in frames])


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two clips with changed copies in val, four others, two of them black, and spans of one clip."""
    folder = tmp_path_factory.mktemp("clips")
    write_frames(folder / "a.mp4", scene(1))
    write_frames(folder / "a-copy.mp4", smaller(scene(1)), crf=32)
    write_frames(folder / "b.mp4", scene(2))
    write_frames(folder / "b-mirror.mp4", scene(2)[1:, :, ::-1], crf=28)
    write_frames(folder / "c.mp4", scene(3))
    write_frames(folder / "d.mp4", scene(4))
    write_frames(folder / "black.mp4", np.zeros((10, 96, 160, 3), np.uint8))
    write_frames(folder / "black2.mp4", np.zeros((12, 96, 160, 3), np.uint8))
    rows = [
        {"video": f"{name}.mp4", "caption": "글", "split": "val" if name in ("a-copy", "d", "black2") else "train"}
        for name in ("a", "b", "c", "black", "b-mirror", "a-copy", "d", "black2")
    ]
    rows += [{"video": "c.mp4", "id": f"c{i}", "caption": "글", "start": i / 2, "end": i / 2 + 1.5} for i in range(2)]
    write_manifest(folder / "m.jsonl", rows)
    return folder


def pairs(out) -> list[dict]:
    return [json.loads(line) for line in (out / "near_duplicates.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("store", ["video", "frames"])
def test_copies_are_reported_leaks_first_and_nothing_else(clips, tmp_path, store):
    summary = pack(clips / "m.jsonl", tmp_path, store=store, **FAST)
    leak, other = pairs(tmp_path)
    assert (leak["samples"], leak["sources"], leak["leak"]) == (
        ["train/a", "val/a-copy"],
        ["a.mp4", "a-copy.mp4"],
        True,
    )
    assert (other["samples"], other["leak"]) == (["train/b", "train/b-mirror"], False)
    assert (summary.near_duplicates, summary.leaks) == (2, 1)
    recorded = json.loads((tmp_path / "dataset.json").read_text())["near_duplicates"]
    assert recorded == {"pairs": 2, "leaks": 1, "compared": 8, "plain": 2, "unhashed": 0, "complete": True}


def test_the_summary_and_the_report_name_them(clips, tmp_path, capsys):
    assert main(["pack", str(clips / "m.jsonl"), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "near-duplicates: 2 pairs of source videos with nearly the same frames, 1 of them in train and" in printed
    assert re.search(r"\n  train/a ~ val/a-copy \(\d+ of 63 bits differ, leak\)\n  train/b ~ train/b-mirror", printed)
    assert "WARNING: 1 pair of near-duplicates in train and another split" in printed and "(column split)" in printed
    page = (tmp_path / "out" / "pack_report.html").read_text(encoding="utf-8")
    assert "train/a ~ val/a-copy" in Page(page).text and "WARNING: 1 pair" in Page(page).text
    korean = Page(page, "ko").text
    assert (
        "유사 중복: 서로 다른 원본 영상 2쌍" in korean and "경고: 유사 중복 1쌍" in korean and "WARNING" not in korean
    )


def test_workers_tasks_and_appending_find_the_same(clips, tmp_path):
    manifest = clips / "m.jsonl"
    pack(manifest, tmp_path / "one", workers=1, **FAST)
    pack(manifest, tmp_path / "two", workers=2, **FAST)
    for task in (1, 0):
        pack(manifest, tmp_path / "tasks", task=(task, 2), **FAST)
    pack(manifest, tmp_path / "tasks", finish=True, **FAST)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "tasks")

    lines = manifest.read_text(encoding="utf-8").splitlines(keepends=True)
    first = shutil.copytree(clips, tmp_path / "in") / "first.jsonl"
    first.write_text("".join(lines[:4]), encoding="utf-8")
    assert pack(first, tmp_path / "grown", **FAST).near_duplicates == 0
    for name in ("a", "b", "c"):  # what is packed is not read again
        (tmp_path / "in" / f"{name}.mp4").write_bytes(b"")
    first.write_text("".join(lines[:8]), encoding="utf-8")
    summary = pack(first, tmp_path / "grown", append=True, **FAST)
    assert (summary.near_duplicates, summary.leaks) == (2, 1) and pairs(tmp_path / "grown") == pairs(tmp_path / "one")


def test_without_decoding_nothing_is_compared_and_the_samples_are_the_same(clips, tmp_path):
    pack(clips / "m.jsonl", tmp_path / "out", verify=False, **FAST)
    assert not pairs(tmp_path / "out")
    (line,) = near_duplicate_lines(tmp_path / "out")
    assert "not searched among 10 samples packed with --no-verify" in line
    assert "샘플: 10개" in near_duplicate_lines(tmp_path / "out", korean=True)[0]
    pack(clips / "m.jsonl", tmp_path / "checked", **FAST)
    tars = [{k: v for k, v in contents(tmp_path / name).items() if k.endswith(".tar")} for name in ("out", "checked")]
    assert tars[0] == tars[1]


def test_a_dataset_of_an_earlier_version_is_read_and_appended_to(clips, tmp_path):
    """Its markers have no hashes, and its dataset.json no count."""
    lines = (clips / "m.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    manifest, out = shutil.copytree(clips, tmp_path / "in") / "m.jsonl", tmp_path / "out"
    manifest.write_text("".join(lines[:3]), encoding="utf-8")
    pack(manifest, out, **FAST)
    for path in out.glob("*/*.json"):
        marker = json.loads(path.read_text(encoding="utf-8"))
        for row in marker["rows"]:
            del row["frame_hashes"], row["source"]
        path.write_text(json.dumps(marker), encoding="utf-8")
    meta = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
    del meta["near_duplicates"]
    (out / "dataset.json").write_text(json.dumps(meta), encoding="utf-8")
    (out / "near_duplicates.jsonl").unlink()
    assert ShardIndex.open(out).count("train") == 3 and not near_duplicate_lines(out)
    write_report(out)

    manifest.write_text("".join(lines), encoding="utf-8")
    assert pack(manifest, out, append=True, **FAST).near_duplicates == 0  # both originals are old
    assert "among 3 samples packed" in near_duplicate_lines(out)[0]


def random_hashes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 63, count, np.uint64) << np.uint64(1)


def described(hashes: np.ndarray) -> str:
    return "".join(f"{int(value):016x}" for value in hashes)


def test_planted_copies_are_found_among_many(monkeypatch):
    rng, hashed = np.random.default_rng(1), Hashed()
    clips = random_hashes(8 * 5000).reshape(-1, 8)
    for i, hashes in enumerate(clips):
        hashed.add("train", {"key": f"{i}", "source": f"{i}.mp4", "frame_hashes": described(hashes)})
    for i in range(0, 5000, 50):
        flips = [
            np.bitwise_or.reduce(np.uint64(1) << rng.choice(np.arange(1, 64, dtype=np.uint64), 3)) for _ in range(8)
        ]
        hashed.add(
            "val", {"key": f"{i}", "source": f"copy{i}.mp4", "frame_hashes": described(clips[i] ^ np.array(flips))}
        )
    found, complete = hashed.find()
    assert complete and {pair.samples for pair in found} == {(f"train/{i}", f"val/{i}") for i in range(0, 5000, 50)}
    assert all(pair.leak and 0 < pair.distance <= 3 for pair in found)
    monkeypatch.setattr(near_duplicates, "SLICE", 999)
    monkeypatch.setattr(near_duplicates, "CHUNK", 7)
    assert hashed.find() == (found, True)


def test_a_frame_that_all_clips_share_makes_no_pair_and_no_quadratic_search():
    """Such as a studio's logo."""
    hashed, count = Hashed(), 1000
    clips = random_hashes(4 * count).reshape(-1, 4)
    clips[:, 0] = clips[0, 0]
    for i, hashes in enumerate(clips):
        hashed.add("train", {"key": f"{i}", "source": f"{i}.mp4", "frame_hashes": described(hashes)})
    assert hashed.find() == ([], True)
    numbers = np.arange(count)
    first, second, _ = candidates(clips.ravel(), numbers.repeat(4), numbers, numbers)
    assert count - 1 <= len(first) <= near_duplicates.NEIGHBOURS * count and (first < second).all()


def test_a_search_that_is_ended_early_says_so(monkeypatch, clips, tmp_path):
    monkeypatch.setattr(near_duplicates, "MOST_CANDIDATES", 0)
    pack(clips / "m.jsonl", tmp_path, **FAST)
    assert "at least" in near_duplicate_lines(tmp_path)[0] and "이상" in near_duplicate_lines(tmp_path, korean=True)[0]


def test_nothing_to_compare():
    assert Hashed().find() == ([], True)
