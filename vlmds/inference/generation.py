"""How captions are written: greedy, beam search or sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from vlmds.errors import InputError
from vlmds.models.assemble import Model
from vlmds.models.sequences import SequenceBuilder


@dataclass(frozen=True)
class GenerationOptions:
    """The default is greedy search.

    Args:
        max_new_tokens: a caption has at most so many tokens.
        num_beams: more than 1 is beam search.
        temperature: more than 0 is sampling, from logits divided by it.
        top_p: sampling takes from the fewest tokens whose probability reaches it (Holtzman et al.,
            arXiv:1904.09751).
        repetition_penalty: logits of tokens that the caption has already are divided by it, or
            multiplied where negative (Keskar et al., arXiv:1909.05858); 1 is none.
        seed: of sampling.

    Raises:
        InputError: a value out of its range, or beam search with sampling.
    """

    max_new_tokens: int = 128
    num_beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name, good, what in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("num_beams", self.num_beams >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("seed", 0 <= self.seed < 1 << 62, "0 or more"),
        ):
            if not good:
                raise InputError(f"{name} {getattr(self, name)}: must be {what}")
        if self.num_beams > 1 and self.temperature:
            raise InputError(
                f"num_beams {self.num_beams} with temperature {self.temperature:g}: "
                "beam search does not sample; leave one of them out"
            )
        if self.top_p < 1 and not self.temperature:
            raise InputError(f"top_p {self.top_p:g}: is of sampling; set temperature, too")

    def config(self, eos_token_id: int, pad_token_id: int) -> GenerationConfig:
        # Sampling is a search for the largest of noisy logits: see GumbelNoise.
        return GenerationConfig(
            do_sample=False,
            num_beams=self.num_beams,
            max_new_tokens=self.max_new_tokens,
            repetition_penalty=self.repetition_penalty,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            use_cache=True,
        )

    def processors(self) -> LogitsProcessorList:
        """New ones for each call of ``generate``."""
        if not self.temperature:
            return LogitsProcessorList()
        warpers = [TemperatureLogitsWarper(self.temperature)]
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return LogitsProcessorList([*warpers, GumbelNoise(self.seed)])


class GumbelNoise(LogitsProcessor):
    """Makes the largest logit a sample of their softmax (Gumbel-max; Maddison et al.,
    arXiv:1411.0030).

    Every row of a batch gets the same noise, so that a caption does not depend on what it was
    batched with. It is drawn where the logits are: a seed's captions on a GPU are others than on a
    CPU, and may be others on another kind of GPU.
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


@torch.no_grad()
def generate_captions(
    model: Model,
    builder: SequenceBuilder,
    features: Tensor,
    prompts: Sequence[str | None],
    options: GenerationOptions,
    **more,
) -> list[str]:
    """Captions of one batch.

    Args:
        features: [B, N, vision width], see :meth:`Model.features`.
        prompts: B of them; None is the builder's own.
        more: for transformers' ``generate``, such as a ``streamer``.
    """
    batch = builder.collate_generation(prompts)
    ids = model.captioner.generate(
        features,
        batch["input_ids"],
        batch["attention_mask"].to(features.device),
        options.config(builder.eos_token_id, builder.pad_token_id),
        logits_processor=options.processors(),
        **more,
    )
    return builder.decode(ids)
