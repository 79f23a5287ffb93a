"""Packing: the bytes of a dataset, and bad videos."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from tests.clips import write_manifest, write_video
from vlmds.cli import main, packing
from vlmds.console.progress import Phase
from vlmds.data.index import ShardIndex
from vlmds.errors import InputError
from vlmds.files import machine, replacing
from vlmds.packing.local import counting
from vlmds.packing.pack import pack
from vlmds.video.decode import decode_frames
from vlmds.video.decode_work import VideoReply, VideoRequest
from vlmds.video.fit import resize_frames
from vlmds.video.pool import DecodePool
from vlmds.video.probe import probe

SMALL = {"shard_size": 2, "num_frames": 3, "image_size": 32, "progress": False}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def children(*parents: int) -> dict[int, int]:
    """Process ids of decoding processes of this process, or of `parents`, and their parents'."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if b"vlmds.video.child" in (stat.parent / "cmdline").read_bytes():
                parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
                if parent in (os.getpid(), *parents):
                    found[int(stat.parent.name)] = parent
        except OSError:
            pass  # it has ended
    return found


def eventually(condition) -> bool:
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("store", ["video", "frames"])
def test_output_is_the_same_for_any_number_of_workers_and_any_folder(tmp_path, videos, store):
    summary = pack(videos / "manifest.jsonl", tmp_path / "a", store=store, workers=1, **SMALL)
    elsewhere = shutil.copytree(videos, tmp_path / "elsewhere")
    pack(elsewhere / "manifest.jsonl", tmp_path / "b", store=store, workers=2, **SMALL)

    found = contents(tmp_path / "a")
    assert found == contents(tmp_path / "b")
    assert sorted(found) == [
        "dataset.json",
        "duplicates.jsonl",
        "index.parquet",
        "ledger.jsonl",
        "near_duplicates.jsonl",
        *(f"train/{i:06d}.{ext}" for i in range(3) for ext in ("json", "tar")),
        "val/000000.json",
        "val/000000.tar",
    ]
    assert summary.counts == {"train": 6, "val": 1} and summary.packed == 7
    assert (summary.rejected, summary.shards, summary.kept_shards) == ({}, 4, 0)
    meta = json.loads(found["dataset.json"])
    assert meta["store"] == store and meta["counts"] == summary.counts
    assert meta["num_frames"] == (3 if store == "frames" else None)


@pytest.mark.parametrize("store", ["video", "frames"])
def test_webdataset_tar_and_index_agree(tmp_path, videos, store):
    pack(videos / "manifest.jsonl", tmp_path / "out", store=store, **SMALL)
    index = ShardIndex.open(tmp_path / "out")
    for split in index.splits:
        for position, shard in enumerate(index.shards(split)):
            path = index.root / shard.path
            rows = [index.row(split, position, i) for i in range(shard.count)]
            expected = {f"{row.key}.{ext}": data for row in rows for ext, data in index.read(row).items()}
            with tarfile.open(path) as tar:
                members = tar.getmembers()
                assert [m.name for m in members] == list(expected)
                assert all((m.mtime, m.uid, m.gid, m.mode) == (0, 0, 0, 0o644) for m in members)
                assert [m.offset_data for m in members] == [m.offset for row in rows for m in row.members]
                assert [tar.extractfile(m).read() for m in members] == list(expected.values())
            samples = list(wds.WebDataset(str(path), shardshuffle=False).decode("pil"))
            assert [s["__key__"] for s in samples] == [row.key for row in rows]
            assert all(
                set(s) - {"__key__", "__url__", "__local_path__"} == {m.ext for m in row.members}
                for s, row in zip(samples, rows, strict=True)
            )
            if store == "frames":
                assert samples[0]["0.jpg"].size == (32, 32)


def test_a_sample_has_the_original_bytes_and_its_facts(tmp_path, videos):
    pack(videos / "manifest.jsonl", tmp_path / "out", **SMALL)
    index = ShardIndex.open(tmp_path / "out")
    row = index.row("val", 0, 0)
    sample = index.read(row)
    assert sample["mkv"] == (videos / "e0.mkv").read_bytes()
    assert json.loads(sample["json"]) == {
        "id": "e0",
        "captions": ["하나", "둘"],
        "prompt": "무엇?",
        "source": "e0.mkv",
        "frames": 9,
        "fps": 10.0,
        "duration": 0.9,
        "width": 64,
        "height": 48,
        "codec": "h264",
        "rotation": 0,
        "timing": {
            "time_base": [1, 1000],
            "ticks": [0, [100, 8]],
            "keys": [0],
            "by_pts": True,
            "duration": 0.9,
            "cleared": True,
        },
    }
    assert "하나".encode() in sample["json"]
    assert (row.num_captions, row.frames, row.fps, row.decoder) == (2, 9, 10.0, "decord")
    assert row.start is None and row.status == "ok"


