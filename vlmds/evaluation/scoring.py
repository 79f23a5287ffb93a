"""Scoring of clips by a model: the caption, and the likelihood of the references given the clip's
own video, the same with its frames reversed, shuffled or reduced to one, another clip's video, and black frames.

A model that ignores the video can score well on easy data, hence the blind tests. Captions under
swapped videos cost nothing: the caption of clip j's video is the same, whichever references it is
compared with. Black frames give one caption per prompt. Other orders of the frames cost one pass per
reference each and no caption; the order is that of the features, as CLIP encodes frame by frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmds.console.progress import phase
from vlmds.data.exact_reader import Unreadable, read_exactly
from vlmds.data.loader import Sample, SampleReader, SampleRows, visual_inputs
from vlmds.data.stored import read_description
from vlmds.errors import SampleError
from vlmds.experiments.schema import Experiment
from vlmds.inference.generation import CaptionedBatch, ClipInput, caption_batches, generate_captions
from vlmds.inference.options import BATCH_SIZE, GenerationOptions
from vlmds.models.assemble import Model
from vlmds.models.captioner import as_batch
from vlmds.models.sequences import SequenceBuilder
from vlmds.video.jpeg import SHOWN_QUALITY, encode_jpeg

THUMBNAIL_FRAMES, THUMBNAIL_SIDE = 4, 96


def frame_orders(num_frames: int) -> dict[str, list[int]]:
    """The frames that take the places 0 … num_frames - 1 in each test of their order; none for one frame."""
    if num_frames < 2:
        return {}
    own = list(range(num_frames))
    drawn = (np.random.RandomState(seed).permutation(num_frames).tolist() for seed in range(100))
    return {
        "frames_reversed": own[::-1],
        "frames_shuffled": next((order for order in drawn if order not in (own, own[::-1])), own[::-1]),
        "one_frame": [num_frames // 2] * num_frames,
    }


@dataclass(frozen=True)
class ClipText:
    """A clip's text and length, read without decoding it. duration: seconds. source: the video it is from, of which
    it is the span, in seconds (end None: unknown). id: as the manifest gave it. columns: the manifest's that were
    kept (`vlmds pack --keep-columns`)."""

    position: int
    key: str
    captions: list[str]
    prompt: str | None
    duration: float | None
    source: str
    id: str = ""
    span: tuple[float, float | None] = (0.0, None)
    columns: dict[str, Any] = field(default_factory=dict)


def read_text(reader: SampleRows, position: int) -> ClipText | Unreadable:
    """The text at a position; of the shard, only the clip's JSON is read."""
    row = reader.row(position)
    only_json = replace(row, members=tuple(m for m in row.members if m.ext == "json"))
    try:
        meta = read_description(reader.index_of(position).read(only_json))
    except SampleError as error:
        return Unreadable(position, row.key, str(error))
    span = (row.start or 0.0, row.end) if row.duration is None else row.span
    columns = meta.get("columns")
    return ClipText(
        position,
        row.key,
        meta["captions"],
        meta.get("prompt"),
        None if row.duration is None else span[1] - span[0],
        meta.get("source", row.key),
        str(meta.get("id", row.key)),
        span,
        columns if isinstance(columns, dict) else {},
    )


def read_texts(reader: SampleRows, positions: Sequence[int]) -> list[ClipText]:
    """The texts of the clips that can be read."""
    with phase("reading the captions", len(positions), "clips") as progress:
        texts = []
        for position in positions:
            texts.append(read_text(reader, position))
            progress.advance()
    return [text for text in texts if isinstance(text, ClipText)]


def evaluated_positions(count: int, clips: int | None) -> list[int]:
    """All positions, or ``clips`` of them at even distances."""
    if clips is None or clips >= count:
        return list(range(count))
    return np.linspace(0, count - 1, clips).round().astype(int).tolist()


def swap_videos(texts: Sequence[ClipText], seed: int = 0) -> dict[int, int]:
    """{position: position of the clip whose video it gets}. The partner has the same prompt and other
    references; a clip without a partner is left out."""
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


