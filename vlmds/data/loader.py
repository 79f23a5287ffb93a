"""From positions to micro-batches: read by index, decode, tokenise, in reader processes.

The pipeline is webdataset's (source, map, batched, WebLoader); its source is not a scan of tars but
the positions that this rank owns. How a batch travels: ``Positions`` says which samples,
``SampleReader.load`` reads and decodes one, ``collate`` stacks them, the training process gets a
dict of tensors.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from vlmds.config import DataConfig
from vlmds.data import video
from vlmds.data.features import decode_features
from vlmds.data.index import SampleRow, ShardIndex
from vlmds.data.order import SampleOrder, micro_batch_positions
from vlmds.data.prompt import SequenceBuilder
from vlmds.errors import InputError, SampleError


@dataclass(frozen=True)
class Sample:
    """One decoded sample.

    frames: uint8 [F, 3, S, S]; features: bfloat16 [F·P, width], in their place, of a features
    store. position: the one asked for. bad: a ledger record for each sample
    that could not be read in its place.
    """

    key: str
    position: int
    frames: np.ndarray | None
    captions: list[str]
    caption: str
    prompt: str | None
    bad: list[dict] = field(default_factory=list)
    features: torch.Tensor | None = None


class SampleReader:
    """Reads and decodes the sample at a position of the stream. Can be pickled.

    Args:
        index: the packed dataset; split: which part of it.
        num_frames, image_size: frames per clip and their side in pixels.
        seed, window, shuffle: as :class:`SampleOrder`.

    Raises:
        InputError: a frames or features store that was packed with another number or size of frames.
    """

    def __init__(self, index: ShardIndex, split: str, num_frames: int, image_size: int, *,
                 seed: int = 0, window: int = 16, shuffle: bool = True):
        if index.store in ("frames", "features"):
            for name, want in (("num_frames", num_frames), ("image_size", image_size)):
                if index.meta[name] != want:
                    raise InputError(
                        f"{index.root}: packed with {name} {index.meta[name]}, but the experiment "
                        f"needs {want}; pack again or change the experiment"
                    )
        self.index, self.split = index, split
        self.num_frames, self.image_size = num_frames, image_size
        counts = [shard.count for shard in index.shards(split)]
        self.order = SampleOrder(counts, seed, window, shuffle)

    def __len__(self) -> int:
        return len(self.order)

    def load(self, position: int) -> Sample:
        """The sample at ``position``, or the next of its replacements that can be read.

        Raises:
            SampleError: none of the replacements can be read either.
        """
        bad: list[dict] = []
        for candidate in self.order.replacements(position):
            row = self.index.row(self.split, *self.order.locate(candidate))
            try:
                return self._decode(row, position, bad)
            except SampleError as error:
                bad.append({"position": position, "key": row.key, "split": row.split,
                            "shard": row.shard, "reason": str(error)})
        raise SampleError(f"position {position}: {len(bad)} samples in a row cannot be read, "
                          f"the last: {bad[-1]['reason']}")

    def _decode(self, row: SampleRow, position: int, bad: list[dict]) -> Sample:
        members = self.index.read(row)
        meta = json.loads(members.pop("json"))
        frames = features = None
        if self.index.store == "features":
            features = decode_features(members, self.index.meta)
        elif self.index.store == "frames":
            frames = read_jpegs(members)
        else:
            (data,) = members.values()
            # The decoder that packing found to be right for this file, not the one probed now.
            info = replace(video.probe(data), decoder=row.decoder)
            decoded = video.decode_frames(data, info, self.num_frames, row.start, row.end)
            frames = video.resize_frames(decoded, self.image_size)
        captions = meta["captions"]
        epoch = position // len(self.order)  # clips with several captions show each in turn
        return Sample(row.key, position, frames, captions, captions[epoch % len(captions)],
                      meta.get("prompt"), bad, features)


class Positions(IterableDataset):
    """The positions of this reader process: whole batches, dealt out in turn, so that the
    DataLoader, which asks its workers in turn, gives them back in order.

    Args:
        batches: one sequence of positions per batch, in order.
    """

    def __init__(self, batches: Sequence[Sequence[int]]):
        self.batches = batches

    def __iter__(self) -> Iterator[int]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(first, len(self.batches), stride):
            yield from self.batches[number]


class TrainingPositions(Sequence):
    """One rank's micro-batches of optimizer steps [first_step, last_step), computed on demand;
    the keywords are those of :func:`micro_batch_positions`, and the micro-batches per step."""

    def __init__(self, first_step: int, last_step: int, accumulation: int, rank: int, **shape: int):
        self.first_step, self.last_step = first_step, last_step
        self.accumulation, self.rank, self.shape = accumulation, rank, shape

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulation

    def __getitem__(self, number: int) -> range:
        if not 0 <= number < len(self):
            raise IndexError(number)
        step, micro = divmod(number, self.accumulation)
        return micro_batch_positions(self.first_step + step, micro, self.rank, **self.shape)


def evaluation_positions(count: int, batch: int, rank: int, world_size: int) -> list[range]:
    """One rank's batches of samples 0 … count − 1, each sample in one batch of one rank. Ranks
    may get unequal numbers of batches, and the last batch may be smaller."""
    batches = [range(start, min(start + batch, count)) for start in range(0, count, batch)]
    return batches[rank::world_size]


def training_collate(builder: SequenceBuilder) -> Callable[[list[Sample]], dict]:
    """What makes a micro-batch of B samples:

    frames uint8 [B, F, 3, S, S] or features bfloat16 [B, F·P, width]; input_ids, labels int64 [B, L], right-padded; keys; positions:
    number of real (not padding) positions; bad: ledger records.
    """

    def collate(samples: list[Sample]) -> dict:
        sequences = [builder.training(s.caption, s.prompt) for s in samples]
        return {
            **visual_inputs(samples),
            **builder.collate_training(sequences),
            "keys": [s.key for s in samples],
            "positions": sum(len(sequence.input_ids) for sequence in sequences),
            "bad": [record for s in samples for record in s.bad],
        }

    return collate


def visual_inputs(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """{"frames": uint8 [B, F, 3, S, S]}, or {"features": bfloat16 [B, F·P, width]}."""
    if samples[0].features is not None:
        return {"features": torch.stack([s.features for s in samples])}
    return {"frames": torch.from_numpy(np.stack([s.frames for s in samples]))}


def read_batches(
    reader: SampleReader, batches: Sequence[Sequence[int]],
    collate: Callable[[list[Sample]], dict], num_workers: int,
) -> Iterable[dict]:
    """Collated batches in the order of `batches` (positions), read ahead by `num_workers`
    processes; 0 reads in this one. All batches but the last must have the same size.

    Raises:
        SampleError: see :meth:`SampleReader.load`.
    """
    if not len(batches):
        return []
    pipeline = wds.DataPipeline(
        Positions(batches),
        wds.map(reader.load),
        wds.batched(len(batches[0]), collation_fn=collate, partial=True),
    )
    workers = min(num_workers, len(batches))
    return wds.WebLoader(
        pipeline, batch_size=None, num_workers=workers, pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )


def open_dataset(data: DataConfig) -> ShardIndex:
    """The dataset that the experiment names.

    Raises:
        InputError: no path given, no such folder, or a damaged index.
    """
    if data.path is None:
        raise InputError("data.path: no data given; pass --data DIR, a folder made by vlmds pack")
    if not Path(data.path).is_dir():
        raise InputError(f"data.path: {data.path} does not exist; make it with vlmds pack")
    return ShardIndex.open(data.path)


def read_jpegs(members: dict[str, bytes]) -> np.ndarray:
    """{"0.jpg": …} -> uint8 [F, 3, S, S]."""
    frames = []
    for number in range(len(members)):
        try:
            with Image.open(io.BytesIO(members[f"{number}.jpg"])) as image:
                frames.append(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
        except (KeyError, OSError) as error:
            raise SampleError(f"frame {number}: {error}") from error
    return np.stack(frames)
