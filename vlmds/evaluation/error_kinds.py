"""Errors of captions by kind: what captions miss (objects, attributes, actions, numbers, directions) and what they
invent.

The kinds of words come from a list with synonyms, and of all other words from Kiwi's parts of speech: nouns are
objects, verbs (also a noun with 하다) actions, adjectives attributes, numerals numbers. Only what most references of
a clip have counts as missed. Invented are the objects of a caption that none of its references has, as a share of
its objects (CHAIR-i, arXiv:1809.02156). Without Kiwi only the list's words count, as whole words with their
particles, and inventions are not known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vlmds.errors import InputError
from vlmds.evaluation.metrics import SHARE, kiwi_tokens, morphemes, normalise
from vlmds.evaluation.statistics import estimate, holm
from vlmds.evaluation.word_accuracy import found_words

KINDS = {
    "object": ("object", "사물"),
    "attribute": ("attribute", "속성"),
    "action": ("action", "동작"),
    "number": ("number", "수량"),
    "direction": ("direction", "방향"),
}
INVENTED = "invented"
NAMES = {**KINDS, INVENTED: ("invented objects", "없는 사물")}
"""Each kind in English and Korean."""
OF_TAG = {"NNG": "object", "NNP": "object", "VV": "action", "VA": "attribute", "NR": "number", "SN": "number"}
LIGHT = frozenset("하 되 있 없 같 보이".split())  # verbs and adjectives that describe nothing
SHOWN = 5  # words

Unit = tuple[str, str]  # kind and word, or the first word of its group


@dataclass(frozen=True)
class WordList:
    """groups: (kind, words that mean the same), the most important first."""

    groups: tuple[tuple[str, tuple[str, ...]], ...]


def read_word_list(path: Path | None = None) -> WordList:
    """The packaged list, after the groups of a team's own file.

    Raises:
        InputError: the file cannot be read, or is not kind -> list of lists of words.
    """
    text = resources.files("vlmds.evaluation").joinpath("word_list_ko.yaml").read_text(encoding="utf-8")
    groups = _groups(text, "word_list_ko.yaml")
    if path is not None:
        try:
            own = _groups(path.read_text(encoding="utf-8"), f"--word-list {path}")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--word-list {path}: cannot be read ({error})") from None
        groups = [*own, *groups]
    return WordList(tuple(groups))


def _groups(text: str, where: str) -> list[tuple[str, tuple[str, ...]]]:
    try:
        read = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{where}: no valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(read, dict) or (unknown := [kind for kind in read if kind not in KINDS]):
        listed = f"; {unknown[0]!r} is none" if isinstance(read, dict) else ""
        raise InputError(f"{where}: must map kinds ({', '.join(KINDS)}) to lists of groups of words{listed}")
    groups = []
    for kind, listed in read.items():
        for group in listed if isinstance(listed, list) else [None]:
            words = group if isinstance(group, list) else [group]
            if not all(isinstance(word, str | int) and str(word).strip() for word in words):
                raise InputError(
                    f"{where}: {kind}: must be a list of groups of words, such as [[왼쪽, 좌측], [오른쪽]]"
                )
            groups.append((kind, tuple(normalise(str(word)) for word in words)))
    return groups


class Units:
    """Finds the units (kind, word) of texts."""

    def __init__(self, words: WordList):
        self._groups = words.groups
        self._with_kiwi = morphemes() is not None
        self._of_word: dict[str, Unit] = {}
        for kind, group in words.groups:
            for word in group:
                self._of_word.setdefault(word, (kind, group[0]))
        self._sequences: dict[tuple[str, ...], Unit] = {}
        if self._with_kiwi:
            for word, unit in self._of_word.items():
                self._sequences.setdefault(tuple(form for form, _ in _content(word)), unit)
        self._longest = max(map(len, self._sequences), default=0)
        self.of = cache(self._of)

    @property
    def kinds(self) -> list[str]:
        """That are known."""
        return [*NAMES] if self._with_kiwi else list(dict.fromkeys(kind for kind, _ in self._groups))

    def _of(self, text: str) -> frozenset[Unit]:
        if not self._with_kiwi:
            return frozenset(self._of_word[word] for word in found_words(text, [*self._of_word]))
        tokens, found, place = _content(text), set(), 0
        while place < len(tokens):
            for length in range(min(self._longest, len(tokens) - place), 0, -1):
                part = tokens[place : place + length]
                unit = self._sequences.get(tuple(form for form, _ in part))
                # A verb is no number or direction: 두다 is not 두.
                if unit and not (unit[0] in ("number", "direction") and part[0][1] == "VV"):
                    found.add(unit)
                    place += length
                    break
            else:
                form, tag = tokens[place]
                kind = "action" if place + 1 < len(tokens) and tokens[place + 1][1] == "XSV" else OF_TAG.get(tag)
                if kind and not (tag in ("VV", "VA") and form in LIGHT):
                    found.add((kind, form))
                place += 1
        return frozenset(found)


def _content(text: str) -> list[tuple[str, str]]:
    """(form, part of speech) of Kiwi's morphemes but for particles and endings."""
    tokens = [(form, tag.partition("-")[0]) for form, tag in kiwi_tokens(text)]
    return [token for token in tokens if token[1][0] not in "JE"]


