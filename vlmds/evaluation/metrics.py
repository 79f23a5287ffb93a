"""Caption metrics suited to Korean, with bootstrap intervals.

Korean attaches particles and endings to its words, so words split at whitespace rarely match: n-grams
are taken over morphemes (Kiwi, the extra ``korean``) and over characters, which need no package.
All text is NFC-normalised first (macOS writes Hangul as separate letters); nothing else is
changed or dropped. All metrics are scaled by 100, as papers print them:

- ``cider_d``: CIDEr-D (arXiv:1411.5726), document frequencies from the references given here;
  undefined if all clips have the same n-grams in their references (one clip, or equal references)
- ``bleu4``: corpus BLEU-4, unsmoothed over the corpus (sacrebleu)
- ``rouge_l``: ROUGE-L F-measure with beta 1.2, as COCO's evaluation has it
- ``chrf++``: corpus chrF2++ (sacrebleu); its word n-grams run over morphemes, or words at whitespace

METEOR is left out: its stemmer, synonyms and paraphrases do not exist for Korean, and without them
it is another metric under the same name.

A metric of many clips is a function of the mean of per-clip statistics. A bootstrap, also a
paired one over many models, is therefore a matrix product.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from pycocoevalcap.cider.cider_scorer import CiderScorer
from pycocoevalcap.rouge.rouge import Rouge
from sacrebleu.metrics import BLEU, CHRF

from vlmds.errors import InputError

METRICS = ("cider_d", "bleu4", "rouge_l", "chrf++")
SHARE = "share"
"""Name, for :func:`aggregate`, of errors over words, in percent: its statistics are [errors, words]."""
RESAMPLES = 1000


@dataclass(frozen=True)
class Tokenizer:
    """level: "morpheme" or "char". name: of the implementation, with its version."""

    level: str
    name: str
    split: Callable[[str], list[str]]


def normalise(text: str) -> str:
    """NFC, with runs of whitespace as one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def characters(text: str) -> list[str]:
    """Every character but whitespace."""
    return [c for c in normalise(text) if not c.isspace()]


CHARACTERS = Tokenizer("char", "Unicode characters, NFC, without whitespace", characters)


@cache
def morphemes() -> Tokenizer | None:
    """Kiwi's morphemes, or None where kiwipiepy is not installed."""
    try:
        import kiwipiepy
        import kiwipiepy_model
    except ImportError:
        return None
    name = f"Kiwi {kiwipiepy.__version__}, model {kiwipiepy_model.__version__}"
    # A form may contain a space ("할 수"), and tokens are joined by spaces below.
    return Tokenizer("morpheme", name, lambda text: [part for form, _ in kiwi_tokens(text) for part in form.split()])


def kiwi_tokens(text: str) -> list[tuple[str, str]]:
    """(form, part of speech) of each of Kiwi's tokens; where it is installed (see :func:`morphemes`)."""
    return [(token.form, token.tag) for token in _kiwi().tokenize(normalise(text))]


@cache
def _kiwi():
    import kiwipiepy

    return kiwipiepy.Kiwi(num_workers=1)


def tokenizers() -> list[Tokenizer]:
    """The best level first."""
    found = morphemes()
    return [found, CHARACTERS] if found else [CHARACTERS]


@dataclass(frozen=True)
class Metric:
    """One metric of n clips. statistics: float64 [n, k], which :func:`aggregate` takes the mean of.
    per_clip: float64 [n]."""

    name: str
    tokenisation: str
    statistics: np.ndarray
    per_clip: np.ndarray

    @property
    def value(self) -> float:
        return float(aggregate(self.name, self.statistics.mean(axis=0)[None])[0])


