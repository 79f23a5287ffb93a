"""Packing that is killed repeatedly at random moments, compared with an uninterrupted run.

python -m tests.manual.pack_kills --clips 220 --kills 20
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.clips import write_manifest, write_video

TIMEOUT = 300


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def start(manifest: Path, out: Path, options: dict) -> subprocess.Popen:
    code = (
        "import json, sys; from vlmds.packing.pack import pack; "
        "options = json.loads(sys.argv[3]); "
        "options |= {'task': tuple(options['task'])} if 'task' in options else {}; "
        "pack(sys.argv[1], sys.argv[2], **options)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(manifest), str(out), json.dumps(options)], start_new_session=True
    )


def kill(run: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()


def pack_with_kills(manifest: Path, out: Path, options: dict, kills: int, seed: int, seconds: float = 2.5) -> int:
    """Pack, with a SIGKILL in each of the first `kills` starts: every other one at a random moment
    of so many seconds, the others as soon as one more shard is finished. How many were in time."""
    draw = random.Random(seed)
    in_time = 0
    for number in range(kills):
        finished = len(list(out.glob("*/*.json")))
        run = start(manifest, out, options)
        end = time.monotonic() + (draw.uniform(0.2, 1.0) * seconds if number % 2 else TIMEOUT)
        while run.poll() is None and time.monotonic() < end:
            if number % 2 == 0 and len(list(out.glob("*/*.json"))) > finished:
                break
            time.sleep(0.001)
        in_time += run.poll() is None
        kill(run)
    to_the_end(manifest, out, options)
    return in_time


def to_the_end(manifest: Path, out: Path, options: dict) -> None:
    run = start(manifest, out, options)
    try:
        assert run.wait(TIMEOUT) == 0
    finally:
        kill(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--clips", type=int, default=220)
    parser.add_argument("--kills", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pack-kills-") as place:
        folder = Path(place)
        rows = []
        for i in range(args.clips):
            write_video(folder / f"v{i}.mp4", frames=60 + i % 40, width=320, height=240)
            rows.append({"video": f"v{i}.mp4", "caption": f"{i}번"})
        manifest = write_manifest(folder / "m.jsonl", rows)
        options = {"shard_size": 8, "progress": False, "workers": 1}
        began = time.monotonic()
        run = start(manifest, folder / "clean", options)
        assert run.wait(TIMEOUT) == 0
        seconds = time.monotonic() - began
        clean = contents(folder / "clean")
        print(f"{args.clips} clips, {len(clean)} files, {seconds:.1f} s undisturbed", flush=True)

        in_time = pack_with_kills(manifest, folder / "killed", options, args.kills, 0, 0.5 + 1.5 * seconds / args.kills)
        assert contents(folder / "killed") == clean
        print(f"{in_time} of {args.kills} kills in time: byte-identical", flush=True)

        draw = random.Random(1)
        runs = [None, None]
        for _ in range(args.kills):
            for task in (0, 1):
                if runs[task] is None or runs[task].poll() is not None:
                    runs[task] = start(manifest, folder / "tasks", {**options, "task": [task, 2]})
            time.sleep(draw.uniform(0.3, 1.5))
            kill(runs[draw.randrange(2)])
        for task in (0, 1):
            kill(runs[task])
            to_the_end(manifest, folder / "tasks", {**options, "task": [task, 2]})
        to_the_end(manifest, folder / "tasks", {**options, "finish": True})
        assert contents(folder / "tasks") == clean
        print(f"two tasks on one folder, {args.kills} kills: byte-identical", flush=True)

        run = subprocess.run(
            [sys.executable, "-m", "tests.manual.pack_ray", str(manifest), str(folder / "ray"), json.dumps(options)],
            timeout=TIMEOUT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "killed the worker" in run.stdout and contents(folder / "ray") == clean
        print("Ray, a worker killed: byte-identical")


if __name__ == "__main__":
    main()
