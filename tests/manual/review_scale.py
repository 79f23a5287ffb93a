"""Seconds until `vlmds review` shows its first pair, of many clips and runs, at its first start and when continued.

python -m tests.manual.review_scale FOLDER [CLIPS [RUNS [PAIRS]]]     (default 5000 8 2000)

FOLDER gets a video store (CLIPS samples of a few small videos) and RUNS evaluations with captions drawn at random; they
are kept for the next time. Elapsed time includes the start of Python; processor time is the server's.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import httpx
import psutil

from tests.clips import write_manifest, write_video
from tests.review.conftest import captions_of, plant
from tests.review.server import Server
from vlmds.packing.pack import pack

VIDEOS = 16


def make(folder: Path, clips: int, runs: int) -> tuple[Path, list[Path]]:
    """(dataset, evaluated runs)"""
    data, ids = folder / "data", range(clips)
    if not data.is_dir():
        (folder / "videos").mkdir(parents=True, exist_ok=True)
        for video in range(VIDEOS):
            write_video(folder / "videos" / f"v{video}.mp4", frames=30)
        rows = [
            {"video": f"v{i % VIDEOS}.mp4", "caption": f"{i}번 영상입니다.", "id": f"c{i:03d}", "split": "val"}
            for i in ids
        ]
        pack(write_manifest(folder / "videos" / "manifest.jsonl", rows), data)
    folders = [folder / f"run{number}" for number in range(runs)]
    for number, run in enumerate(folders):
        if not run.is_dir():
            plant(run, captions_of(number, ids), data, source=lambda clip: f"v{int(clip[1:]) % VIDEOS}.mp4")
    return data, folders


def opening(reviews: Path, *words: str) -> tuple[float, float]:
    """(seconds until the first pair, processor time of the server until then)"""
    started = time.perf_counter()
    server = Server(reviews, *words)
    try:
        found = httpx.post(f"{server.url}/api/next", json={"reviewer": "a"}, timeout=60).json()
        elapsed = time.perf_counter() - started
        assert found["pair"]
        return elapsed, sum(psutil.Process(server.process.pid).cpu_times()[:2])
    finally:
        server.end()


def main() -> None:
    folder = Path(sys.argv[1])
    given = [int(number) for number in sys.argv[2:5]]
    clips, runs, pairs = [*given, *(5000, 8, 2000)[len(given) :]]
    data, folders = make(folder, clips, runs)
    reviews = folder / "reviews"
    shutil.rmtree(reviews, ignore_errors=True)
    words = [*map(str, folders), "--data", str(data), "--pairs", str(pairs)]
    for name, found in (("first", opening(reviews, *words)), ("continued", opening(reviews))):
        print(f"{clips:,} clips × {runs} runs, {name}: {found[0]:.1f} s, of which {found[1]:.1f} s of processor time")


if __name__ == "__main__":
    main()
