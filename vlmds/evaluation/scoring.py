"""What a model makes of each clip: its caption, and how likely the references are to it when it
sees the right video, another clip's video, or nothing.

A model that captions from habit scores well on easy data without looking. So every clip is also
judged blind. Captions under swapped videos cost nothing: what a model says to clip j's video does
not depend on whose references it is held against. Blank frames give one caption per prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmds.data.loader import Batches, SampleReader, visual_inputs
from vlmds.data.stored import read_description
from vlmds.errors import InputError, SampleError
from vlmds.experiments.schema import Experiment
from vlmds.inference.generation import GenerationOptions, generate_captions
from vlmds.models.assemble import Model
from vlmds.models.sequences import SequenceBuilder
from vlmds.video.jpeg import SHOWN_QUALITY, encode_jpeg

THUMBNAIL_FRAMES, THUMBNAIL_SIDE = 4, 96


@dataclass(frozen=True)
class ClipText:
    """What is known of the clip at a position without decoding it. duration: seconds."""

    position: int
    key: str
    captions: list[str]
    prompt: str | None
    duration: float | None


@dataclass(frozen=True)
class Unreadable:
    """A clip that could not be read, and why."""

    position: int
    key: str
    reason: str


def read_text(reader: SampleReader, position: int) -> ClipText | Unreadable:
    """The text at a position; of the shard, only the clip's JSON is read."""
    row = reader.row(position)
    only_json = replace(row, members=tuple(m for m in row.members if m.ext == "json"))
    try:
        meta = read_description(reader.index_of(position).read(only_json))
    except SampleError as error:
        return Unreadable(position, row.key, str(error))
    duration = None if row.duration is None else row.span[1] - row.span[0]
    return ClipText(position, row.key, meta["captions"], meta.get("prompt"), duration)


def evaluated_positions(count: int, clips: int | None) -> list[int]:
    """All positions, or ``clips`` of them at even distances."""
    if clips is None or clips >= count:
        return list(range(count))
    return np.linspace(0, count - 1, clips).round().astype(int).tolist()


def swap_videos(texts: Sequence[ClipText], seed: int = 0) -> dict[int, int]:
    """{position: position of the clip whose video it gets}: of the same prompt and with other
    references. A clip without such a partner is left out."""
    groups: dict[str | None, list[ClipText]] = {}
    for text in texts:
        groups.setdefault(text.prompt, []).append(text)
    swapped = {}
    for group in groups.values():
        order = np.random.RandomState(seed).permutation(len(group))
        shuffled = [group[i] for i in order]
        for number, text in enumerate(shuffled):
            partner = next(
                (
                    other
                    for step in range(1, len(shuffled))
                    if not set((other := shuffled[(number + step) % len(shuffled)]).captions) & set(text.captions)
                ),
                None,
            )
            if partner:
                swapped[text.position] = partner.position
    return swapped


class ClipReader:
    """Reads exactly the clip asked for, where training would take another one. Can be pickled."""

    def __init__(self, reader: SampleReader):
        self.reader = reader

    def key(self, position: int) -> str:
        return self.reader.row(position).key

    def load(self, position: int):
        """A Sample, or why there is none."""
        try:
            sample = self.reader.load(position)
        except SampleError as error:
            return Unreadable(position, self.key(position), str(error))
        if sample.bad:  # a replacement
            return Unreadable(position, self.key(position), sample.bad[0]["reason"])
        return sample


