"""The order of samples in the training stream. FINAL: runs depend on it.

Position p counts samples since the start of a stage. Epoch e covers positions [e·N, (e+1)·N) and
visits each of the N samples once. The order is a pure function of (seed, epoch): shards are
shuffled, then the samples inside each window of G consecutive shuffled shards. World size,
micro-batch and workers only decide which process reads a position, never which sample it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

_REPLACEMENT_STRIDE = 7919  # a prime, so that replacements leave the neighbourhood of a bad shard
REPLACEMENT_TRIES = 16


class SampleOrder:
    """A map from any position to (shard, index in shard), without state or a scan.

    Args:
        counts: samples per shard.
        seed: of the run.
        window: shards whose samples are shuffled together, G.
        shuffle: false gives the stored order, for validation.

    Memory use is one epoch's shard permutation and a few windows' sample permutations.
    """

    def __init__(self, counts: Sequence[int], seed: int = 0, window: int = 16, shuffle: bool = True):
        self.counts = np.asarray(counts, dtype=np.int64)
        self.seed, self.window, self.shuffle = seed, window, shuffle
        self.total = int(self.counts.sum())
        self._cache: OrderedDict[tuple, np.ndarray | tuple] = OrderedDict()

    def __len__(self) -> int:
        return self.total

    def locate(self, position: int) -> tuple[int, int]:
        """The sample at ``position`` (any natural number): (shard, index inside the shard)."""
        epoch, place = divmod(position, self.total)
        shards, ends = self._shards(epoch if self.shuffle else 0)
        if self.shuffle:
            slot = int(np.searchsorted(ends, place, side="right"))  # whose window contains the place
            first = slot // self.window * self.window
            start = int(ends[first - 1]) if first else 0
            last = min(first + self.window, len(shards))
            place = start + int(self._permutation(epoch, first, int(ends[last - 1]) - start)[place - start])
        slot = int(np.searchsorted(ends, place, side="right"))
        return int(shards[slot]), place - (int(ends[slot - 1]) if slot else 0)

    def replacements(self, position: int) -> Iterator[int]:
        """Positions to try when the sample at ``position`` cannot be read, itself first."""
        epoch, place = divmod(position, self.total)
        for attempt in range(REPLACEMENT_TRIES):
            yield epoch * self.total + (place + attempt * _REPLACEMENT_STRIDE) % self.total

    def _shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """This epoch's shard order, and the running sample count at the end of each."""

        def make():
            shards = np.arange(len(self.counts))
            if self.shuffle:
                shards = _generator(self.seed, epoch, 0, 0).permutation(len(self.counts))
            return shards, np.cumsum(self.counts[shards])

        return self._remember(("shards", epoch), make)

    def _permutation(self, epoch: int, first: int, size: int) -> np.ndarray:
        """The permutation of the samples in the window that begins with shard slot ``first``."""
        return self._remember(
            ("window", epoch, first), lambda: _generator(self.seed, epoch, 1, first).permutation(size)
        )

    def _remember(self, key, make):
        if key not in self._cache:
            self._cache[key] = make()
            if len(self._cache) > 8:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]


def micro_batch_positions(
    step: int, micro: int, rank: int, *, global_batch: int, micro_batch: int, world_size: int
) -> range:
    """Positions that ``rank`` reads for micro-batch ``micro`` of optimizer step ``step``:
    p = step·B + micro·(mb·W) + rank·mb + j, for j in [0, mb)."""
    first = step * global_batch + micro * micro_batch * world_size + rank * micro_batch
    return range(first, first + micro_batch)


def _generator(seed: int, epoch: int, purpose: int, number: int) -> np.random.RandomState:
    """RandomState, not Generator: NEP 19 freezes its stream for good, and the order must be the
    same under every numpy version."""
    return np.random.RandomState([seed % 2**32, seed >> 32, epoch, purpose, number])
