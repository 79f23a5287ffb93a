"""Do captions get chosen words right? Such as those that say a direction, which only a model that
sees the order of the frames can know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from vlmds.evaluation.metrics import interval, normalise, resampled_means


def words_told(
    captions: Sequence[Sequence[str]], references: Sequence[Sequence[str]], words: Sequence[str]
) -> dict | None:
    """How often a caption has exactly those of the words that a reference of its clip has.

    A word is there if a part of the text at whitespace begins with it: Korean particles follow
    (왼쪽: 왼쪽으로, 왼쪽에서). Clips whose references have none of the words do not count.

    Args:
        captions: of each experiment, one per clip. references: of each clip.

    Returns:
        None if no clip counts, else words, clips (how many count), chance (share of them that the
        one most frequent answer gets right) and values: for each experiment its share, with the
        95% bootstrap interval over the clips. Shares are in percent.
    """
    answers = [{found for r in refs if (found := _found(r, words))} for refs in references]
    kept = [i for i, answer in enumerate(answers) if answer]
    if not kept:
        return None
    frequent = Counter(answer for i in kept for answer in answers[i]).most_common(1)[0][0]
    right = [np.array([[100.0 * (_found(texts[i], words) in answers[i])] for i in kept]) for texts in captions]
    values = []
    for own, means in zip(right, resampled_means(right), strict=True):
        low, high = interval(means[:, 0])
        values.append({"value": float(own.mean()), "low": low, "high": high})
    return {
        "words": list(words),
        "clips": len(kept),
        "values": values,
        "chance": 100 * float(np.mean([frequent in answers[i] for i in kept])),
    }


def _found(text: str, words: Sequence[str]) -> frozenset[str]:
    parts = normalise(text).split()
    return frozenset(w for w in map(normalise, words) if any(p.startswith(w) for p in parts))