def test_frames_are_those_of_the_span(tmp_path):
    path = write_video(tmp_path / "v.mp4", width=96, height=64)
    rows = [{"video": "v.mp4", "caption": "글", "start": 1.0, "end": 2.0}]
    pack(write_manifest(tmp_path / "m.jsonl", rows), tmp_path / "out", store="frames", **SMALL)
    index = ShardIndex.open(tmp_path / "out")
    described = json.loads(index.read(index.row("train", 0, 0))["json"])
    assert described["timestamps"] == [1.1, 1.5, 1.8]
    info = probe(path)
    frames = resize_frames(decode_frames(path, info, 3, 1.0, 2.0), 32)
    (sample,) = wds.WebDataset(str(tmp_path / "out/train/000000.tar"), shardshuffle=False).decode("rgb8")
    packed = np.stack([sample[f"{i}.jpg"] for i in range(3)]).transpose(0, 3, 1, 2)
    assert np.abs(packed.astype(int) - frames).mean() < 8  # JPEG
    assert [m.ext for m in index.row("train", 0, 0).members] == ["0.jpg", "1.jpg", "2.jpg", "json"]


def test_bad_videos_go_to_the_ledger_and_the_rest_is_packed(tmp_path, videos):
    for i in (0, 1, 2):
        shutil.copy(videos / f"v{i}.mp4", tmp_path)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "text.mp4").write_text("not a video")
    whole = (videos / "v3.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    os.mkfifo(tmp_path / "hang.mp4")  # reading it blocks for ever
    names = ["v0", "none", "empty", "folder", "v1", "text", "half", "hang", "v2"]
    rows = [{"video": f"{name}.mp4", "caption": "글"} for name in names]
    rows += [
        {"video": "v0.mp4", "caption": ""},
        {"video": "v1.mp4", "caption": "또"},
        {"video": "v1.mp4", "caption": "끝", "start": 60},
        {"video": "no-such-protocol://x/y.mp4", "caption": "글"},
    ]
    manifest = write_manifest(tmp_path / "m.jsonl", rows)

    summary = pack(manifest, tmp_path / "out", deadline=4.0, workers=2, **SMALL)

    ledger = [json.loads(line) for line in (tmp_path / "out/ledger.jsonl").open(encoding="utf-8")]
    reasons = {entry["row"]: entry["reason"].split(":")[0] for entry in ledger}
    assert list(reasons) == sorted(reasons)
    assert reasons == {
        2: "file not found",
        3: "file is empty",
        4: "file cannot be read",
        6: "cannot be read",
        7: "cannot be read",
        8: "decoder hung",
        10: "empty caption",
        11: "duplicate id",
        12: "start past the end",
        13: "file cannot be read",
    }
    assert ledger[5] == {
        "row": 8,
        "id": "hang",
        "video": "hang.mp4",
        "split": "train",
        "shard": 3,
        "reason": "decoder hung: stopped after 4 s",
    }
    assert summary.counts == {"train": 3} and sum(summary.rejected.values()) == 10
    # A shard keeps its rows' places, and one without any sample has a marker and no tar.
    index = ShardIndex.open(tmp_path / "out")
    assert [(s.shard, s.count) for s in index.shards("train")] == [(0, 1), (2, 1), (4, 1)]
    assert (tmp_path / "out/train/000001.json").exists()
    assert not (tmp_path / "out/train/000001.tar").exists()
    assert index.meta["rejected"] == 10
    assert not children()


def test_damage_is_found_when_packing(tmp_path):
    path = write_video(tmp_path / "v.mp4", width=320, height=240)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = bytes(400)
    (tmp_path / "damaged.mp4").write_bytes(data)
    manifest = write_manifest(
        tmp_path / "m.jsonl", [{"video": "v.mp4", "caption": "글"}, {"video": "damaged.mp4", "caption": "글"}]
    )
    for store in ("video", "frames"):
        summary = pack(manifest, tmp_path / store, store=store, progress=False)
        assert summary.rejected == {"cannot be decoded": 1}
    assert pack(manifest, tmp_path / "trusting", verify=False, progress=False).packed == 2


def test_nothing_packed_is_an_error_that_can_be_fixed(tmp_path, videos):
    manifest = write_manifest(tmp_path / "m.jsonl", [{"video": "v0.mp4", "caption": "글"}])
    with pytest.raises(InputError, match="nothing was packed; most common reason: file not found"):
        pack(manifest, tmp_path / "out", **SMALL)
    assert (tmp_path / "out/ledger.jsonl").read_text().count("\n") == 1
    shutil.copy(videos / "v0.mp4", tmp_path)
    assert pack(manifest, tmp_path / "out", **SMALL).packed == 1


def test_missing_shards_are_packed_again_and_the_others_kept(tmp_path, videos):
    def again():
        return pack(videos / "manifest.jsonl", out, **SMALL)

    out = tmp_path / "out"
    again()
    clean = contents(out)
    assert again().kept_shards == 4
    (out / "val/000000.json").unlink()
    (out / "train/000001.tar").unlink()
    with (out / "train/000002.tar").open("ab") as file:
        file.write(b"x")
    dead = f"{machine()}~999999999.tmp"
    (out / f"train/.000001.tar.{dead}").write_bytes(b"left by a killed run")
    kept = (out / "train/000000.tar").stat()
    assert again().kept_shards == 1
    assert contents(out) == clean
    assert (out / "train/000000.tar").stat().st_mtime_ns == kept.st_mtime_ns


def test_rejected_rows_are_tried_again_when_asked(tmp_path, videos):
    """Only their shards; the result is that of a packing that found all files whole."""
    manifest = shutil.copytree(videos, tmp_path / "videos") / "manifest.jsonl"
    pack(manifest, tmp_path / "whole", **SMALL)
    whole = (manifest.parent / "v1.mp4").read_bytes()
    (manifest.parent / "v1.mp4").write_bytes(whole[:200])
    out = tmp_path / "out"
    assert sum(pack(manifest, out, **SMALL).rejected.values()) == 1
    (manifest.parent / "v1.mp4").write_bytes(whole)
    again = pack(manifest, out, **SMALL)
    assert sum(again.rejected.values()) == 1 and again.kept_shards == again.shards
    retried = pack(manifest, out, retry=True, **SMALL)
    assert not retried.rejected and retried.kept_shards == retried.shards - 1
    assert contents(out) == contents(tmp_path / "whole")


def test_another_manifest_or_other_options_are_refused(tmp_path, videos):
    out = tmp_path / "out"
    pack(videos / "manifest.jsonl", out, **SMALL)
    clean = contents(out)
    fewer = videos / "fewer.jsonl"
    fewer.write_text("".join((videos / "manifest.jsonl").open().readlines()[:4]))
    for manifest, options in (
        ("manifest.jsonl", SMALL | {"store": "frames"}),
        ("manifest.jsonl", SMALL | {"shard_size": 3}),
        ("fewer.jsonl", SMALL),
    ):
        with pytest.raises(InputError, match="from another manifest or with other options"):
            pack(videos / manifest, out, **options)
    assert contents(out) == clean


@pytest.mark.parametrize(
    "options, key",
    [
        ({"store": "tar"}, "store"),
        ({"num_frames": 0}, "num_frames"),
        ({"quality": 101}, "quality"),
        ({"shard_size": 0}, "shard_size"),
        ({"val_fraction": 1.5}, "val_fraction"),
    ],
)
def test_bad_options_are_refused_by_name(tmp_path, videos, options, key):
    with pytest.raises(InputError, match=key):
        pack(videos / "manifest.jsonl", tmp_path / "out", **options)


def test_a_crashed_decoder_costs_one_sample(tmp_path, videos):
    fifo = tmp_path / "x.mp4"
    os.mkfifo(fifo)
    options = (None, None, "video", 2, 32, 95, True)
    with DecodePool(1, deadline=60.0) as pool:
        replies = pool.map(VideoRequest(str(p), *options) for p in (videos / "v0.mp4", fifo, videos / "v1.mp4"))
        assert next(replies).reason is None
        writer = os.open(fifo, os.O_RDWR)
        (child,) = children()
        assert eventually(lambda: any(os.path.realpath(p) == str(fifo) for p in Path(f"/proc/{child}/fd").iterdir()))
        os.kill(child, signal.SIGSEGV)
        assert next(replies).reason == "decoder crashed: signal 11"
        assert next(replies).members["mp4"] == (videos / "v1.mp4").read_bytes()
        os.close(writer)


@pytest.mark.parametrize("how, deadline", [(signal.SIGINT, 60.0), (signal.SIGKILL, 4.0)])
def test_a_stopped_run_leaves_no_process_and_goes_on_to_the_same_bytes(tmp_path, videos, how, deadline):
    pack(videos / "manifest.jsonl", tmp_path / "clean", **SMALL)
    folder = shutil.copytree(videos, tmp_path / "in")
    (folder / "v5.mp4").unlink()
    os.mkfifo(folder / "v5.mp4")
    out = tmp_path / "out"
    code = f"""from vlmds.packing.pack import pack
pack({str(folder / "manifest.jsonl")!r}, {str(out)!r}, workers=1, deadline={deadline}, **{SMALL})"""
    run = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    writer = os.open(folder / "v5.mp4", os.O_WRONLY)  # waits until v5 is read
    assert eventually((out / "train/000001.json").exists)
    decoding = children(run.pid)
    assert decoding
    run.send_signal(how)
    run.wait()
    # After a SIGKILL, at the deadline.
    assert eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in decoding))
    os.close(writer)
    assert (out / "train/000001.json").exists() and not (out / "train/000002.json").exists()

    shutil.copy(videos / "v5.mp4", tmp_path / "v5.mp4")
    (tmp_path / "v5.mp4").replace(folder / "v5.mp4")
    assert pack(folder / "manifest.jsonl", out, **SMALL).kept_shards == 2
    assert contents(out) == contents(tmp_path / "clean")


