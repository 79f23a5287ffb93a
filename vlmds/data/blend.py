"""The order of parts in a blend: a pure function of (seed, position), as the order of samples is.

The positions are cut into blocks of BLOCK. Every block has the same number of positions for each
part: its weight's share to the nearest 1/BLOCK, and at least one. They are spread evenly: of a
part's n positions, one is in each nth of the block, at a place drawn from (seed, block). So any
stretch of the stream has the weights' shares to within a few samples, and the position in the
part's own stream follows without counting.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

BLOCK = 4096


class Blend:
    """A map from a position to (part, position in the part's stream).

    Args:
        weights: one for each part, positive.
        seed: of the run.
    """

    def __init__(self, weights: Sequence[float], seed: int):
        self.seed = seed
        self.shares = shares(weights)
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def locate(self, position: int) -> tuple[int, int]:
        block, place = divmod(position, BLOCK)
        parts, ranks = self._block(block)
        part = int(parts[place])
        return part, block * int(self.shares[part]) + int(ranks[place])

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each place of a block: its part, and the number of earlier places with this part."""
        if block not in self._blocks:
            draw = np.random.RandomState([self.seed % 2**32, self.seed >> 32, block, 2])
            parts = np.repeat(np.arange(len(self.shares)), self.shares)
            number = np.concatenate([np.arange(share) for share in self.shares])
            times = (number + draw.random_sample(BLOCK)) / self.shares[parts]
            order = np.argsort(times, kind="stable")
            # In each part `times` rises with `number`, so number is the rank inside the block.
            self._blocks[block] = parts[order], number[order]
            if len(self._blocks) > 8:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(block)
        return self._blocks[block]


def shares(weights: Sequence[float]) -> np.ndarray:
    """Positions of each part in a block: int64, summing to BLOCK, by largest remainder, each at
    least one."""
    exact = np.asarray(weights, np.float64) / np.sum(weights) * BLOCK
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    while counts.sum() != BLOCK:
        step = 1 if counts.sum() < BLOCK else -1
        lag = (exact - counts) * step
        lag[counts + step < 1] = -np.inf
        counts[int(np.argmax(lag))] += step
    return counts
