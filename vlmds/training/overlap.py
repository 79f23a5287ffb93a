"""CLIP beside the language model: a micro-batch's features while the one before is trained on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vlmds.models.assemble import Model


class FeaturesAhead:
    """Called with a step's micro-batches, gives their patch features, in order.

    On a GPU, CLIP works on the next micro-batch in a stream of its own while the language model is
    busy with this one. What either leaves idle the other can take: with 64 visual tokens a small
    micro-batch waits for the weights to be read, while CLIP computes. On a CPU there is nothing to
    gain, and each is computed when it is asked for.

    Args:
        model: see :meth:`Model.features`.
    """

    def __init__(self, model: Model, device: torch.device):
        self._model = model
        # One for all steps: the allocator keeps memory by stream.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, group: list[dict]) -> Iterator[Tensor]:
        """Features [B, F·P, vision width] of each; the next is asked for when this one's work has
        been given to the GPU."""
        if self._stream is None:
            yield from map(self._model.features, group)
            return
        ready = self._model.features(group[0])
        for following in [*group[1:], None]:
            features = ready
            if following is not None:
                # It needs nothing that the current stream has yet to do: the frames come from the
                # host, and CLIP's weights never change.
                with torch.cuda.stream(self._stream):
                    ready = self._model.features(following)
            yield features
            if following is not None:
                current = torch.cuda.current_stream(ready.device)
                current.wait_stream(self._stream)
                ready.record_stream(current)  # its memory is not used again before it has been read