class ClipScorer:
    """One model on this rank.

    Args:
        experiment: of the model. model: put in evaluation mode by the caller.
        texts: of all clips that are evaluated. swapped: see :func:`swap_videos`.
        batch_size: clips at once; the results do not depend on it.
        generation: options of the captions.

    After :meth:`batches`, captioned and seconds are the clips that were captioned and how long that took.
    """

    def __init__(
        self,
        experiment: Experiment,
        model: Model,
        texts: Sequence[ClipText],
        swapped: dict[int, int],
        *,
        batch_size: int = BATCH_SIZE,
        generation: GenerationOptions = GenerationOptions(),
    ):
        self.model, self.batch_size = model, batch_size
        self.generation = generation
        self.captioned, self.seconds = 0, 0.0
        self.num_frames = experiment.data.num_frames
        self.orders = frame_orders(self.num_frames)
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
        """A list of records for each batch of the positions, in order; they can be written as JSON.

        Args:
            thumbnail: called with each clip's position and frames, uint8 [F, 3, S, S].
        """
        batches = (
            [self._input(item) for item in items]
            for items in read_exactly(reader, positions, self.batch_size, self.num_workers)
        )
        for batch in caption_batches(self.model, self.builder, batches, self.generation):
            items = [clip.about for clip in batch.clips]
            records = [
                {"position": item.position, "key": item.key, "unreadable": item.reason}
                for item in items
                if isinstance(item, Unreadable)
            ]
            samples = [item for item in items if not isinstance(item, Unreadable)]
            self.captioned += len(samples)
            self.seconds += batch.seconds
            if samples:
                records += self.score([self.texts[sample.position] for sample in samples], batch)
            for sample in samples:
                if thumbnail and sample.frames is not None:  # a features store has none
                    thumbnail(sample.position, sample.frames)
            yield records

    def _input(self, item: Sample | Unreadable) -> ClipInput:
        if isinstance(item, Unreadable):
            return ClipInput(item.key, about=item)
        inputs = {name: clips[0] for name, clips in visual_inputs([item]).items()}
        return ClipInput(item.key, inputs, self.texts[item.position].prompt, item)

    @torch.no_grad()
    def score(self, texts: Sequence[ClipText], batch: CaptionedBatch) -> list[dict[str, Any]]:
        """One record per clip of the batch that can be read. Log-probabilities are natural logs: of a
        caption its mean per token, of references [sum, tokens]."""
        captions = [caption for caption in batch.captions if caption is not None]
        unfinished = [cut for caption, cut in zip(batch.captions, batch.unfinished) if caption is not None]
        records: list[dict[str, Any]] = []
        own: list[list] = []
        # Row of the features, order of its frames (None: as they are), caption, prompt, [sum, tokens].
        jobs: list[tuple[int, list[int] | None, str, str | None, list]] = []
        for row, (text, caption) in enumerate(zip(texts, captions, strict=True)):
            own.append([0.0, 0])
            if caption:
                jobs.append((row, None, caption, text.prompt, own[-1]))
            real, blank = [0.0, 0], [0.0, 0]
            ordered: dict[str, list] = {name: [0.0, 0] for name in self.orders}
            for reference in text.captions:
                jobs.append((row, None, reference, text.prompt, real))
                jobs.append((len(texts) + row, None, reference, text.prompt, blank))
                jobs += [(row, self.orders[name], reference, text.prompt, sums) for name, sums in ordered.items()]
            lent: dict[str, list] = {str(position): [0.0, 0] for position in self.lent.get(text.position, ())}
            for position, sums in lent.items():
                borrower = self.texts[int(position)]
                jobs += [(row, None, reference, borrower.prompt, sums) for reference in borrower.captions]
            records.append(
                {
                    "position": text.position,
                    "key": text.key,
                    "caption": caption,
                    "unfinished": unfinished[row] if unfinished else None,
                    "caption_log_probability": None,
                    "real": real,
                    "blank": blank,
                    **ordered,
                    "lent": lent,
                }
            )
        features = [*batch.features, *(self._blank_features[0, : len(clip)] for clip in batch.features)]
        for first in range(0, len(jobs), self.batch_size):
            part = jobs[first : first + self.batch_size]
            seen = [self._ordered(features[row], order) for row, order, *_ in part]
            values = self._log_probabilities(seen, [job[2] for job in part], [job[3] for job in part])
            for (*_, sums), (total, tokens) in zip(part, values, strict=True):
                sums[0] += total
                sums[1] += tokens
        for record, (total, tokens) in zip(records, own, strict=True):
            if tokens:
                record["caption_log_probability"] = total / tokens
        return records

    def _ordered(self, features: Tensor, order: list[int] | None) -> Tensor:
        """A clip's features [F·P, vision_dim] with its frames in another order; a still picture stays as it is."""
        frames = features.unflatten(0, (-1, self._blank_features.shape[1] // self.num_frames))
        return features if order is None or len(frames) != self.num_frames else frames[order].flatten(0, 1)

    @torch.no_grad()
    def blank_captions(self, prompts: Sequence[str | None]) -> dict[str | None, str]:
        """The caption of black frames for each prompt."""
        return {
            prompt: generate_captions(self.model, self.builder, self._blank_features, [prompt], self.generation)[0]
            for prompt in dict.fromkeys(prompts)
        }

    @cached_property
    def _blank_features(self) -> Tensor:
        """Of black frames, [1, N, vision_dim]: the same for all batches, as CLIP is frozen."""
        side = self.model.image_size
        features = self.model.features({"frames": torch.zeros(1, self.num_frames, 3, side, side, dtype=torch.uint8)})
        assert isinstance(features, Tensor)
        return features

    def _log_probabilities(
        self, features: Sequence[Tensor], captions: Sequence[str], prompts: Sequence[str | None]
    ) -> list[tuple[float, int]]:
        """(sum, tokens) of each caption and its end of turn, given the features [N, vision_dim] of each."""
        tokens_of = self.model.captioner.projector.tokens_of
        batch = self.builder.collate_training(
            [
                self.builder.training(caption, prompt, tokens_of(len(clip)))
                for clip, caption, prompt in zip(features, captions, prompts, strict=True)
            ]
        )
        losses, rows = self.model.captioner.token_losses(as_batch(features), batch["input_ids"], batch["labels"])
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
