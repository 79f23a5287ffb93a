"""Ranks of two simulated machines that download into one cache or two: FOLDER "shared|separate".

The first rank works for longer than the job's timeout, and reports. Who worked is written to FOLDER.
"""

import sys
import time
from pathlib import Path

import torch.distributed as dist

from vlmds.distributed import ranks

TIMEOUT = 15.0  # seconds without a report, and for the ranks to join


def main(folder: Path, kind: str) -> None:
    ranks.REPORT_SECONDS = 0.2
    ranks.init_distributed(TIMEOUT / 60)
    rank = dist.get_rank()
    ranks.machine = lambda: f"machine {rank}"
    cache = folder / ("cache" if kind == "shared" else f"cache-{rank}")

    def work(report) -> None:
        (folder / f"worked-{rank}").touch()
        end = time.monotonic() + (1.2 * TIMEOUT if rank == 0 else 0)
        while time.monotonic() < end:
            report("downloading")
            time.sleep(0.1)

    ranks.on_each_cache(work, cache)
    assert (folder / "worked-0").exists()
    assert not list(cache.glob(".vlmds*"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
