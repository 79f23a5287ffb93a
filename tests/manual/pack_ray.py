"""Packing on a Ray cluster of its own, whose worker is killed while it packs the first shard."""

import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import ray

from vlmds.packing.pack import pack


def kill_first_worker(out: Path) -> None:
    """SIGKILL the process whose temporary file shows first."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        for path in out.glob("*/.*.tmp"):
            pid = int(path.name.removesuffix(".tmp").rpartition("~")[2])
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            print(f"killed the worker with {path.name}", flush=True)
            return
        time.sleep(0.0005)


def main(manifest: str, out: str, options: str) -> None:
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            _temp_dir=folder,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=100 << 20,
        )
        try:
            killer = threading.Thread(target=kill_first_worker, args=(Path(out),), daemon=True)
            killer.start()
            pack(manifest, out, engine="ray", **json.loads(options))
            killer.join(5)
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
