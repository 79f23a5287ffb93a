"""Captions from a trained run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from vlmds.config import Experiment
from vlmds.data.decode_child import decode_videos
from vlmds.data.prompt import SequenceBuilder
from vlmds.errors import SampleError
from vlmds.models.artifact import (
    artifact_experiment,
    check_tower,
    load_artifact,
    resolve_artifact,
)
from vlmds.models.assemble import Model, load_model


class VideoCaptioner:
    """A trained model that captions videos.

    Args:
        experiment: the artifact's. model: with the artifact's weights loaded.
    """

    def __init__(self, experiment: Experiment, model: Model, device: torch.device):
        self.experiment, self.model, self.device = experiment, model, device
        model.captioner.eval().requires_grad_(False)
        self.builder = SequenceBuilder(
            model.tokenizer, experiment.data.prompt, model.captioner.projector.num_tokens)

    @classmethod
    def from_pretrained(
        cls, artifact: str | Path, *, device: str | None = None, overrides: Sequence[str] = ()
    ) -> VideoCaptioner:
        """Load an artifact and the pretrained models that it names.

        Args:
            artifact: a folder, or a hub repository: ``owner/name``, or ``owner/name@revision``.
            device: default: the first GPU, else the CPU.
            overrides: of the experiment, such as ``llm.model=/models/Qwen3-8B``.

        Raises:
            InputError: no such artifact, a damaged one, or models that it was not trained with.
        """
        artifact = resolve_artifact(artifact)
        target = torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
        experiment = artifact_experiment(artifact, overrides)
        model = load_model(experiment, target)
        load_artifact(artifact, model.captioner)
        check_tower(artifact, experiment, model.tower)
        model.captioner.to(target)
        return cls(experiment, model, target)

    def caption(
        self, videos: Iterable[str], *, prompt: str | None = None, batch_size: int = 4,
        num_beams: int = 1, max_new_tokens: int = 128, workers: int | None = None,
    ) -> Iterator[str | SampleError]:
        """For each video (path or URL), in order, its caption, or why there is none.

        Args:
            prompt: instead of the experiment's.
            batch_size: videos captioned at once; the captions do not depend on it.
            num_beams: 1 is greedy search.
            workers: decoding processes (default: one per core).
        """
        decoded = decode_videos(
            videos, self.experiment.data.num_frames, self.model.image_size,
            workers=workers or len(os.sched_getaffinity(0)))
        for batch in _batched(decoded, batch_size):
            frames = [item for item in batch if not isinstance(item, SampleError)]
            captions = iter(self.caption_frames(
                np.stack(frames), [prompt] * len(frames), num_beams=num_beams,
                max_new_tokens=max_new_tokens) if frames else [])
            for item in batch:
                yield item if isinstance(item, SampleError) else next(captions)

    @torch.no_grad()
    def caption_frames(
        self, frames: np.ndarray, prompts: Sequence[str | None], *, num_beams: int = 1,
        max_new_tokens: int = 128,
    ) -> list[str]:
        """Captions of one batch: frames uint8 [B, F, 3, S, S], a prompt (or None) for each."""
        features = self.model.features({"frames": torch.from_numpy(frames)})
        batch = self.builder.collate_generation(prompts)
        ids = self.model.captioner.generate(
            features, batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device),
            eos_token_id=self.builder.eos_token_id, pad_token_id=self.builder.pad_token_id,
            max_new_tokens=max_new_tokens, num_beams=num_beams,
        )
        return self.builder.decode(ids)


def _batched(items: Iterable, size: int) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
