"""Reading of exactly the clips asked for, where training would take a replacement for one that
cannot be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vlmds.data.loader import Batches, Sample, SampleReader
from vlmds.errors import InputError, SampleError


@dataclass(frozen=True)
class Unreadable:
    """A clip that cannot be read, and why."""

    position: int
    key: str
    reason: str


class ExactReader:
    """A reader that replaces nothing. Can be pickled."""

    def __init__(self, reader: SampleReader):
        self.reader = reader

    def key(self, position: int) -> str:
        return self.reader.row(position).key

    def load(self, position: int) -> Sample | Unreadable:
        try:
            sample = self.reader.load(position)
        except SampleError as error:
            return Unreadable(position, self.key(position), str(error))
        if sample.bad:  # a replacement
            return Unreadable(position, self.key(position), sample.bad[0]["reason"])
        return sample


def read_exactly(
    reader: SampleReader, positions: Sequence[int], batch_size: int, workers: int
) -> Iterator[list[Sample | Unreadable]]:
    """The clips at the positions, in order, in lists of ``batch_size``.

    Args:
        workers: reader processes; 0 reads in this one.

    Raises:
        InputError: a shard is missing or damaged.
    """
    chunks = [positions[i : i + batch_size] for i in range(0, len(positions), batch_size)]
    for items in Batches(ExactReader(reader), chunks, list, workers):
        if isinstance(items, dict):
            raise InputError(items["failure"])
        yield items
