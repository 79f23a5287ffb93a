"""Captions that are too long for training, counted with the language model's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlmds.errors import InputError
from vlmds.experiments.schema import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 1000  # captions
SHOWN = 5  # row numbers


class CutCaptions:
    """Counts the captions of more tokens than training uses of one; without a tokenizer, none.

    tokenizer: folder or hub name, or NAME@REVISION. most: tokens, by default that of
    `data.max_caption_tokens`. Raises InputError if there is no such tokenizer.
    """

    def __init__(self, tokenizer: str | None, most: int | None = None):
        self.most = DataConfig().max_caption_tokens if most is None else most
        self._tokenizer = None if tokenizer is None else _load(tokenizer)
        self._waiting: list[tuple[str, int]] = []
        self._rows: list[int] = []
        self.total, self.cut = 0, 0

    def add(self, captions: list[str], row: int) -> None:
        """Count these captions of a manifest row."""
        if self._tokenizer is not None:
            self._waiting += [(caption, row) for caption in captions]
            if len(self._waiting) >= BATCH:
                self._count()

    def notes(self) -> list[str]:
        """A line for the user, if there is a tokenizer."""
        if self._tokenizer is None:
            return []
        self._count()
        share = f" ({self.cut / self.total:.1%})" if self.cut else ""
        line = f"captions longer than {self.most} tokens, which training cuts: {self.cut:,} of {self.total:,}{share}"
        if self.cut:
            more = " …" if len(self._rows) == SHOWN else ""
            line += f", such as row {', '.join(map(str, self._rows))}{more}"
        return [line]

    def _count(self) -> None:
        texts, self._waiting = self._waiting, []
        if not texts or self._tokenizer is None:
            return
        found = self._tokenizer([text for text, _ in texts], add_special_tokens=False)["input_ids"]
        for ids, (_, row) in zip(found, texts, strict=True):
            self.total += 1
            if len(ids) > self.most:
                self.cut += 1
                if len(self._rows) < SHOWN and row not in self._rows:
                    self._rows.append(row)


def _load(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer alone; of a hub name, its files are downloaded without the model's weights."""
    from transformers import AutoTokenizer

    from vlmds.models.hub import is_local
    from vlmds.models.pretrained import loading

    model, _, revision = (name, "", "") if is_local(name) else name.partition("@")
    if is_local(name) and not Path(name).is_dir():
        raise InputError(f"--tokenizer {name}: no such folder")
    with loading("--tokenizer", name):
        return AutoTokenizer.from_pretrained(model, revision=revision or None)
