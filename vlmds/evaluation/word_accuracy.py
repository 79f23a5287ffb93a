"""Word accuracy: how often captions contain the correct ones of some chosen words, such as directions,
which depend on the order of the frames."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from vlmds.evaluation.metrics import interval, morphemes, normalise, resampled_means

PARTICLES = frozenset(
    "은 는 이 가 을 를 의 도 만 에 로 으로 와 과 랑 이랑 에서 에게 부터 까지 보다 처럼 쪽 이나 나 "
    "에는 에도 에만 에서는 에서도 에서부터 으로는 으로도 으로만 로는 로도 로만 으로부터 로부터 까지는 부터는 과는 와는 이며 이고".split()
)
"""What may follow a noun in one word; used where Kiwi is not installed."""


def word_accuracy(
    captions: Sequence[Sequence[str]], references: Sequence[Sequence[str]], words: Sequence[str]
) -> dict | None:
    """How often a caption has exactly those of the words that a reference of its clip has.

    A word counts where the text has its morphemes in a row (왼쪽: 왼쪽으로, 왼쪽에서; but 위: not 위험한).
    Clips whose references have none of the words do not count.

    Args:
        captions: of each experiment, one per clip. references: of each clip.

    Returns:
        None if no clip counts, else words, clips (how many count), chance (share of them that the
        one most frequent answer gets right) and values: for each experiment its share, with the
        95% bootstrap interval over the clips. Shares are in percent.
    """
    answers = [{found for text in texts if (found := found_words(text, words))} for texts in references]
    kept = [i for i, answer in enumerate(answers) if answer]
    if not kept:
        return None
    frequent = Counter(answer for i in kept for answer in answers[i]).most_common(1)[0][0]
    right = [np.array([[100.0 * (found_words(texts[i], words) in answers[i])] for i in kept]) for texts in captions]
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


def found_words(text: str, words: Sequence[str]) -> frozenset[str]:
    """Those of the words that the text has."""
    plain = [re.sub(r"^\W+|\W+$", "", part) for part in normalise(text).split()]
    kiwi = morphemes()
    tokens = kiwi.split(text) if kiwi else []

    def there(word: str) -> bool:
        if word in plain:
            return True
        if kiwi is None:
            return any(part.startswith(word) and part[len(word) :] in PARTICLES for part in plain)
        wanted = kiwi.split(word)
        return any(tokens[i : i + len(wanted)] == wanted for i in range(len(tokens) - len(wanted) + 1))

    return frozenset(word for word in map(normalise, words) if there(word))
