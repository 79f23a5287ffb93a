"""An exponential moving average of the trainables, partitioned as ZeRO-2 partitions them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vlmds.training.engine import Engine


class WeightAverage:
    """Exponential moving average of this rank's fp32 partitions.

    Args:
        engine: its partitions are averaged; must not be rebuilt.
        decay: share of the old average that a step keeps.

    flats: fp32, one for each parameter group, of the shape of the group's partition.
    """

    def __init__(self, engine: Engine, decay: float):
        self._zero, self.decay = engine.optimizer, decay
        self.flats = [flat.detach().clone() for flat in self._partitions]

    @property
    def _partitions(self) -> list[torch.Tensor]:
        return [flat.data for flat in self._zero.single_partition_of_fp32_groups]

    def update(self) -> None:
        """Add the weights after an optimizer step."""
        torch._foreach_lerp_(self.flats, self._partitions, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the model has the averaged weights; all ranks enter and leave it alike."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for average, partition in zip(self.flats, self._partitions, strict=True):
            averaged = average.clone()
            average.copy_(partition)
            partition.copy_(averaged)
        self._zero.update_lp_params()
