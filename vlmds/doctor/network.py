"""Measurements of `vlmds doctor` between nodes, by all ranks together: bandwidth and clocks."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from datetime import timedelta
from itertools import combinations

import torch
import torch.distributed as dist

from vlmds.distributed.deadline import finishes_within
from vlmds.distributed.ranks import gather
from vlmds.distributed.watchdog import doing

ROUNDS = 5
ALL_PAIRS = 8  # up to this many nodes all pairs are measured; with more, each node with the next only
GPU_BYTES, CPU_BYTES = 256 << 20, 16 << 20


@dataclass(frozen=True)
class Measure:
    """The bandwidth of one group of ranks.

    kind: "node", "pair" or "all". gb_per_s: bus bandwidth of an all-reduce in 10^9 bytes per second, as in
    nccl-tests: 2 (n - 1) / n times the tensor's bytes per second for n ranks. problem: why it could not be
    measured.
    """

    kind: str
    name: str
    gb_per_s: float = 0.0
    problem: str | None = None


def measure_links(nodes: list[int], names: list[str], device: torch.device, seconds: float) -> list[Measure]:
    """Measure all-reduce within each node, between the first ranks of each pair of nodes, and over all
    ranks, one after the other. All ranks call it and get the same result.

    Args:
        nodes: by rank, the number of its node.
        names: of the nodes.
        seconds: timeout of one collective.
    """
    members = [[r for r, n in enumerate(nodes) if n == node] for node in range(len(names))]
    plans = [("node", f"within {names[n]}", ranks) for n, ranks in enumerate(members) if len(ranks) > 1]
    pairs = list(combinations(range(len(names)), 2))
    if len(names) > ALL_PAIRS:
        pairs = [(n, (n + 1) % len(names)) for n in range(len(names))]
    plans += [("pair", f"{names[a]} and {names[b]}", [members[a][0], members[b][0]]) for a, b in pairs]
    if len(nodes) > 2:
        plans.append(("all", "all ranks", list(range(len(nodes)))))
    return [_measure(kind, name, ranks, device, seconds) for kind, name, ranks in plans]


def _measure(kind: str, name: str, ranks: list[int], device: torch.device, seconds: float) -> Measure:
    doing(f"measuring {name}")  # restarts the watchdog's timeout
    mine: list[tuple[float, str | None]] = []
    groups: list[dist.ProcessGroup] = []

    def work() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the current device belongs to a thread
        try:
            group = dist.new_group(ranks, timeout=timedelta(seconds=seconds))  # may connect
            member = dist.get_rank() in ranks
            mine.append((_all_reduce_rate(group, len(ranks), device) if member else 0.0, None))
            groups.extend([group] if member else [])
        except RuntimeError as error:
            mine.append((0.0, str(error).splitlines()[0]))

    # NCCL has no timeout while it connects. The timeout of the other ranks is four times the seconds.
    deadline = 3 * seconds
    finishes_within(deadline, work)
    found = mine[0] if mine else (0.0, f"no answer within {deadline:g} s")
    results = [result for rank, result in enumerate(gather(found)) if rank in ranks]
    for group in groups:  # which no rank uses any more
        dist.destroy_process_group(group)
    problem = next((p for _, p in results if p), None)
    return Measure(kind, name, min(r for r, _ in results), problem)


def _all_reduce_rate(group: dist.ProcessGroup, size: int, device: torch.device) -> float:
    """Bus bandwidth in 10^9 bytes per second. Raises RuntimeError if a sum is wrong."""
    count = (CPU_BYTES if device.type == "cpu" else GPU_BYTES) // 4
    values = torch.ones(count, device=device)
    times = []
    for _ in range(ROUNDS + 1):  # the first one sets up connections
        values.fill_(1.0)
        _finish(device)
        begin = time.monotonic()
        dist.all_reduce(values, group=group)
        _finish(device)
        times.append(time.monotonic() - begin)
        if not bool((values == size).all()):
            raise RuntimeError("a sum over the ranks was wrong")
    return 2 * (size - 1) / size * count * 4 / statistics.median(times[1:]) / 1e9


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_clocks(nodes: list[int]) -> list[float]:
    """Seconds by which each node's clock is ahead of the first node's. All ranks call it.

    Every rank reads its clock when a message has reached all ranks, so the error is about the time of one
    message. The smallest of several differences counts.
    """
    rounds = []
    for _ in range(ROUNDS):
        gather(None)
        rounds.append(gather(time.time()))
    first = [nodes.index(node) for node in range(max(nodes) + 1)]
    return [min((times[rank] - times[0] for times in rounds), key=abs) for rank in first]
