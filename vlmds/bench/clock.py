"""Time of a training step by phase, and bytes of the collectives between ranks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

# Bytes that one rank sends in a collective over W ranks by the ring algorithms, per byte of the
# whole tensor and per (W − 1) / W (Patarasuk and Yuan, 2009).
COLLECTIVES = {
    "all_reduce": 2,
    "reduce": 1,
    "broadcast": 1,
    "reduce_scatter": 1,
    "reduce_scatter_tensor": 1,
    "all_gather": 1,
    "all_gather_into_tensor": 1,
}


class StepClock:
    """Seconds by phase since the last :meth:`lap`. A phase inside another one is not counted in
    the outer one.

    Args:
        device: on a GPU both ends of a phase wait for it, to count the work that runs there.
        split: False does not wait, which would prevent overlap, and counts the host's part only.
    """

    def __init__(self, device: torch.device, split: bool = True):
        self.device, self.split = device, split
        self.sent = 0
        """Bytes that this rank sent in collectives, by the ring algorithms."""
        self._seconds: dict[str, float] = defaultdict(float)
        self._host: dict[str, float] = defaultdict(float)
        self._inner = [0.0]  # for each open phase: seconds of the phases inside it

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A context whose time counts as this phase."""
        if not self.split:
            begin = time.perf_counter()
            yield
            self._host[name] += time.perf_counter() - begin
            return
        begin = self._now()
        self._inner.append(0.0)
        try:
            # Also names the phase in a profile, by which StepMemory assigns memory to phases.
            with torch.autograd.profiler.record_function(f"vlmds {name}"):
                yield
        finally:
            took = self._now() - begin
            self._seconds[name] += took - self._inner.pop()
            self._inner[-1] += took

    def timed(self, name: str, call: Callable) -> Callable:
        """The function ``call``, counted as a phase."""

        def timed(*arguments, **keywords):
            with self.phase(name):
                return call(*arguments, **keywords)

        return timed

    def lap(self) -> dict[str, Any]:
        """Seconds by phase and bytes sent ("sent") since the last call. "host": the host's seconds in
        each phase that was not split, inner phases included."""
        found = {**self._seconds, "sent": self.sent, "host": dict(self._host)}
        self._seconds.clear()
        self._host.clear()
        self.sent, self._inner = 0, [0.0] * len(self._inner)
        return found

    def watch_collectives(self) -> None:
        """Count every collective of ``torch.distributed`` from now on, as phase "communication".
        Call it before DeepSpeed joins the ranks, which keeps references to some of the functions."""
        for name, factor in COLLECTIVES.items():
            setattr(dist, name, self._watched(getattr(dist, name), factor))

    def _watched(self, collective: Callable, factor: int) -> Callable:
        timed = self.timed("communication", collective)

        def watched(*arguments, **keywords):
            ranks = dist.get_world_size(keywords.get("group"))
            tensors = [*arguments[:2], *keywords.values()]
            self.sent += factor * (ranks - 1) * max(map(_nbytes, tensors)) // ranks
            return timed(*arguments, **keywords)

        return watched

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _nbytes(value) -> int:
    """Bytes of a tensor or a list of tensors; 0 for anything else."""
    if isinstance(value, (list, tuple)):
        return sum(map(_nbytes, value))
    return value.nbytes if isinstance(value, torch.Tensor) else 0
