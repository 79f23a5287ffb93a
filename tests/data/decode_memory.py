"""Whether decoding many videos makes the reader's child process grow.

    python -m tests.data.decode_memory [DECODES]     (default 10000)
"""

import sys
import tempfile
from pathlib import Path

from tests.data.conftest import cut_video, write_video

from vlmds.data.decode_child import FrameDecoder
from vlmds.errors import SampleError


def growth(folder: Path, decodes: int, warm_up: int) -> tuple[int, int]:
    """Resident bytes of the child after `warm_up` decodes, and after `decodes` more.

    Alternates files that decord and PyAV decode, and one that is refused.
    """
    plain = write_video(folder / "plain.mp4", frames=20, width=160, height=120)
    cut = cut_video(write_video(folder / "gops.mp4", frames=20, **{"x264-params": "keyint=8"}),
                    folder / "cut.mp4", 0.5)
    contents = [plain.read_bytes(), cut.read_bytes(), plain.read_bytes()[:500]]
    decoder = FrameDecoder(60.0)

    def repeat(times: int) -> int:
        for i in range(times):
            try:
                decoder.frames(contents[i % 3], num_frames=4, image_size=64)
            except SampleError:
                assert i % 3 == 2
        return resident(decoder.pid)

    try:
        return repeat(warm_up), repeat(decodes)
    finally:
        decoder.close()


def resident(pid: int) -> int:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines()
               if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as name:
        before, after = growth(Path(name), count, 300)
    print(f"{count} decodes: {before / 1e6:.1f} MB resident before, {after / 1e6:.1f} MB after")
