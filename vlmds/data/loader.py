"""Loading of micro-batches: samples by position, decoded and tokenised in reader processes.

The pipeline is webdataset's (source, map, WebLoader), but its source is the batches of positions
that this rank owns instead of a scan of tars. ``Positions`` gives a batch's positions,
``SampleReader.load`` reads and decodes each, ``collate`` stacks them, and the training process
gets a dict of tensors. A batch that cannot be read is returned as {"failure": reason} and not
raised, because all ranks have to stop together.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

from vlmds.data.alike import check_frames
from vlmds.data.dataset import Dataset, DatasetOrder
from vlmds.data.features import decode_features
from vlmds.data.index import SampleRow, ShardIndex
from vlmds.data.order import micro_batch_positions
from vlmds.data.stored import read_description, read_jpegs, read_video
from vlmds.distributed.cores import cores_of_rank
from vlmds.errors import InputError, SampleError
from vlmds.experiments.defaults import DECODE_SECONDS
from vlmds.models.captioner import as_batch
from vlmds.models.sequences import SequenceBuilder
from vlmds.video.fit import FIT, fit_of
from vlmds.video.frame_table import DESCRIBED
from vlmds.video.pool import FrameDecoder


@dataclass(frozen=True)
class Sample:
    """One decoded sample.

    frames: uint8 [F, 3, S, S]; None with a features store, which has features: bfloat16 [F·P,
    width]. still: a picture, of which F is 1. position: the requested one. bad: ledger records of the samples that
    this one replaces.
    """

    key: str
    position: int
    frames: np.ndarray | None
    captions: list[str]
    caption: str
    prompt: str | None
    bad: list[dict] = field(default_factory=list)
    features: torch.Tensor | None = None
    still: bool = False


class SampleRows:
    """The samples of a split by position, as their index rows describe them. Can be pickled.

    Args:
        seed, window, shuffle: as :class:`DatasetOrder`.
    """

    def __init__(self, dataset: Dataset, split: str, *, seed: int = 0, window: int = 16, shuffle: bool = True):
        self.dataset, self.split = dataset, split
        self.order = DatasetOrder(dataset, split, seed, window, shuffle)

    def __len__(self) -> int:
        return len(self.order)

    def row(self, position: int) -> SampleRow:
        """The index row of the sample at a position."""
        return self.order.row(self.dataset, self.split, position)

    def index_of(self, position: int) -> ShardIndex:
        """The packed dataset that has the sample at a position."""
        return self.dataset.parts[self.order.locate(position).part]

    def key(self, position: int) -> str:
        """The key of the sample at a position."""
        return self.row(position).key


class SampleReader(SampleRows):
    """Reads and decodes the sample at a position of the stream. Can be pickled.

    Args:
        dataset, split: the samples to read.
        num_frames, image_size: frames per clip and their side in pixels.
        seed, window, shuffle: as :class:`DatasetOrder`.
        decode_seconds: time limit for decoding one video.
        fit: of the frames to the square (``resize_frames``); stored ones must have been made with it.

    Raises:
        InputError: a frames or features store was packed with another number, size or fit of frames.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        num_frames: int,
        image_size: int,
        *,
        seed: int = 0,
        window: int = 16,
        shuffle: bool = True,
        decode_seconds: float = DECODE_SECONDS,
        fit: str = FIT,
    ):
        for index in dataset.parts:
            check_frames(index, num_frames, image_size, fit)
        super().__init__(dataset, split, seed=seed, window=window, shuffle=shuffle)
        self.num_frames, self.image_size, self.fit = num_frames, image_size, fit
        self._decoder = FrameDecoder(decode_seconds)

    def load(self, position: int) -> Sample:
        """The sample at ``position``, or the next of its replacements that can be read.

        Raises:
            SampleError: the sample and all its replacements are unreadable.
        """
        bad: list[dict] = []
        place = self.order.locate(position)
        index = self.dataset.parts[place.part]
        for candidate in self.order.candidates(place):
            row = index.row(self.split, *candidate)
            try:
                return self._decode(index, row, position, place.epoch, bad)
            except SampleError as error:
                bad.append(
                    {"position": position, "key": row.key, "split": row.split, "shard": row.shard, "reason": str(error)}
                )
        raise SampleError(
            f"{index.root}: position {position}: {len(bad)} samples in a row cannot be "
            f"read, the last: {bad[-1]['key']}: {bad[-1]['reason']}"
        )

    def _decode(self, index: ShardIndex, row: SampleRow, position: int, epoch: int, bad: list[dict]) -> Sample:
        members = index.read(row)
        meta = read_description(members)
        captions = meta["captions"]
        frames = features = None
        still = meta.get("still") is True
        if index.store == "features":
            features = decode_features(members, index.meta, still)
        elif index.store == "frames":
            frames = read_jpegs(members, index.meta, still)
        else:
            frames = self._decode_video(row, meta, members, 1 if still else self.num_frames)
        # A clip with several captions uses another one in each epoch.
        return Sample(
            row.key,
            position,
            frames,
            captions,
            captions[epoch % len(captions)],
            meta.get("prompt"),
            bad,
            features,
            still,
        )

    def _decode_video(self, row: SampleRow, meta: dict, members: dict[str, bytes], num_frames: int) -> np.ndarray:
        # Shards of an older vlmds lack "timing": the decoding process probes the video.
        described = {name: meta.get(name) for name in DESCRIBED} if "timing" in meta else None
        # The decoder that packing chose for this file, not one that is probed now.
        return self._decoder.frames(
            read_video(members),
            num_frames=num_frames,
            image_size=self.image_size,
            start=row.start,
            end=row.end,
            decoder=row.decoder,
            described=described,
            fit=self.fit,
        )


