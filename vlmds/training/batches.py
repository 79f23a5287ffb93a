"""The data of a stage: its readers, how samples become micro-batches, and this rank's micro-batches."""

from __future__ import annotations

import time
from collections.abc import Iterator

from vlmds.data.dataset import Dataset
from vlmds.data.loader import Batches, SampleReader, TrainingPositions, stage_seed, training_collate
from vlmds.models.assemble import Model
from vlmds.models.sequences import SequenceBuilder
from vlmds.training.context import StageContext


class StageData:
    """Training and validation data of one stage, on this rank.

    train, val: readers of the two splits; val is not shuffled, and None if the data has none.
    collate: see :func:`vlmds.data.loader.training_collate`.
    """

    def __init__(self, stage: StageContext, model: Model, dataset: Dataset):
        self._stage, self._dataset, self._image_size = stage, dataset, model.image_size
        data, projector = stage.data, model.captioner.projector
        self.train = self._reader("train", shuffle=True)
        self.val = self._reader("val", shuffle=False) if "val" in dataset.splits else None
        self.collate = training_collate(
            SequenceBuilder(model.tokenizer, data.prompt, projector.num_tokens, data.max_caption_tokens),
            still_tokens=projector.tokens_of(projector.patches),
        )
        self._waited = 0.0

    def micro_batches(self, first: int) -> Iterator[dict]:
        """This rank's micro-batches from optimizer step ``first`` (from 0) to the stage's end, as
        :func:`vlmds.data.loader.training_collate` makes them."""
        stage, accumulation = self._stage, self._stage.schedule.accumulation
        positions = TrainingPositions(
            first,
            stage.total,
            accumulation,
            stage.rank,
            global_batch=stage.schedule.global_batch,
            micro_batch=stage.experiment.training.micro_batch,
            world_size=stage.world_size,
        )
        batches = Batches(self.train, positions, self.collate, stage.data.num_workers)
        reading = iter(batches)
        for number in range(len(positions)):
            stage.activity(first + number // accumulation, "waiting for data", explain=batches.in_progress)
            started = time.perf_counter()
            batch = next(reading)
            self._waited += time.perf_counter() - started
            yield batch

    def take_waited(self) -> float:
        """Seconds that this rank has waited for data since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def _reader(self, split: str, shuffle: bool) -> SampleReader:
        data = self._stage.data
        return SampleReader(
            self._dataset,
            split,
            data.num_frames,
            self._image_size,
            seed=stage_seed(self._stage.experiment.training.seed, self._stage.number),
            window=data.shuffle_window,
            shuffle=shuffle,
            decode_seconds=data.decode_seconds,
            fit=data.fit,
        )