def test_the_command_reports_a_stop_and_a_bad_place_in_one_line(tmp_path, videos, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    words = ["pack", str(videos / "manifest.jsonl"), str(tmp_path / "file" / "out")]
    assert main(words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("vlmds: ") and str(tmp_path / "file") in line and "is not a folder" in line
    monkeypatch.setattr(packing, "_pack", interrupted)
    assert main(words) == 3
    assert capsys.readouterr().err.splitlines()[-1].startswith("vlmds: stopped; finished shards are kept")


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_a_full_disk_is_reported_with_the_place(tmp_path):
    """A write that fails names no file by itself."""
    with pytest.raises(OSError) as error, replacing(tmp_path / "shard.tar"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(tmp_path / "shard.tar")


def test_a_log_gets_lines(tmp_path, videos, capsys, monkeypatch):
    monkeypatch.setattr("vlmds.console.progress.QUIET_SECONDS", 1e-3)
    pack(videos / "manifest.jsonl", tmp_path / "quiet", **{**SMALL, "progress": False})
    assert capsys.readouterr().err == ""
    pack(videos / "manifest.jsonl", tmp_path / "out", **{**SMALL, "progress": True})
    lines = capsys.readouterr().err.splitlines()
    [first, *_, last] = [line for line in lines if line.startswith("vlmds: packing: ")]
    assert re.match(r"vlmds: packing: \d+ of \d+ videos, ", first)
    assert re.match(r"vlmds: packing: 7 videos in \d+ s$", last), last


def test_rejected_videos_are_counted_while_packing():
    shown = Phase("packing", 3, "videos")
    assert len(list(counting([VideoReply(), VideoReply("file not found"), VideoReply()], shown))) == 3
    assert (shown.done, shown.note) == (3, "1 rejected")


def test_packing_imports_no_torch():
    code = "import sys, vlmds.packing.pack, vlmds.data.index; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_shared_videos(tmp_path, shared_videos):
    summary = pack(shared_videos / "captions.jsonl", tmp_path / "real", progress=False)
    assert summary.counts == {"train": 16} and not summary.rejected
    odd = [{"video": str(p), "caption": "글"} for p in sorted(shared_videos.glob("odd/*"))]
    summary = pack(write_manifest(tmp_path / "m.jsonl", odd), tmp_path / "odd", progress=False)
    ledger = [json.loads(line) for line in (tmp_path / "odd/ledger.jsonl").open()]
    assert [(entry["id"], entry["reason"].split(":")[0]) for entry in ledger] == [("corrupted", "cannot be decoded")]
