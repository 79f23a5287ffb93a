"""The sequence builder, which training, evaluation and inference share, so that all see the same tokens.

A sequence is the chat template's user turn (visual tokens, then the prompt), then the assistant's
turn: the caption and the end-of-turn token, which alone carry loss.

Prompts and captions are data. What looks like a control token in them, such as ``<|im_end|>`` or
``<think>``, is encoded as ordinary text: only the chat template's own control tokens are special.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlmds.errors import InputError
from vlmds.models.captioner import IGNORE, VISUAL

_VISUAL_MARK, _TEXT_MARK = "\u2402VISUAL\u2403", "\u2402TEXT\u2403"
"""Stand for the visual tokens and for a user's text while the chat template is rendered."""


@dataclass(frozen=True)
class TokenSequence:
    """input_ids, labels: lists of equal length; VISUAL marks visual tokens, IGNORE no loss. cut: the
    caption was longer than allowed."""

    input_ids: list[int]
    labels: list[int]
    cut: bool = False


class SequenceBuilder:
    """Builds token sequences for one tokenizer, prompt and number of visual tokens.

    Args:
        tokenizer: a fast tokenizer with a chat template whose turns end with its eos token.
        prompt: the experiment's default prompt; a sample may bring its own.
        num_visual_tokens: M.
        max_caption_tokens: longer captions are cut, and then carry no end-of-turn token: the model
            must not learn to stop in mid-sentence. Nothing else is ever cut.

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
        self._added = tokenizer.get_added_vocab()  # control tokens: text -> id
        self._check_end_of_turn()
        user = [{"role": "user", "content": _VISUAL_MARK + _TEXT_MARK}]
        text = self._rendered(user, add_generation_prompt=True, enable_thinking=False)
        self._before, mark, after = text.partition(_VISUAL_MARK + _TEXT_MARK)
        if not mark:
            raise InputError("llm.model: the chat template does not keep the user's text as it is")
        # The template's text up to its next control token is encoded together with the prompt.
        end = min((after.find(token) for token in self._added if token in after), default=len(after))
        self._joined, self._after = after[:end], after[end:]

    def render(self, prompt: str | None = None) -> tuple[str, str]:
        """The user's turn as text: what stands before and what stands after the visual tokens."""
        return self._before, self._text(prompt) + self._after

    def prompt_ids(self, prompt: str | None = None, num_visual_tokens: int | None = None) -> list[int]:
        """Token ids up to where the caption begins. num_visual_tokens: None for those of a clip."""
        visual = [VISUAL] * (self.num_visual_tokens if num_visual_tokens is None else num_visual_tokens)
        text = self._encode_text(self._text(prompt))
        return self._encode(self._before) + visual + text + self._encode(self._after)

    def training(self, caption: str, prompt: str | None = None, num_visual_tokens: int | None = None) -> TokenSequence:
        """Prompt, caption and end of turn. num_visual_tokens: None for those of a clip.

        Raises:
            ValueError: the caption has no tokens, so the sample would teach nothing.
        """
        target = self._encode_text(caption.strip())
        if not target:
            raise ValueError("the caption has no tokens: nothing to learn from")
        cut = len(target) > self.max_caption_tokens
        target = target[: self.max_caption_tokens] if cut else [*target, self.eos_token_id]
        ids = self.prompt_ids(prompt, num_visual_tokens)
        return TokenSequence(ids + target, [IGNORE] * len(ids) + target, cut)

    def collate_training(self, sequences: Sequence[TokenSequence]) -> dict[str, Tensor]:
        """Right-padded ``input_ids`` and ``labels``, int64 [B, L]."""
        length = max(len(s.input_ids) for s in sequences)
        return {
            "input_ids": torch.tensor(
                [s.input_ids + [self.pad_token_id] * (length - len(s.input_ids)) for s in sequences]
            ),
            "labels": torch.tensor([s.labels + [IGNORE] * (length - len(s.labels)) for s in sequences]),
        }

    def collate_generation(
        self, prompts: Sequence[str | None], visual: Sequence[int | None] | None = None
    ) -> dict[str, Tensor]:
        """Left-padded ``input_ids`` and ``attention_mask``, int64 [B, L]. visual: numbers of visual tokens; None
        for those of a clip."""
        counts = visual or [None] * len(prompts)
        rows = [self.prompt_ids(prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
        length = max(map(len, rows))
        return {
            "input_ids": torch.tensor([[self.pad_token_id] * (length - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        }

    def decode(self, token_ids: Tensor) -> list[str]:
        """Generated ids [B, T] -> captions."""
        texts = self.tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _text(self, prompt: str | None) -> str:
        return (self.prompt if prompt is None else prompt) + self._joined

    def _encode(self, text: str) -> list[int]:
        """Token ids of the chat template's text, with its control tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _encode_text(self, text: str) -> list[int]:
        """Token ids of a user's text, without any control token."""
        ids = self._encode(text)
        if set(ids).isdisjoint(self._added.values()):
            return ids
        return self._plain.encode(text, add_special_tokens=False).ids

    @cached_property
    def _plain(self) -> Tokenizer:
        """The tokenizer without its added tokens, those that are not marked as special included
        (Qwen3's ``<think>``). Few texts need it, and a large vocabulary takes a second to build."""
        described = json.loads(self.tokenizer.backend_tokenizer.to_str())
        return Tokenizer.from_str(json.dumps({**described, "added_tokens": []}))

    def _rendered(self, messages: list[dict[str, str]], **options: Any) -> str:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        assert isinstance(text, str)  # as it is not tokenised
        return text

    def _check_end_of_turn(self) -> None:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _TEXT_MARK}]
        end = self._rendered(turns).partition(_TEXT_MARK)[2]
        if not self.tokenizer.eos_token or not end.startswith(self.tokenizer.eos_token):
            raise InputError(
                f"llm.model: the chat template ends an answer with {end[:20]!r}, "
                f"not with the tokenizer's eos token {self.tokenizer.eos_token!r}"
            )
