"""Where a training step's time and bytes go: phases, and the collectives between ranks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

# Bytes that one rank sends in a collective over W ranks by the ring algorithms, per byte of the
# whole tensor: (W − 1) / W times this (Patarasuk and Yuan, 2009).
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
        device: on a GPU both ends of a phase wait for it, so that what runs there is counted.
            That takes overlap away, so with ``split`` False nothing waits, and what is counted is
            the host's part.
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
        if not self.split:
            begin = time.perf_counter()
            yield
            self._host[name] += time.perf_counter() - begin
            return
        begin = self._now()
        self._inner.append(0.0)
        try:
            # Names the phase in a profile, too, from which memory is attributed.
            with torch.autograd.profiler.record_function(f"vlmds {name}"):
                yield
        finally:
            took = self._now() - begin
            self._seconds[name] += took - self._inner.pop()
            self._inner[-1] += took

    def timed(self, name: str, call: Callable) -> Callable:
        """The same function, counted as a phase."""

        def timed(*arguments, **keywords):
            with self.phase(name):
                return call(*arguments, **keywords)

        return timed

    def lap(self) -> dict[str, float]:
        """Seconds by phase and bytes sent ("sent") since the last call; under "host", of the phases
        that were not split, how long the host was in each, those inside it included."""
        found = {**self._seconds, "sent": self.sent, "host": dict(self._host)}
        self._seconds.clear()
        self._host.clear()
        self.sent, self._inner = 0, [0.0] * len(self._inner)
        return found

    def watch_collectives(self) -> None:
        """Count every collective of ``torch.distributed`` from now on, as phase "communication".
        Must come before DeepSpeed joins the ranks, which notes some of the functions."""
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
    """Of a tensor or a list of tensors; 0 for anything else."""
    if isinstance(value, (list, tuple)):
        return sum(map(_nbytes, value))
    return value.nbytes if isinstance(value, torch.Tensor) else 0
