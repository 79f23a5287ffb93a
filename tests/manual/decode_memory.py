"""The memory of a reader and its child process while they decode many videos.

    python -m tests.manual.decode_memory [DECODES]     (default 10000)

The child is not replaced meanwhile, as it would be after some thousands of videos, and gives all
that it frees back to the kernel: what glibc keeps otherwise may be 30 MB more or less.
"""

import math
import os
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

from tests.clips import cut_video, write_video
from vlmds.errors import SampleError
from vlmds.video import pool
from vlmds.video.pool import FrameDecoder

MOST = 400.0  # bytes a decode, over thousands; a leaked reply has 6 kB
GIVE_BACK = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "4096",
    "MALLOC_MMAP_MAX_": "1000000",
    "MALLOC_TRIM_THRESHOLD_": "4096",
}


def growth(folder: Path, decodes: int, warm_up: int) -> dict[str, float]:
    """Resident bytes that each decode adds to the child and to the parent, after `warm_up` decodes.

    Takes turns with a file that decord decodes, one that PyAV does, and one that is refused.
    """
    plain = write_video(folder / "plain.mp4", frames=8)
    cut = cut_video(write_video(folder / "gops.mp4", frames=20, **{"x264-params": "keyint=8"}), folder / "cut.mp4", 0.5)
    contents = [plain.read_bytes(), cut.read_bytes(), plain.read_bytes()[:500]]
    decoder = FrameDecoder(60.0)

    def repeat(times: int) -> dict[str, int]:
        for i in range(times):
            try:
                # Only the parts of the reply that are read are resident.
                decoder.frames(contents[i % 3], num_frames=2, image_size=32).max()
            except SampleError:
                assert i % 3 == 2
        return {"child": resident(decoder.pid), "parent": resident(os.getpid())}

    try:
        with patch.object(pool, "LIFETIME", math.inf), patch.dict(os.environ, GIVE_BACK):
            before, after = repeat(warm_up), repeat(decodes)
    finally:
        decoder.close()
    return {who: (after[who] - before[who]) / decodes for who in before}


def resident(pid: int) -> int:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as name:
        found = growth(Path(name), count, 300)
    for who, size in found.items():
        print(f"{who}: {size:+.1f} bytes a decode, {size * count / 1e6:+.2f} MB over {count} decodes")
    return 1 if max(found.values()) > MOST else 0


if __name__ == "__main__":
    sys.exit(main())