def score_captions(
    captions: Sequence[str], references: Sequence[Sequence[str]], levels: Sequence[Tokenizer] | None = None
) -> dict[str, Metric]:
    """All metrics at all levels: {"cider_d@morpheme": …, …}; an undefined one is left out.

    Args:
        captions: one per clip, may be empty. references: one or more per clip.

    Raises:
        InputError: no clips, or a clip without a reference.
    """
    if not captions:
        raise InputError("no captions to score")
    if len(captions) != len(references) or not all(references):
        raise InputError("every caption needs at least one reference")
    scores = {}
    for tokenizer in levels or tokenizers():
        remembered = cache(lambda text, split=tokenizer.split: " ".join(split(text)))
        hypotheses = [remembered(c) for c in captions]
        targets = [[remembered(r) for r in rs] for rs in references]
        words, their_words = hypotheses, targets
        if tokenizer.level == "char":  # chrF takes characters itself
            words = [normalise(c) for c in captions]
            their_words = [[normalise(r) for r in rs] for rs in references]
        for name, found in (
            ("cider_d", _cider_d(hypotheses, targets)),
            (
                "bleu4",
                _sacre(
                    BLEU(tokenize="none", force=True, smooth_method="none"),
                    BLEU(tokenize="none", force=True, effective_order=True),
                    hypotheses,
                    targets,
                ),
            ),
            ("rouge_l", _rouge_l(hypotheses, targets)),
            ("chrf++", _sacre(CHRF(word_order=2), CHRF(word_order=2), words, their_words)),
        ):
            if found is not None:
                full_name = f"{name}@{tokenizer.level}"
                scores[full_name] = Metric(full_name, tokenizer.name, *found)
    return scores


def undefined_metrics(defined: Collection[str]) -> list[str]:
    """The metrics that are missing at the levels of those that are defined."""
    levels = dict.fromkeys(name.partition("@")[2] for name in defined)
    return [name for level in levels for metric in METRICS if (name := f"{metric}@{level}") not in defined]


def aggregate(name: str, means: np.ndarray) -> np.ndarray:
    """Mean statistics [m, k] of a metric -> its values [m]."""
    kind = name.partition("@")[0]
    if kind == "bleu4":
        return _bleu(means)
    if kind == "chrf++":
        return _chrf(means)
    if kind == SHARE:
        return 100 * np.divide(means[:, 0], means[:, 1], out=np.zeros(len(means)), where=means[:, 1] > 0)
    return means[:, 0]


def resampled_means(
    statistics: Sequence[np.ndarray], resamples: int = RESAMPLES, seed: int = 0, sources: Sequence[str] | None = None
) -> list[np.ndarray]:
    """Means of bootstrap resamples of the sources (default: of the clips), the same for every array: paired.

    Args:
        statistics: arrays [n, k_i] over the same n clips.
        sources: the video that each clip is from; clips of one video resemble each other, so they are drawn together.

    Returns:
        Arrays [resamples, k_i].
    """
    stacked, sizes = np.concatenate(statistics, axis=1), np.ones(len(statistics[0]))
    if sources is not None:
        _, numbers = np.unique(sources, return_inverse=True)
        sizes = np.bincount(numbers).astype(np.float64)
        by_source = np.zeros((len(sizes), stacked.shape[1]))
        np.add.at(by_source, numbers, stacked)
        stacked = by_source
    n = len(sizes)
    random = np.random.RandomState(seed)
    rows = []
    for first in range(0, resamples, 100):
        size = min(100, resamples - first)
        drawn = random.randint(0, n, (size, n)) + np.arange(size)[:, None] * n
        weights = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        rows.append(weights @ stacked / (weights @ sizes)[:, None])
    ends = np.cumsum([s.shape[1] for s in statistics])[:-1]
    return np.split(np.concatenate(rows), ends, axis=1)


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The central 95% of bootstrap values."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def summarise(
    scores: dict[str, Metric], sources: Sequence[str] | None = None, resamples: int = RESAMPLES
) -> dict[str, dict]:
    """Each metric's value, 95% bootstrap interval over the sources (default: over the clips), and tokenisation."""
    means = resampled_means([m.statistics for m in scores.values()], resamples, sources=sources)
    summary = {}
    for (name, metric), mean in zip(scores.items(), means, strict=True):
        low, high = interval(aggregate(name, mean))
        summary[name] = {"value": metric.value, "low": low, "high": high, "tokenisation": metric.tokenisation}
    return summary


