"""The one sequence builder: training, evaluation and inference see the same tokens.

A sequence is the chat template's user turn (visual tokens, then the prompt), then the assistant's
turn: the caption and the end-of-turn token, which alone carry loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlmds.errors import InputError
from vlmds.models.captioner import IGNORE, VISUAL

_MARK = "\u2402VISUAL\u2403"  # stands for the visual tokens while the template is rendered


@dataclass(frozen=True)
class TokenSequence:
    """input_ids, labels: lists of equal length; VISUAL marks visual tokens, IGNORE no loss."""

    input_ids: list[int]
    labels: list[int]


class SequenceBuilder:
    """Builds token sequences for one tokenizer, prompt and number of visual tokens.

    Args:
        tokenizer: with a chat template whose turns end with its eos token.
        prompt: the experiment's default prompt; a sample may bring its own.
        num_visual_tokens: M.
        max_caption_tokens: longer captions are cut, and then carry no end-of-turn token, so that
            the model does not learn to stop in mid-sentence. Nothing else is ever cut.

    Raises:
        InputError: the chat template drops or alters the user's text, or ends an assistant turn
            with something other than the eos token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: str, num_visual_tokens: int, max_caption_tokens: int = 256
    ):
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.num_visual_tokens = num_visual_tokens
        self.max_caption_tokens = max_caption_tokens
        self.eos_token_id = tokenizer.eos_token_id
        self.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._check_end_of_turn()

    def render(self, prompt: str | None = None) -> tuple[str, str]:
        """The prompt as text: what stands before and what stands after the visual tokens."""
        message = [{"role": "user", "content": _MARK + (self.prompt if prompt is None else prompt)}]
        text = self.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        before, mark, after = text.partition(_MARK)
        if not mark or (prompt or self.prompt) not in after:
            raise InputError("llm.model: the chat template does not keep the user's text as it is")
        return before, after

    def prompt_ids(self, prompt: str | None = None) -> list[int]:
        """Token ids up to where the caption begins."""
        before, after = (self._encode(part) for part in self.render(prompt))
        return before + [VISUAL] * self.num_visual_tokens + after

    def training(self, caption: str, prompt: str | None = None) -> TokenSequence:
        """Prompt, caption and end of turn.

        Raises:
            ValueError: the caption has no tokens, so the sample would teach nothing.
        """
        target = self._encode(caption.strip())
        if not target:
            raise ValueError("the caption has no tokens: nothing to learn from")
        if len(target) > self.max_caption_tokens:
            target = target[: self.max_caption_tokens]
        else:
            target = [*target, self.eos_token_id]
        ids = self.prompt_ids(prompt)
        return TokenSequence(ids + target, [IGNORE] * len(ids) + target)

    def collate_training(self, sequences: Sequence[TokenSequence]) -> dict[str, Tensor]:
        """Right-padded ``input_ids`` and ``labels``, int64 [B, L]."""
        length = max(len(s.input_ids) for s in sequences)
        return {
            "input_ids": torch.tensor(
                [s.input_ids + [self.pad_token_id] * (length - len(s.input_ids)) for s in sequences]
            ),
            "labels": torch.tensor([s.labels + [IGNORE] * (length - len(s.labels)) for s in sequences]),
        }

    def collate_generation(self, prompts: Sequence[str | None]) -> dict[str, Tensor]:
        """Left-padded ``input_ids`` and ``attention_mask``, int64 [B, L]."""
        rows = [self.prompt_ids(prompt) for prompt in prompts]
        length = max(map(len, rows))
        return {
            "input_ids": torch.tensor([[self.pad_token_id] * (length - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        }

    def decode(self, token_ids: Tensor) -> list[str]:
        """Generated ids [B, T] -> captions."""
        texts = self.tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _check_end_of_turn(self) -> None:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        end = text.partition(_MARK)[2]
        if not self.tokenizer.eos_token or not end.startswith(self.tokenizer.eos_token):
            raise InputError(
                f"llm.model: the chat template ends an answer with {end[:20]!r}, "
                f"not with the tokenizer's eos token {self.tokenizer.eos_token!r}"
            )
