"""Caption generation: greedy, beam search or sampling; of one batch, and of a stream of clips."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from vlmds.distributed.watchdog import doing
from vlmds.inference.options import GenerationOptions
from vlmds.models.assemble import Model
from vlmds.models.captioner import Features, as_batch
from vlmds.models.sequences import SequenceBuilder


@dataclass
class ClipInput:
    """One clip as the model gets it.

    key: its name in reports. inputs: {"frames": uint8 [F, 3, S, S]} or {"features": bfloat16
    [F·P, width]}; None if it cannot be read. prompt: None is the experiment's. about: what the
    caller needs with the result.
    """

    key: str
    inputs: dict[str, Tensor] | None = None
    prompt: str | None = None
    about: Any = None


@dataclass
class CaptionedBatch:
    """A batch of clips with their captions.

    captions: one per clip, None for a clip that cannot be read. features: of the clips that can be
    read, in their order, see :meth:`Model.features`. seconds: of CLIP and the language model.
    unfinished: for each clip whether its caption ended at `max_new_tokens`, not by itself.
    """

    clips: Sequence[ClipInput]
    captions: list[str | None]
    features: Features
    seconds: float
    unfinished: list[bool] = field(default_factory=list)


def caption_batches(
    model: Model, builder: SequenceBuilder, batches: Iterable[Sequence[ClipInput]], options: GenerationOptions
) -> Iterator[CaptionedBatch]:
    """Captions of the clips, batch by batch; the captions do not depend on the batches. Each batch is
    reported to the watchdog."""
    for batch in batches:
        doing("captioning", [clip.key for clip in batch])
        started = time.perf_counter()
        inputs = [clip.inputs for clip in batch if clip.inputs is not None]
        made, cut = iter(list[str]()), iter(list[bool]())
        features: Features = []
        if inputs:
            with torch.no_grad():
                features = model.features({name: as_batch([i[name] for i in inputs]) for name in inputs[0]})
            prompts = [clip.prompt for clip in batch if clip.inputs is not None]
            texts, ends = generate_batch(model, builder, features, prompts, options)
            made, cut = iter(texts), iter(ends)
        captions = [None if clip.inputs is None else next(made) for clip in batch]
        unfinished = [clip.inputs is not None and next(cut) for clip in batch]
        yield CaptionedBatch(batch, captions, features, time.perf_counter() - started, unfinished)
        doing("waiting for clips to be read")


def generation_config(options: GenerationOptions, eos_token_id: int, pad_token_id: int) -> GenerationConfig:
    """The options for transformers' ``generate``; sampling is done by :func:`logits_processors`."""
    # Sampling is a search for the largest of noisy logits: see GumbelNoise.
    return GenerationConfig(
        do_sample=False,
        num_beams=options.num_beams,
        max_new_tokens=options.max_new_tokens,
        repetition_penalty=options.repetition_penalty,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        use_cache=True,
    )


def logits_processors(options: GenerationOptions) -> LogitsProcessorList:
    """Sampling by the options; new ones for each call of ``generate``."""
    if not options.temperature:
        return LogitsProcessorList()
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(options.temperature)]
    if options.top_p < 1:
        warpers.append(TopPLogitsWarper(options.top_p))
    return LogitsProcessorList([*warpers, GumbelNoise(options.seed)])


class GumbelNoise(LogitsProcessor):
    """Makes the largest logit a sample of their softmax (Gumbel-max; Maddison et al.,
    arXiv:1411.0030).

    Every row of a batch gets the same noise: a caption does not depend on its batch. The
    noise is drawn on the device of the logits: one seed gives different captions on a GPU and on a
    CPU, and may do so on two kinds of GPU.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.generator: torch.Generator | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [B, vocabulary]"""
        if self.generator is None:
            self.generator = torch.Generator(scores.device).manual_seed(self.seed)
        noise = torch.empty(scores.shape[1], dtype=torch.float64, device=scores.device)
        noise.exponential_(generator=self.generator)
        return scores - noise.log().to(scores)


def generate_captions(
    model: Model,
    builder: SequenceBuilder,
    features: Features,
    prompts: Sequence[str | None],
    options: GenerationOptions,
    **more,
) -> list[str]:
    """Captions of one batch; the arguments are those of :func:`generate_batch`."""
    return generate_batch(model, builder, features, prompts, options, **more)[0]


@torch.no_grad()
def generate_batch(
    model: Model,
    builder: SequenceBuilder,
    features: Features,
    prompts: Sequence[str | None],
    options: GenerationOptions,
    **more,
) -> tuple[list[str], list[bool]]:
    """Captions of one batch, and whether each ended at ``max_new_tokens`` and not by itself.

    Args:
        features: of B clips, see :meth:`Model.features`.
        prompts: B of them; None is the builder's own.
        more: for transformers' ``generate``, such as a ``streamer``.
    """
    projector = model.captioner.projector
    batch = builder.collate_generation(prompts, [projector.tokens_of(len(clip)) for clip in features])
    ids = model.captioner.generate(
        features,
        batch["input_ids"],
        batch["attention_mask"].to(features[0].device),
        generation_config(options, builder.eos_token_id, builder.pad_token_id),
        logits_processor=logits_processors(options),
        **more,
    )
    ended = (ids == builder.eos_token_id).any(dim=1) | (ids.shape[1] < options.max_new_tokens)
    return builder.decode(ids), (~ended).tolist()
