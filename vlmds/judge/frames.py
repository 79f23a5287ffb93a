"""Frames of clips as a judge gets them: JPEGs in data URLs."""

from __future__ import annotations

import threading
from collections.abc import Collection

import numpy as np

from vlmds.console.progress import phase
from vlmds.data.dataset import Dataset
from vlmds.data.exact_reader import ExactReader, Unreadable
from vlmds.data.index import ShardIndex
from vlmds.data.loader import picture_reader
from vlmds.errors import InputError, SampleError
from vlmds.judge.rubric import FRAME_SIDE
from vlmds.video.jpeg import data_uri


class ClipFrames:
    """Frames of a dataset's clips. Threads may share it.

    Args:
        data: packed dataset. count: frames of each clip; of a frames store at most those that it has.

    Raises:
        InputError: no dataset, a features store, or clips that the split does not have.
    """

    def __init__(self, data: str, split: str | None, keys: Collection[str], count: int):
        dataset = Dataset([ShardIndex.open(data)])
        self._count, self._lock = count, threading.Lock()
        self._reader = ExactReader(picture_reader(dataset, dataset.choose_split(split), count, FRAME_SIDE))
        wanted = {*keys}
        with phase("finding the clips"):
            positions = ((self._reader.key(i), i) for i in range(len(self._reader.reader)))
            self._places = {key: i for key, i in positions if key in wanted}
        if missing := sorted(wanted - {*self._places}):
            raise InputError(
                f"--data {data}: has no clip {missing[0]} ({len(missing)} are missing); give the one evaluated"
            )

    def of(self, clip: str) -> list[str]:
        """Data URLs, in order of time. Raises SampleError if the clip cannot be read."""
        with self._lock:
            sample = self._reader.load(self._places[clip])
        if isinstance(sample, Unreadable):
            raise SampleError(sample.reason)
        frames = sample.frames
        assert frames is not None  # features are refused above
        if len(frames) > self._count:
            frames = frames[np.linspace(0, len(frames) - 1, self._count).round().astype(int)]
        return [data_uri(frame) for frame in frames]
