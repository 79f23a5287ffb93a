"""The captioner: visual tokens placed among text embeddings, through the language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from vlmds.models.dora import norms_kept
from vlmds.models.loss import can_split, token_losses
from vlmds.models.projectors import Projector

VISUAL = -200
"""Placeholder id in ``input_ids`` where a visual token goes; no tokenizer has negative ids."""
IGNORE = -100
"""Label of a position without loss."""
Features = Tensor | Sequence[Tensor]
"""Patch features of B clips: [B, N, vision_dim], or B of [N, vision_dim] with different N."""


class Captioner(nn.Module):
    """Projector and language model: the module that the DeepSpeed engine trains.

    Args:
        projector: maps patch features to visual tokens.
        llm: a causal language model, with or without a PEFT adapter.
    """

    def __init__(self, projector: Projector, llm: PreTrainedModel | PeftModel):
        super().__init__()
        self.projector = projector
        self.llm: Any = llm  # a PeftModel passes on what it lacks to the model inside, which types cannot say

    def embed(self, features: Features, input_ids: Tensor) -> Tensor:
        """Put the visual tokens where the placeholders are.

        Args:
            features: patch features [B, N, vision_dim], or a list of B of different lengths N.
            input_ids: int64 [B, L], with ``projector.tokens_of(N)`` VISUAL in one piece in each row.
                Best left on the host, which otherwise waits for the GPU to find their places.

        Returns:
            Embeddings [B, L, llm_dim].

        Raises:
            ValueError: a row has other placeholders.
        """
        if isinstance(features, Tensor):
            visual = list(self.projector(features))  # B times [M, llm_dim]
        else:
            visual = [self.projector(clip) for clip in features]
        starts = visual_starts(input_ids, [len(tokens) for tokens in visual])
        ids = without_wait(input_ids, visual[0].device).clamp(min=0)
        text = self.llm.get_input_embeddings()(ids)  # [B, L, llm_dim]
        # Slices at places that the host knows, not a mask, whose backward pass would wait for the
        # GPU to count its elements.
        pieces = [
            piece
            for row, tokens, start in zip(text, visual, starts, strict=True)
            for piece in (row[:start], tokens.to(text.dtype), row[start + len(tokens) :])
        ]
        return torch.cat(pieces).unflatten(0, ids.shape)

    def forward(self, features: Features, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Summed cross-entropy over the supervised tokens, fp32 scalar.

        Args:
            features: as :meth:`embed`; input_ids, labels: int64 [B, L], IGNORE = no loss. Both
                are best left on the host, see :meth:`embed`.
        """
        return self.token_losses(features, input_ids, labels)[0].sum()

    def token_losses(self, features: Features, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each of the K supervised tokens, fp32 [K], and the row it is in, int64 [K].

        Rows are right-padded and no attention mask is passed: under causal attention padding
        cannot reach a real token, and SDPA keeps its causal fast path. Logits are computed only
        where the next token has a label, and only some at a time.

        Args: as :meth:`forward`.
        """
        embeds = self.embed(features, input_ids)  # [B, L, llm_dim]
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # position t predicts token t + 1
        supervised = targets != IGNORE  # [B, L] bool, K of them true
        found = supervised.nonzero(as_tuple=True)
        wanted, *places = without_wait(torch.stack([targets[found], *found]), embeds.device)
        head = self.llm.get_output_embeddings()
        if can_split(head, self.llm.config.model_type):
            hidden = self.llm.get_decoder()(
                inputs_embeds=embeds, use_cache=False, **without_mask(self.llm.config)
            ).last_hidden_state
            return token_losses(hidden[tuple(places)], head, wanted), places[0]
        logits = self.llm(
            inputs_embeds=embeds, use_cache=False, logits_to_keep=supervised.to(embeds.device)
        ).logits  # [K, vocabulary]
        return F.cross_entropy(logits.float().flatten(0, -2), wanted, reduction="none"), places[0]

    @torch.no_grad()
    @norms_kept()
    def generate(
        self, features: Features, input_ids: Tensor, attention_mask: Tensor, config: GenerationConfig, **more
    ) -> Tensor:
        """Captions with a KV cache.

        Args:
            features: as :meth:`embed`.
            input_ids, attention_mask: int64 [B, L], left-padded; input_ids as in :meth:`embed`.
            more: as transformers' ``generate`` takes them: ``logits_processor``, ``streamer``, …

        Returns:
            New token ids, int64 [B, at most config.max_new_tokens], padded with its pad token.
        """
        return self.llm.generate(
            inputs_embeds=self.embed(features, input_ids),
            attention_mask=attention_mask,
            generation_config=config,
            **more,
        )


def visual_starts(input_ids: Tensor, counts: Sequence[int]) -> list[int]:
    """Where the visual tokens of each row begin.

    Args:
        input_ids: int64 [B, L]. counts: B numbers of visual tokens.

    Raises:
        ValueError: a row does not have exactly so many placeholders, one after another.
    """
    places = input_ids == VISUAL  # [B, L]
    starts = places.int().argmax(1, keepdim=True)  # [B, 1], the first of each row
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    ends = starts + torch.tensor(counts, device=input_ids.device)[:, None]
    if not torch.equal(places, (columns >= starts) & (columns < ends)):
        raise ValueError(
            f"input_ids: rows have {places.sum(1).tolist()} placeholders; they must have {list(counts)}, "
            "one after another"
        )
    return starts.flatten().tolist()


def without_wait(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``. From the host to a GPU it is copied from pinned memory: with other
    memory the host may wait for the GPU's queued work."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # the same tensor, if it is pinned already
    return tensor.to(device, non_blocking=True)


def without_mask(config: PreTrainedConfig) -> dict[str, dict]:
    """Arguments by which Qwen3 knows that its causal attention needs no mask. It would find that out
    by itself, but from positions on the GPU, for which the host waits. Empty for other models."""
    plain = config.model_type == "qwen3" and config._attn_implementation != "eager" and not config.use_sliding_window
    return {"attention_mask": {"full_attention": None}} if plain else {}


def as_batch(tensors: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """The tensors stacked, or as a list if their shapes differ (clips and still pictures)."""
    alike = all(tensor.shape == tensors[0].shape for tensor in tensors)
    return torch.stack(list(tensors)) if alike else list(tensors)
