"""`vlmds bench data`: packing against `tar`, loading against bare decoding, store against store.

All run on the same files: those of a manifest, or generated clips (360p, 10 s). Each figure is a
ratio to the baseline that its table names. The jobs of a table run in turns; the least time of each
counts.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import torch
import webdataset as wds

from vlmds.bench.measure import in_turns, save, table
from vlmds.data.dataset import Dataset
from vlmds.data.features import EXTENSION, encode_features
from vlmds.data.index import ShardIndex
from vlmds.data.loader import SampleReader
from vlmds.errors import InputError
from vlmds.packing.finish import finish_dataset
from vlmds.packing.manifest import ManifestRow, read_manifest
from vlmds.packing.pack import pack
from vlmds.packing.shards import Shard, write_shard
from vlmds.video.decode import decode_frames
from vlmds.video.decode_work import VideoReply
from vlmds.video.fit import FIT, RESIZERS, resize_frames
from vlmds.video.probe import probe
from vlmds.video.sampling import SAMPLER, kept_frames

FRAMES, SIDE = 8, 336
PACKED = 150e6  # bytes to pack: the videos are repeated in the manifest up to this size
VIDEO2DATASET = """\
import sys
from video2dataset import video2dataset

if __name__ == "__main__":
    table, out = sys.argv[1:]
    video2dataset(
        table, out, output_format="webdataset", caption_col="caption", config={
            "subsampling": {}, "storage": {
                "number_sample_per_shard": 256, "oom_shard_count": 6,
                "captions_are_subtitles": False},
            "reading": {"timeout": 60, "sampler": None, "yt_args": {
                "download_size": 360, "download_audio_rate": 44100, "yt_metadata_args": None}},
            "distribution": {"processes_count": CORES, "thread_count": CORES, "subjob_size": 1000,
                             "distributor": "multiprocessing"}})
