"""The data of an experiment: one packed dataset, or several blended by weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

from vlmds.data.alike import check_alike
from vlmds.data.blend import Blend
from vlmds.data.cache import ShardCache
from vlmds.data.index import SampleRow, ShardIndex
from vlmds.data.order import SampleOrder
from vlmds.data.shard_reader import ShardInfo
from vlmds.errors import InputError
from vlmds.experiments.schema import DataConfig, Experiment
from vlmds.files import as_path, is_url

NO_DATA = "data.path: no data given; pass --data DIR, a folder made by vlmds pack"
Opened = TypeVar("Opened", bound="Dataset | None")


class Dataset:
    """One or several packed datasets behind one interface. Can be pickled.

    parts: the packed datasets. weights: of the parts in training; None for a single part.
    fingerprint: changes with any byte of any sample, and with the weights. key: of the experiment, for messages.
    """

    def __init__(self, parts: list[ShardIndex], weights: list[float] | None = None, key: str = "data"):
        self.parts, self.weights, self.key = parts, weights, key
        self.splits = sorted({split for part in parts for split in part.splits})
        self.meta = parts[0].meta
        check_alike(parts, key)

    @property
    def root(self) -> str:
        return " + ".join(str(part.root) for part in self.parts)

    @property
    def store(self) -> str:
        return self.parts[0].store

    @property
    def fingerprint(self) -> str:
        if self.weights is None:
            return self.parts[0].fingerprint
        described = [[part.fingerprint, weight] for part, weight in zip(self.parts, self.weights)]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def parts_with(self, split: str) -> list[int]:
        """Numbers of the parts that have the split. Raises InputError if no part has it."""
        found = [i for i, part in enumerate(self.parts) if split in part.splits]
        if not found:
            raise InputError(f"{self.root}: no split {split!r}; it has {', '.join(self.splits)}")
        return found

    def choose_split(self, split: str | None) -> str:
        """The split; None means "val", or the only split. Raises InputError if no part has it."""
        if split is None:
            split = self.splits[0] if len(self.splits) == 1 else "val"
        self.parts_with(split)
        return split

    def count(self, split: str) -> int:
        """Number of samples in the split, over all parts."""
        return sum(self.parts[i].count(split) for i in self.parts_with(split))

    def shards(self) -> list[tuple[ShardIndex, ShardInfo]]:
        """All shards of all parts and splits."""
        return [(part, shard) for part in self.parts for split in part.splits for shard in part.shards(split)]


@dataclass(frozen=True)
class PartPosition:
    """A position inside one part. part: number of the packed dataset; position, epoch: of the part's
    own stream."""

    part: int
    position: int
    epoch: int


class DatasetOrder:
    """The order of a split's samples; see :mod:`vlmds.data.order`, and for several parts
    :mod:`vlmds.data.blend`. An epoch of a blend is as many positions as all parts
    have samples; each part has its own epochs, whose pace its weight sets.

    Args:
        shuffle: false gives the stored order, part after part, for validation.

    Raises:
        InputError: no part has the split; or, with shuffle, a part lacks it.
    """

    def __init__(self, dataset: Dataset, split: str, seed: int = 0, window: int = 16, shuffle: bool = True):
        self.numbers = dataset.parts_with(split)
        lacking = [part.root for part in dataset.parts if split not in part.splits]
        if shuffle and lacking:
            raise InputError(
                f"{dataset.key}.blend: no split {split!r} in {', '.join(map(str, lacking))}, so "
                "its weight has no effect; pack it with that split, or leave it out"
            )
        self.orders = [
            # The part is in the high bits, above the stage: each part has its own seed.
            SampleOrder([shard.count for shard in dataset.parts[i].shards(split)], seed + (i << 40), window, shuffle)
            for i in self.numbers
        ]
        self.ends = list(accumulate(len(order) for order in self.orders))
        self.blend = None
        if shuffle and dataset.weights is not None and len(self.orders) > 1:
            self.blend = Blend([dataset.weights[i] for i in self.numbers], seed)

    def __len__(self) -> int:
        return self.ends[-1]

    def locate(self, position: int) -> PartPosition:
        """The part that the sample at a position is in, and its position there."""
        if self.blend is not None:
            part, position = self.blend.locate(position)
        elif len(self.orders) == 1:
            part = 0
        else:
            position %= len(self)
            part = next(i for i, end in enumerate(self.ends) if position < end)
            position -= self.ends[part] - len(self.orders[part])
        return PartPosition(self.numbers[part], position, position // len(self.orders[part]))

    def candidates(self, place: PartPosition) -> Iterator[tuple[int, int]]:
        """(shard, index in it) of the sample, then of its replacements, which are in the same part."""
        order = self.orders[self.numbers.index(place.part)]
        return map(order.locate, order.replacements(place.position))

    def row(self, dataset: Dataset, split: str, position: int) -> SampleRow:
        """The index row of the sample at a position."""
        place = self.locate(position)
        return dataset.parts[place.part].row(split, *next(self.candidates(place)))


def open_stages(experiment: Experiment) -> list[Dataset]:
    """The data of each stage; stages with the same data share one :class:`Dataset`. Raises InputError as
    :func:`open_dataset`."""
    found = []
    for dataset in open_given(experiment):
        if dataset is None:
            raise InputError(NO_DATA)
        found.append(dataset)
    return found


def open_given(experiment: Experiment) -> list[Dataset | None]:
    """As :func:`open_stages`, with None for stages without data."""
    opened: dict[str, Dataset | None] = {}
    found = []
    for number, stage in enumerate(experiment.stages):
        data = experiment.for_stage(stage.name).data
        source = repr((data.path, data.blend))
        if source not in opened:
            own = stage.data is not None and stage.data.given
            opened[source] = open_dataset(data, f"stages.{number}.data" if own else "data") if data.given else None
        found.append(opened[source])
    return found


def stages_with(datasets: Sequence[Opened]) -> dict[Opened, list[int]]:
    """The different datasets of :func:`open_stages`, each with the numbers of its stages."""
    found: dict[Opened, list[int]] = {}
    for number, dataset in enumerate(datasets):
        found.setdefault(dataset, []).append(number)
    return found


def open_dataset(data: DataConfig | str | Path, key: str = "data") -> Dataset:
    """The dataset, or the blend, that the experiment names; or the one in a folder or at a URL.

    Args:
        key: of the experiment, for messages.

    Raises:
        InputError: no dataset is named, no such folder, a damaged index, or parts that do not fit.
    """
    if not isinstance(data, DataConfig):
        data = DataConfig(path=str(data))
    cache = ShardCache(data.cache_dir, data.cache_gb * 1e9) if data.cache_dir else None
    if data.blend is not None:
        parts = [_open(part.path, f"{key}.blend.{i}.path", cache) for i, part in enumerate(data.blend)]
        return Dataset(parts, [part.weight for part in data.blend], key)
    if data.path is None:
        raise InputError(NO_DATA)
    return Dataset([_open(data.path, f"{key}.path", cache)], key=key)


def _open(path: str, key: str, cache: ShardCache | None) -> ShardIndex:
    place = as_path(path)
    if not is_url(place) and not place.is_dir():
        raise InputError(f"{key}: {path} does not exist; make it with vlmds pack")
    return ShardIndex.open(place, cache)