def describe_captions(captions: Sequence[str], level: Tokenizer | None = None) -> dict:
    """Statistics of the captions alone, without references.

    distinct_1, distinct_2: different n-grams over all n-grams (arXiv:1510.03055). repetition:
    share of a caption's 4-grams that occurred earlier in it, mean over the captions
    (arXiv:1908.04319). most_frequent: share of the most frequent caption.
    """
    level = level or tokenizers()[0]
    tokens = [level.split(c) for c in captions]
    counts = Counter(normalise(c) for c in captions)
    repeated = [1 - len(set(grams)) / len(grams) for t in tokens if (grams := list(_ngrams(t, 4)))]
    return {
        "captions": len(captions),
        "tokenisation": level.name,
        "mean_tokens": float(np.mean([len(t) for t in tokens])),
        "mean_characters": float(np.mean([len(characters(c)) for c in captions])),
        "distinct_1": _distinct(tokens, 1),
        "distinct_2": _distinct(tokens, 2),
        "repetition": float(np.mean(repeated)) if repeated else 0.0,
        "empty": counts[""] / len(captions),
        "different": len(counts) / len(captions),
        "most_frequent": counts.most_common(1)[0][1] / len(captions),
    }


def _ngrams(tokens: list[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(tokens[i:] for i in range(n)))


def _distinct(captions: list[list[str]], n: int) -> float:
    grams = [gram for tokens in captions for gram in _ngrams(tokens, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _cider_d(hypotheses: list[str], references: list[list[str]]) -> tuple[np.ndarray, np.ndarray] | None:
    scorer = CiderScorer(n=4, sigma=6.0)
    for hypothesis, targets in zip(hypotheses, references, strict=True):
        scorer += (hypothesis, targets)
    scorer.compute_doc_freq()
    # An n-gram that the references of all clips have weighs log(1) = 0. Without another, all is 0 / 0.
    if all(count >= len(hypotheses) for count in scorer.document_frequency.values()):
        return None
    values = 100 * np.array(scorer.compute_cider(), dtype=np.float64)
    return values[:, None], values


def _rouge_l(hypotheses: list[str], references: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
    rouge = Rouge()
    values = 100 * np.array(
        [rouge.calc_score([h], r) if h else 0.0 for h, r in zip(hypotheses, references, strict=True)]
    )
    return values[:, None], values


def _sacre(corpus, sentence, hypotheses: list[str], references: list[list[str]]):
    """sacrebleu's per-sentence statistics, which its significance tests resample."""
    most = max(map(len, references))
    padded = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    statistics = corpus._extract_corpus_statistics(hypotheses, padded)
    per_clip = [sentence._compute_score_from_stats(list(s)).score for s in statistics]
    return np.array(statistics, dtype=np.float64), np.array(per_clip, dtype=np.float64)


def _bleu(means: np.ndarray) -> np.ndarray:
    """Columns as sacrebleu's: caption length, reference length, correct 1…4, total 1…4."""
    length, target = means[:, 0], means[:, 1]
    correct, total = means[:, 2:6], means[:, 6:10]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(np.where(correct > 0, correct / total, 0)).mean(axis=1)
        brevity = np.where(length < target, np.exp(1 - target / length), 1.0)
        values = 100 * brevity * np.exp(logs)
    return np.where((correct > 0).all(axis=1), values, 0.0)


def _chrf(means: np.ndarray, beta: float = 2.0) -> np.ndarray:
    """Columns as sacrebleu's: for each order n-grams of caption, reference, both. The mean F over
    the orders that both have (its effective order)."""
    made, wanted, both = means[:, 0::3], means[:, 1::3], means[:, 2::3]
    present = (made > 0) & (wanted > 0)
    precision = np.divide(both, made, out=np.zeros_like(both), where=present).sum(axis=1)
    recall = np.divide(both, wanted, out=np.zeros_like(both), where=present).sum(axis=1)
    orders = np.maximum(present.sum(axis=1), 1)
    precision, recall = precision / orders, recall / orders
    denominator = beta**2 * precision + recall
    f = np.divide(
        (1 + beta**2) * precision * recall, denominator, out=np.zeros_like(denominator), where=denominator > 0
    )
    return 100 * f