def error_table(
    captions: Sequence[Sequence[Sequence[str]]],
    references: Sequence[Sequence[str]],
    sources: Sequence[str],
    best: int,
    words: WordList,
) -> dict[str, Any]:
    """Shares of errors of each experiment by kind, and whether they differ from those of one of them.

    Args:
        captions: of each experiment and seed, one per clip. references: of each clip. sources: the videos.
        best: the experiment that the others are compared with.

    Returns:
        "kinds": {kind: {"units": how many the references have, "cells": one per experiment}}; a cell has "value"
        (percent), "low", "high" (95% interval over videos and seeds), "p_holm" (of its paired difference to ``best``,
        corrected for all tests of the table; None for ``best``) and "words" (the most frequent errors). "kiwi":
        whether it was there.
    """
    units = Units(words)
    targets, mentioned = [], []
    for texts in references:
        counts = Counter(unit for text in texts for unit in units.of(text))
        targets.append({unit for unit, count in counts.items() if 2 * count > len(texts)})
        mentioned.append(set(counts))
    made = [[[units.of(text) for text in seed] for seed in group] for group in captions]
    kinds: dict[str, Any] = {}
    for kind in units.kinds:
        errors = [[_errors(kind, seed, targets, mentioned) for seed in group] for group in made]
        statistics = [
            np.array([[(len(e), n) for e, n in seed] for seed in group], dtype=np.float64) for group in errors
        ]
        if not any(group[..., 1].any() for group in statistics):
            continue
        found = estimate(SHARE, statistics, sources)
        cells = []
        for method, group in enumerate(errors):
            own = found.single(method)
            frequent = Counter(word for seed in group for wrong, _ in seed for word in wrong).most_common(SHOWN)
            p = None if method == best else found.pair(method, best).p
            cells.append({"value": own.value, "low": own.low, "high": own.high, "p": p, "words": frequent})
        kinds[kind] = {"units": int(statistics[best][0, :, 1].sum()), "cells": cells}
    tested = [cell for row in kinds.values() for cell in row["cells"] if cell["p"] is not None]
    for cell, p_holm in zip(tested, holm([cell["p"] for cell in tested]), strict=True):
        cell["p_holm"] = p_holm
    return {"kinds": kinds, "kiwi": morphemes() is not None}


def _errors(
    kind: str, captions: Sequence[frozenset[Unit]], targets: Sequence[set[Unit]], mentioned: Sequence[set[Unit]]
) -> list[tuple[list[str], int]]:
    """For each clip the wrong words of a kind, and of how many."""
    found = []
    for own, wanted, known in zip(captions, targets, mentioned, strict=True):
        if kind == INVENTED:
            those = {unit for unit in own if unit[0] == "object"}
            wrong = those - known
        else:
            those = {unit for unit in wanted if unit[0] == kind}
            wrong = those - own
        found.append((sorted(word for _, word in wrong), len(those)))
    return found
