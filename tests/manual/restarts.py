"""`--max-restarts` over two nodes, which are two network namespaces of this machine.

`python -m tests.manual.restarts FOLDER` (as root) trains across two network namespaces under
launch/torchrun.py, kills the rank of either node and cuts the link for a while; each time the ranks
must start again by themselves and end like an uninterrupted run. Addresses exist in the
namespaces only, the host's name means nothing in them, and where faketime is installed node 1's
clock is a day behind.
"""

import argparse
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests import tiny
from tests.distributed.namespaces import (
    GRACE_SECONDS,
    TIMEOUT_MINUTES,
    Node,
    codes,
    cut_silently,
    final_reports,
    launched,
    restore_packets,
    same_weights,
    two_nodes,
)
from tests.manual.ssh import rank_of
from tests.training.fixtures import make_shards
from tests.training.launch import START_SECONDS, arguments, metrics, train, until_lines

CUT_SECONDS = 20  # longer than the run's own timeout, so that ranks end on both sides


def kill(rank: int) -> Callable[[tuple[Node, Node]], None]:
    return lambda nodes: os.kill(rank_of(nodes[rank]), signal.SIGKILL)


def cut_for_a_while(nodes: tuple[Node, Node]) -> None:
    cut_silently(nodes)
    time.sleep(CUT_SECONDS)
    restore_packets(nodes)


STRIKES = {
    "kill -9 of the rank on node 1": kill(1),
    "kill -9 of the rank on node 0": kill(0),
    f"every packet dropped silently for {CUT_SECONDS} s": cut_for_a_while,
}


def scenario(folder: Path, models: Path, shards: Path, calm: Path, strikes: tuple[str, ...], *settings: str) -> None:
    """Strike each in a run of its own, printed; an AssertionError or a TimeoutExpired where it goes
    wrong.

    Args:
        calm: the undisturbed run, on two ranks with the same settings.

    Raises:
        Unavailable: see :func:`two_nodes`.
    """
    settings = (*settings, f"training.timeout_minutes={TIMEOUT_MINUTES}")
    clock = "-1d" if shutil.which("faketime") else None
    for number, what in enumerate(strikes):
        run = folder / f"struck{number}"
        with (
            two_nodes() as nodes,
            launched(nodes, "restarts", run, 29505, arguments(models, shards, run, *settings), clock) as processes,
        ):
            until_lines(run, 5, *processes)
            STRIKES[what](nodes)
            began = time.monotonic()
            ends = codes(processes, START_SECONDS + GRACE_SECONDS)
        record = json.loads((run / "run.json").read_text())
        sizes = [start["world_size"] for start in record["starts"]]
        print(
            f"{what}, after 5 lines of metrics: exit codes {ends[0]} and {ends[1]} "
            f"{time.monotonic() - began:.1f} s later, ranks at each start: {sizes}"
        )
        print("\n".join(final_reports(run)))
        assert ends == [0, 0] and sizes == [2, 2]
        assert metrics(run) == metrics(calm)
        assert same_weights(run, calm)
    print("metrics and weights equal the undisturbed run's, bit for bit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()

    args.folder.mkdir(parents=True)
    models, shards = tiny.make_models(args.folder / "models"), make_shards(args.folder / "data")
    train(2, *arguments(models, shards, args.folder / "calm"))
    scenario(args.folder, models, shards, args.folder / "calm", tuple(STRIKES))
