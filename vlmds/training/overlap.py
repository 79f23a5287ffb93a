"""Features ahead of the training: CLIP on one micro-batch while the language model trains on the one before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from vlmds.models.assemble import Model
from vlmds.models.captioner import Features


class FeaturesAhead:
    """A stage's micro-batches, step by step, and their patch features.

    On a GPU, CLIP works on the next micro-batch in a stream of its own while the language model works
    on this one. The two complement each other: with 64 visual tokens a small micro-batch is bound by
    reading weights, CLIP by computation. The next micro-batch may be the first of the next optimizer
    step. Then its frames are read and its features computed before this step ends; nothing else happens
    to it before its own step. Therefore a stop, or a checkpoint that is due, waits for that micro-batch;
    after a stop it is read again. On a CPU there is nothing to gain: each is read and computed on demand.

    Args:
        model: see :meth:`Model.features`.
        batches: the micro-batches that this rank trains on, in order.
    """

    def __init__(self, model: Model, device: torch.device, batches: Iterable[dict]):
        self._model, self._reading = model, iter(batches)
        self._ahead = runs_ahead(device)
        self._held: list[dict] = []  # read already, of the next step: one or none
        self._begun: tuple[Features, torch.cuda.Event | None] | None = None  # of what comes next
        self._stream = None
        if device.type == "cuda":  # one for all steps: the allocator keeps memory by stream
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))  # CLIP's weights are there

    def group(self, count: int) -> list[dict]:
        """The next step's micro-batches, fewer than ``count`` at the end of the data. To be called when
        all features of the step before have been taken."""
        held, self._held = self._held, []
        return held + list(islice(self._reading, count - len(held)))

    def features(self, group: list[dict]) -> Iterator[Features]:
        """Features of each of a step's micro-batches, see :meth:`Model.features`. The caller takes the next
        ones once it has launched this micro-batch's work on the GPU."""
        for number, batch in enumerate(group):
            begun, self._begun = self._begun or self._begin(batch), None
            if self._ahead:
                following = group[number + 1 : number + 2] or self._read_ahead()
                # One that could not be read ends the training when its step comes.
                if following and "failure" not in following[0]:
                    self._begun = self._begin(following[0])
            yield self._finish(*begun)

    def _read_ahead(self) -> list[dict]:
        self._held = list(islice(self._reading, 1))
        return self._held

    def _begin(self, batch: dict) -> tuple[Features, torch.cuda.Event | None]:
        """The features, and the event after which they are computed."""
        if self._stream is None:
            return self._model.features(batch), None
        # Independent of the current stream: the frames come from the host's pinned memory, and CLIP's
        # weights never change.
        with torch.cuda.stream(self._stream):
            return self._model.features(batch), self._stream.record_event()

    def _finish(self, features: Features, event: torch.cuda.Event | None) -> Features:
        """The features, ready for the current stream."""
        if event is not None:
            clips = [features] if isinstance(features, Tensor) else features
            current = torch.cuda.current_stream(clips[0].device)
            current.wait_event(event)
            for clip in clips:
                clip.record_stream(current)  # or the allocator could reuse its memory too early
        return features


def runs_ahead(device: torch.device) -> bool:
    """Whether features are computed ahead: on a GPU."""
    return device.type == "cuda"