class ClipScorer:
    """One model on this rank.

    Args:
        experiment: of the model. model: put in evaluation mode by the caller.
        texts: of all clips that are evaluated. swapped: see :func:`swap_videos`.
        batch_size: clips at once; the results do not depend on it.
        generation: how captions are written.
    """

    def __init__(
        self,
        experiment: Experiment,
        model: Model,
        texts: Sequence[ClipText],
        swapped: dict[int, int],
        *,
        batch_size: int = 8,
        generation: GenerationOptions = GenerationOptions(),
    ):
        self.model, self.batch_size = model, batch_size
        self.generation = generation
        self.num_frames = experiment.data.num_frames
        self.num_workers = experiment.data.num_workers
        self.builder = SequenceBuilder(
            model.tokenizer,
            experiment.data.prompt,
            model.captioner.projector.num_tokens,
            experiment.data.max_caption_tokens,
        )
        self.texts = {text.position: text for text in texts}
        self.lent: dict[int, list[int]] = {}
        for position, partner in swapped.items():
            self.lent.setdefault(partner, []).append(position)

    def batches(
        self, reader: SampleReader, positions: Sequence[int], thumbnail: Callable[[int, np.ndarray], None] | None = None
    ) -> Iterator[list[dict[str, Any]]]:
        """A list of records for each batch of the positions, in order; JSON can hold them.

        Args:
            thumbnail: called with each clip's position and frames, uint8 [F, 3, S, S].
        """
        chunks = [positions[i : i + self.batch_size] for i in range(0, len(positions), self.batch_size)]
        for items in Batches(ClipReader(reader), chunks, list, self.num_workers):
            if isinstance(items, dict):
                raise InputError(items["failure"])
            records = [
                {"position": item.position, "key": item.key, "unreadable": item.reason}
                for item in items
                if isinstance(item, Unreadable)
            ]
            samples = [item for item in items if not isinstance(item, Unreadable)]
            if samples:
                records += self.score([self.texts[s.position] for s in samples], visual_inputs(samples))
            for sample in samples:
                if thumbnail and sample.frames is not None:  # a features store has none
                    thumbnail(sample.position, sample.frames)
            yield records

    @torch.no_grad()
    def score(self, texts: Sequence[ClipText], inputs: dict[str, Tensor]) -> list[dict[str, Any]]:
        """One record per clip; inputs: see :func:`vlmds.data.loader.visual_inputs`.
        Log-probabilities are natural logs: of a caption its mean per token, of references [sum,
        tokens]."""
        features = self.model.features(inputs)
        captions = self._generate(features, [text.prompt for text in texts])
        records = [
            {
                "position": text.position,
                "key": text.key,
                "caption": caption,
                "caption_log_probability": None,
                "real": [0.0, 0],
                "blank": [0.0, 0],
                "lent": {},
            }
            for text, caption in zip(texts, captions, strict=True)
        ]
        jobs = []  # (row of the features, caption, prompt, where the result goes)
        blank_row = len(texts)
        for row, (text, record) in enumerate(zip(texts, records, strict=True)):
            if record["caption"]:
                jobs.append((row, record["caption"], text.prompt, (record, "caption")))
            for caption in text.captions:
                jobs.append((row, caption, text.prompt, (record, "real")))
                jobs.append((blank_row, caption, text.prompt, (record, "blank")))
            for position in self.lent.get(text.position, ()):
                borrower = self.texts[position]
                record["lent"][str(position)] = [0.0, 0]
                jobs += [
                    (row, caption, borrower.prompt, (record["lent"], str(position))) for caption in borrower.captions
                ]
        features = torch.cat([features, self._blank_features])
        for first in range(0, len(jobs), self.batch_size):
            part = jobs[first : first + self.batch_size]
            values = self._log_probabilities(
                features[[job[0] for job in part]], [j[1] for j in part], [j[2] for j in part]
            )
            for (*_, (target, name)), (total, tokens) in zip(part, values, strict=True):
                if name == "caption":
                    target["caption_log_probability"] = total / tokens
                else:
                    target[name][0] += total
                    target[name][1] += tokens
        return records

    @torch.no_grad()
    def blank_captions(self, prompts: Sequence[str | None]) -> dict[str | None, str]:
        """What the model says to each prompt when all frames are black."""
        return {prompt: self._generate(self._blank_features, [prompt])[0] for prompt in dict.fromkeys(prompts)}

    def _generate(self, features: Tensor, prompts: Sequence[str | None]) -> list[str]:
        return generate_captions(self.model, self.builder, features, prompts, self.generation)

    @cached_property
    def _blank_features(self) -> Tensor:
        """Of black frames, [1, N, vision_dim]: the same for all batches, as CLIP is frozen."""
        side = self.model.image_size
        return self.model.features({"frames": torch.zeros(1, self.num_frames, 3, side, side, dtype=torch.uint8)})

    def _log_probabilities(
        self, features: Tensor, captions: Sequence[str], prompts: Sequence[str | None]
    ) -> list[tuple[float, int]]:
        """(sum, tokens) of each caption and its end of turn, given features [B, N, vision_dim]."""
        batch = self.builder.collate_training(
            [self.builder.training(c, p) for c, p in zip(captions, prompts, strict=True)]
        )
        losses, rows = self.model.captioner.token_losses(features, batch["input_ids"], batch["labels"])
        losses, rows = losses.double().cpu(), rows.cpu()
        sums = torch.zeros(len(captions), dtype=torch.float64).index_add_(0, rows, -losses)
        return list(zip(sums.tolist(), torch.bincount(rows, minlength=len(captions)).tolist()))


def thumbnail_jpeg(frames: np.ndarray) -> bytes:
    """A strip of some frames, uint8 [F, 3, S, S], as a small JPEG."""
    chosen = np.linspace(0, len(frames) - 1, min(THUMBNAIL_FRAMES, len(frames))).round().astype(int)
    small = [
        np.asarray(Image.fromarray(frames[number].transpose(1, 2, 0)).resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE)))
        for number in chosen
    ]
    return encode_jpeg(np.concatenate(small, axis=1).transpose(2, 0, 1), SHOWN_QUALITY)