def picture_reader(dataset: Dataset, split: str, num_frames: int, image_size: int) -> SampleReader:
    """A reader of the clips' pictures in the order of the data, whatever their store: whole ones with bars, in these
    numbers and sizes, of a video store; of a frames store those that it has. Raises InputError: a features store."""
    if dataset.store == "features":
        raise InputError(f"{dataset.root}: a features store has no pictures; give the packed videos, or a frames store")
    fit = FIT
    if dataset.store == "frames":
        num_frames, image_size = dataset.meta["num_frames"], dataset.meta["image_size"]
        fit = fit_of(dataset.meta["resizer"]) or FIT
    return SampleReader(dataset, split, num_frames, image_size, shuffle=False, fit=fit)


class Positions(IterableDataset):
    """The batches of this reader process: every n-th of n processes. The DataLoader takes one batch
    from each process in turn, which restores the order.

    Args:
        batches: one sequence of positions per batch, in order.
    """

    def __init__(self, batches: Sequence[Sequence[int]]):
        self.batches = batches

    def __iter__(self) -> Iterator[Sequence[int]]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(first, len(self.batches), stride):
            yield self.batches[number]


def _outlive_signals(worker: int) -> None:
    """Ignore a scheduler's signals, which go to all processes of a job: the rank ends its readers."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class Reader(Protocol):
    """Reads what is at a position. Can be pickled."""

    def key(self, position: int) -> str: ...

    def load(self, position: int) -> Any: ...


class Batches:
    """Collated batches in the order of `batches` (positions), read ahead by reader processes. May be
    iterated once. A batch that cannot be read is {"failure": reason}, after which the caller stops.

    Args:
        num_workers: reader processes, at most :func:`vlmds.distributed.cores.cores_of_rank`; 0 reads
            in this process. The batches do not depend on it.
    """

    def __init__(
        self, reader: Reader, batches: Sequence[Sequence[int]], collate: Callable[[list], Any], num_workers: int
    ):
        self._reader, self._batches, self._collate = reader, batches, collate
        self._workers = min(num_workers, len(batches), cores_of_rank())
        # For each reader process the position it is reading, or -1, and the start in ns of the clock
        # that all processes of a machine share; in shared memory, for `in_progress`.
        self._reading = torch.full((max(self._workers, 1), 2), -1, dtype=torch.int64).share_memory_()

    def __iter__(self) -> Iterator[Any]:
        if not len(self._batches):
            return
        pipeline = wds.DataPipeline(Positions(self._batches), wds.map(self._load))
        loader = wds.WebLoader(
            pipeline,
            batch_size=None,
            num_workers=self._workers,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=4 if self._workers else None,
            worker_init_fn=_outlive_signals,
        )
        try:
            yield from loader
        except RuntimeError as error:  # a worker's own exceptions keep their type
            if "DataLoader worker" not in str(error):
                raise
            raise RuntimeError(
                f"a reader process died ({' '.join(str(error).split())[:200]}; if it was killed, "
                f"check for a lack of memory); {self.in_progress() or 'it was reading no sample'}"
            ) from error

    def in_progress(self) -> str:
        """The samples that reader processes are reading now, the slowest first; at most four."""
        now = time.monotonic_ns()
        busy = sorted(
            (since, number, position)
            for number, (position, since) in enumerate(self._reading.tolist())
            if position >= 0
        )
        return "; ".join(
            f"reader {number} has been reading sample {self._reader.key(position)} (position {position}) "
            f"for {(now - since) / 1e9:.0f} s"
            for since, number, position in busy[:4]
        )

    def _load(self, positions: Sequence[int]) -> Any:
        worker = get_worker_info()
        slot = self._reading[worker.id if worker else 0]
        samples = []
        try:
            for position in positions:
                slot[1], slot[0] = time.monotonic_ns(), position
                samples.append(self._reader.load(position))
        except (SampleError, InputError) as error:
            return {"failure": str(error)}
        finally:
            slot[0] = -1
        return self._collate(samples)


class TrainingPositions(Sequence):
    """The positions of one rank's micro-batches in optimizer steps [first_step, last_step), computed
    on demand.

    Args:
        accumulation: micro-batches per step. shape: keywords of :func:`micro_batch_positions`.
    """

    def __init__(self, first_step: int, last_step: int, accumulation: int, rank: int, **shape: int):
        self.first_step, self.last_step = first_step, last_step
        self.accumulation, self.rank, self.shape = accumulation, rank, shape

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulation

    def __getitem__(self, number: int) -> range:  # type: ignore[override]  # no slices needed
        if not 0 <= number < len(self):
            raise IndexError(number)
        step, micro = divmod(number, self.accumulation)
        return micro_batch_positions(self.first_step + step, micro, self.rank, **self.shape)


def stage_seed(seed: int, number: int) -> int:
    """The seed of the order of stage ``number``, in the high word: no two stages have the same order."""
    return seed + (number << 32)


def evaluation_positions(count: int, batch: int, rank: int, world_size: int) -> list[range]:
    """One rank's batches of samples 0 … count − 1; each sample is in one batch of one rank. Ranks may
    get unequal numbers of batches, and the last batch may be smaller."""
    batches = [range(start, min(start + batch, count)) for start in range(0, count, batch)]
    return batches[rank::world_size]


def training_collate(builder: SequenceBuilder, still_tokens: int | None = None) -> Callable[[list[Sample]], dict]:
    """The function that makes a micro-batch of B samples, a dict:

    frames uint8 [B, F, 3, S, S] or features bfloat16 [B, F·P, width] (or lists of B, see
    :func:`visual_inputs`); input_ids, labels int64 [B, L], right-padded; keys; positions: number of real (not
    padding) positions; bad: ledger records; cut: keys of the samples whose caption was cut.

    Args:
        still_tokens: visual tokens of a still picture.
    """

    def collate(samples: list[Sample]) -> dict:
        sequences = [builder.training(s.caption, s.prompt, still_tokens if s.still else None) for s in samples]
        return {
            **visual_inputs(samples),
            **builder.collate_training(sequences),
            "keys": [s.key for s in samples],
            "positions": sum(len(sequence.input_ids) for sequence in sequences),
            "bad": [record for s in samples for record in s.bad],
            "cut": [s.key for s, sequence in zip(samples, sequences, strict=True) if sequence.cut],
        }

    return collate


def visual_inputs(samples: list[Sample]) -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """{"frames": uint8 [B, F, 3, S, S]}, or {"features": bfloat16 [B, F·P, width]}; lists of B tensors if clips
    and still pictures are mixed."""
    features = [s.features for s in samples if s.features is not None]
    if features:
        return {"features": as_batch(features)}
    frames = [s.frames for s in samples if s.frames is not None]
    if len({clip.shape for clip in frames}) == 1:
        return {"frames": torch.from_numpy(np.stack(frames))}
    return {"frames": [torch.from_numpy(clip.copy()) for clip in frames]}