"""
PATCHES, WIDTH = 576, 1024  # of CLIP-ViT-L/14-336's features


def bench_data(
    output: Path, manifest: Path | None = None, clips: int = 16, repeats: int = 3, video2dataset: str | None = None
) -> dict[str, dict[str, float]]:
    """Run it, print the tables, and write data.json to `output`.

    video2dataset: a Python that can import it, to pack with it too. Its requirements (torch 2.1)
    conflict with vlmds's.
    """
    with tempfile.TemporaryDirectory(prefix="vlmds-data-") as place:
        folder = Path(place)
        rows = read_manifest(manifest or make_clips(folder, clips)).rows
        size = sum(Path(row.video).stat().st_size for row in rows)
        print(f"{len(rows)} videos, {size / 1e6:.1f} MB")
        packing = _packing(folder, rows, repeats, video2dataset)
        loading = _loading(folder, rows, repeats)
    result = {"packing": _ratios(packing, "tar + sha256sum"), "loading, a sample": _ratios(loading, "bare decode")}
    for title, ratios in result.items():
        print(f"\n{title}:\n" + table([{"": name, "time": f"{ratio:.3g} x"} for name, ratio in ratios.items()]))
    print(save(output, "data", {"videos": len(rows), "bytes": size, "ratios": result}))
    return result


def make_clips(folder: Path, count: int) -> Path:
    """H.264 clips of 640 x 360, 10 s, 30 frames/s, with moving texture, and their manifest."""
    lines = []
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 255, (45, 80, 3), np.uint8)
        texture = np.tile(noise.repeat(8, 0).repeat(8, 1), (2, 2, 1))
        path = folder / f"clip{number}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=30, options={"crf": "12"})
            stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
            for i in range(300):
                x, y = 2 * i % 640, i % 360
                frame = av.VideoFrame.from_ndarray(
                    np.ascontiguousarray(texture[y : y + 360, x : x + 640]), format="rgb24"
                )
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        lines.append(f'{{"video": "{path.name}", "caption": "{number}번 영상"}}\n')
    (folder / "manifest.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "manifest.jsonl"


def _packing(folder: Path, rows: list[ManifestRow], repeats: int, video2dataset: str | None) -> dict[str, float]:
    """Seconds for PACKED bytes of videos."""
    out = folder / "out"
    size = sum(Path(row.video).stat().st_size for row in rows)
    rows = rows * max(1, round(PACKED / size))
    manifest = folder / "many.jsonl"
    manifest.write_text(
        "".join(json.dumps({"video": row.video, "id": str(i), "caption": "가"}) + "\n" for i, row in enumerate(rows)),
        encoding="utf-8",
    )

    def fresh(job: Callable[[Path], object]) -> Callable[[], None]:
        def run() -> None:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            job(out)
            os.sync()

        return run

    def tar(out: Path) -> None:
        # GNU tar's --files-from takes any number of names.
        names = "".join(f"{row.video}\n" for row in rows).encode()
        # A repeated file is stored again, not as a link.
        subprocess.run(
            ["tar", "-cf", str(out / "a.tar"), "-P", "--hard-dereference", "--files-from", "-"], input=names, check=True
        )
        subprocess.run(["sha256sum", str(out / "a.tar")], check=True, stdout=subprocess.DEVNULL)

    def shard_writer(out: Path) -> None:
        with wds.ShardWriter(str(out / "%06d.tar"), maxcount=256, verbose=0) as writer:
            for number, row in enumerate(rows):
                writer.write(
                    {"__key__": str(number), "mp4": Path(row.video).read_bytes(), "json": {"captions": row.captions}}
                )

    jobs = {
        "tar + sha256sum": fresh(tar),
        "webdataset ShardWriter (no checks)": fresh(shard_writer),
        "vlmds pack --no-verify": fresh(lambda out: pack(manifest, out, verify=False, progress=False)),
        "vlmds pack": fresh(lambda out: pack(manifest, out, progress=False)),
    }
    if video2dataset:
        jobs["video2dataset (no checks)"] = fresh(_video2dataset(folder, rows, video2dataset))
    return in_turns(jobs, repeats)


def _video2dataset(folder: Path, rows: list[ManifestRow], python: str) -> Callable[[Path], None]:
    """A job that packs local files as its users do: from a table, with a process for each core."""
    script, listed = folder / "pack_with_video2dataset.py", folder / "many.csv"
    script.write_text(VIDEO2DATASET.replace("CORES", str(len(os.sched_getaffinity(0)))))
    listed.write_text("url,caption\n" + "".join(f"{row.video},가\n" for row in rows), encoding="utf-8")

    def run(out: Path) -> None:
        subprocess.run(
            [python, str(script), str(listed), str(out / "made")],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"WANDB_MODE": "disabled"},
        )
        packed = 0  # counted here: it reports a failed shard as a success
        for path in out.rglob("*.tar"):
            with tarfile.open(path) as tar:
                packed += sum(name.endswith(".mp4") for name in tar.getnames())
        if packed != len(rows):
            raise InputError(f"{python}: video2dataset packed {packed} of {len(rows)} videos")

    return run


def _loading(folder: Path, rows: list[ManifestRow], repeats: int) -> dict:
    """Seconds for a sample, in one process with one thread."""
    manifest = folder / "load.jsonl"
    manifest.write_text("".join(f'{{"video": "{row.video}", "caption": "가"}}\n' for row in rows), encoding="utf-8")
    for store in ("video", "frames"):
        pack(manifest, folder / store, store=store, num_frames=FRAMES, image_size=SIDE, progress=False)
    _make_features(folder / "video", folder / "features")
    files = [Path(row.video).read_bytes() for row in rows]
    infos = [probe(data) for data in files]
    readers = {
        store: SampleReader(Dataset([ShardIndex.open(folder / store)]), "train", FRAMES, SIDE, shuffle=False)
        for store in ("video", "frames", "features")
    }

    def bare() -> None:
        for data, info in zip(files, infos):
            resize_frames(decode_frames(data, info, kept_frames(info.frames, FRAMES)), SIDE)

    def probed() -> None:
        for data in files:
            info = probe(data)
            resize_frames(decode_frames(data, info, kept_frames(info.frames, FRAMES)), SIDE)

    def plain() -> None:
        tars = sorted(str(p) for p in (folder / "video").rglob("*.tar"))
        for sample in wds.WebDataset(tars, shardshuffle=False):
            _decode_plainly(sample["mp4"])

    def load(store: str) -> Callable[[], None]:
        def run() -> None:
            for position in range(len(readers[store])):
                readers[store].load(position)

        return run

    baseline = {"plain webdataset (decord)": plain} if find_spec("decord") else {}
    seconds = in_turns(
        {
            "bare decode": bare,
            "bare probe and decode": probed,
            **baseline,
            "vlmds, video store": load("video"),
            "vlmds, frames store": load("frames"),
            "vlmds, features store": load("features"),
        },
        repeats,
    )
    return {name: value / len(rows) for name, value in seconds.items()}


def _decode_plainly(data: bytes) -> np.ndarray:
    """A straightforward pipeline: decord for any file, frames by number."""
    import io

    import decord

    reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
    count = len(reader)
    picks = [int((i + 0.5) * count / FRAMES) for i in range(FRAMES)]
    return resize_frames(reader.get_batch(picks).asnumpy(), SIDE)


def _make_features(source: Path, out: Path) -> None:
    """A features store of real size with random numbers, made without CLIP."""
    index = ShardIndex.open(source)
    features = torch.randn(FRAMES * PATCHES, WIDTH)
    shards = []
    for info in index.shards("train"):
        rows = [index.row("train", info.shard, i) for i in range(info.count)]
        shard = Shard(
            "train",
            info.shard,
            [ManifestRow(0, row.key, row.key, "", "", ["가"], None, None, "train", None) for row in rows],
            "",
        )
        write_shard(
            out,
            shard,
            (
                VideoReply(
                    None,
                    {
                        name: getattr(row, name)
                        for name in ("frames", "fps", "duration", "width", "height", "codec", "rotation", "decoder")
                    },
                    {EXTENSION: encode_features(features[: kept_frames(row.frames, FRAMES) * PATCHES])},
                )
                for row in rows
            ),
        )
        shards.append(replace(shard, rows=[]))
    finish_dataset(
        out,
        shards,
        [],
        {
            "store": "features",
            "sampler": SAMPLER,
            "resizer": RESIZERS[FIT],
            "num_frames": FRAMES,
            "image_size": SIDE,
            "quality": None,
            "shard_size": 256,
            "shard_bytes": None,
            "vision": {
                "model": "random",
                "fingerprint": "",
                "feature_layer": -1,
                "pool": 1,
                "patches": PATCHES,
                "width": WIDTH,
            },
        },
    )


def _ratios(seconds: dict[str, float], baseline: str) -> dict[str, float]:
    return {name: value / seconds[baseline] for name, value in seconds.items()}
