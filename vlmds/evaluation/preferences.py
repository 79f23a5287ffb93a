"""Estimates of which method people prefer, from comparisons of two captions of a clip.

The strengths are those of the Bradley-Terry model with ties (:mod:`vlmds.evaluation.bradley_terry`), over all answers
together. Their error has two parts:

- of the clips: by a cluster bootstrap over sources (videos), as clips and answers of one video are not independent.
- of the reviewers, a random effect: reviewer r sees method m at its strength + u_rm. The variance of u is that of the
  strengths fitted to each reviewer's own answers, pooled over the methods, less what the bootstrap says that the clips
  alone would make of it (as DerSimonian and Laird, Controlled Clinical Trials 7, 1986). Intervals are then for people
  like these reviewers. With one reviewer it is unknown, and they are for this reviewer only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse, stats
from scipy.sparse.csgraph import connected_components

from vlmds.evaluation.bradley_terry import Fit, fit, influences, lead_of, method_pairs, win_probability, win_slope
from vlmds.evaluation.statistics import CONFIDENCE, Estimates

DRAWS = 2000
REVIEWER_DRAWS = 400  # of the bootstrap that the variance between reviewers is compared with
FEWEST_OF_REVIEWER = 20
"""Answers with which a reviewer enters the variance between reviewers."""


@dataclass(frozen=True, eq=False)
class Comparisons:
    """Answers as arrays of n: the numbers of two methods (first < second), the outcome (0: the first is preferred,
    1: tied, 2: the second), the numbers of source, reviewer and pair, and whether the pair was drawn at random."""

    first: np.ndarray
    second: np.ndarray
    outcome: np.ndarray
    source: np.ndarray
    reviewer: np.ndarray
    pair: np.ndarray
    random: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    def of(self, kept: np.ndarray) -> Comparisons:
        """Those of a bool array, or of numbers."""
        return Comparisons(*(getattr(self, name)[kept] for name in self.__dataclass_fields__))


@dataclass(frozen=True, eq=False, kw_only=True)
class Preferences(Estimates):
    """Log-strengths of M methods (``values``; their mean is 0) with their errors.

    tie: of the Bradley-Terry model. by_sources: float64 [M, M], covariance by the bootstrap over sources. reviewers:
    that enter the variance between them. between: pooled variance of the reviewers' own strengths.
    reviewer_variance: what is left of it without the clips'. share: what of it the strengths have, about one over the
    number of reviewers.
    """

    tie: float
    by_sources: np.ndarray
    reviewers: int = 0
    between: float = 0.0
    reviewer_variance: float = 0.0
    share: float = 0.0

    @classmethod
    def fitted(
        cls, found: Fit, by_sources: np.ndarray, per_source: np.ndarray, sizes: np.ndarray, pairs: int, **reviewers: Any
    ) -> Preferences:
        """Of a fitted model. per_source: float64 [M, G], influence of each source. sizes: [G], its answers. pairs:
        how many were answered. reviewers: the fields on them."""
        methods = len(found.strengths)
        return cls(
            values=found.strengths,
            per_source=per_source,
            sizes=sizes,
            seeds=np.ones(methods, dtype=np.int64),
            seed_values=[found.strengths[m : m + 1] for m in range(methods)],
            clips=pairs,
            residual=0.0,
            tie=float(found.tie),
            by_sources=by_sources,
            **reviewers,
        )

    @property
    def reviewer_df(self) -> int:
        """Degrees of freedom of the variance between reviewers; 0: unknown."""
        return max(0, self.reviewers - 1) * (len(self.values) - 1)

    @cached_property
    def clip_covariance(self) -> np.ndarray:
        return self.by_sources

    @cached_property
    def covariance(self) -> np.ndarray:
        count = len(self.values)
        return self.by_sources + self.reviewer_variance * self.share * (np.eye(count) - 1 / count)

    def _error(self, w: np.ndarray) -> tuple[float, float]:
        """Standard error of a contrast, and Satterthwaite's degrees of freedom. Few reviewers that happen to agree
        prove little, so the doubt is that of their variance before the clips' is taken off."""
        of_clips = float(w @ self.by_sources @ w)
        weight = self.share * float(((w - w.mean()) ** 2).sum())
        variance = of_clips + weight * self.reviewer_variance
        doubt = of_clips**2 / max(1, self.sources - 1)
        if self.reviewer_df:
            doubt += (weight * self.between) ** 2 / self.reviewer_df
        df = variance**2 / doubt if doubt > 0 else 1.0
        return max(0.0, variance) ** 0.5, max(1.0, df)

    def win(self, one: int, other: int) -> dict[str, float]:
        """The probability that a method is preferred to another one, ties as half: value, low, high, p."""
        gap = self.pair(one, other)
        value, low, high = (float(win_probability(d, self.tie)) for d in (gap.value, gap.low, gap.high))
        return {"value": value, "low": low, "high": high, "p": gap.p}

    def average_win(self, method: int) -> dict[str, float]:
        """The same against the mean of all others. The interval is of the logit, by the delta method."""
        leads = np.delete(self.values[method] - self.values, method)
        value = float(win_probability(leads, self.tie).mean())
        weights = np.insert(-win_slope(leads, self.tie) / len(leads), method, 0.0)
        weights[method] = -weights.sum()
        error, df = self._error(weights)
        logit, reach = (
            np.log(value / (1 - value)),
            stats.t.ppf(0.5 + CONFIDENCE / 2, df) * error / (value * (1 - value)),
        )
        low, high = 1 / (1 + np.exp(-(logit + np.array([-reach, reach]))))
        return {"value": value, "low": float(low), "high": float(high)}

    def lead_of_share(self, margin: float) -> float:
        """The difference of strengths at which the better one is preferred with 1/2 + margin, ties as half."""
        return lead_of(0.5 + margin, self.tie)


def connected(comparisons: Comparisons, methods: int) -> np.ndarray:
    """Numbers of the largest set of methods that the comparisons link, directly or through others."""
    links = (np.ones(len(comparisons)), (comparisons.first, comparisons.second))
    _, part = connected_components(sparse.coo_array(links, shape=(methods, methods)), directed=False)
    return np.flatnonzero(part == np.bincount(part).argmax())


def counts_by(comparisons: Comparisons, cluster: np.ndarray, clusters: int, methods: int) -> np.ndarray:
    """float64 [clusters, P, 3]: counts of the outcomes for each pair of methods.

    Args:
        cluster: [n], the number of each answer's source.
    """
    place = np.zeros((methods, methods), dtype=np.int64)
    pairs = method_pairs(methods)
    place[pairs[:, 0], pairs[:, 1]] = np.arange(len(pairs))
    index = (cluster * len(pairs) + place[comparisons.first, comparisons.second]) * 3 + comparisons.outcome
    return np.bincount(index, minlength=clusters * len(pairs) * 3).reshape(clusters, len(pairs), 3).astype(np.float64)


def resampled(clusters: int, draws: int, seed: int = 0) -> np.ndarray:
    """float64 [draws, clusters]: how often each source is drawn."""
    drawn = np.random.default_rng(seed).integers(0, clusters, (draws, clusters))
    index = (drawn + clusters * np.arange(draws)[:, None]).ravel()
    return np.bincount(index, minlength=draws * clusters).reshape(draws, clusters).astype(np.float64)


def spread_of(draws: np.ndarray) -> np.ndarray:
    """The covariance [M, M] of draws [B, M]."""
    return np.atleast_2d(np.cov(draws, rowvar=False))


def estimate_preferences(comparisons: Comparisons, methods: int, seed: int = 0) -> Preferences:
    """Estimates of methods that the comparisons link (:func:`connected`).

    Args:
        comparisons: of pairs drawn at random.
    """
    _, source = np.unique(comparisons.source, return_inverse=True)
    _, reviewer = np.unique(comparisons.reviewer, return_inverse=True)
    clusters = int(source.max()) + 1
    counts = counts_by(comparisons, source, clusters, methods)
    found = fit(counts.sum(axis=0), methods)
    weights = resampled(clusters, DRAWS, seed)
    by_sources = spread_of(fit(_weighted(weights, counts), methods).strengths) * clusters / max(1, clusters - 1)
    answers = np.bincount(reviewer)
    often = np.flatnonzero(answers >= FEWEST_OF_REVIEWER)
    between, variance = 0.0, 0.0
    if len(often) > 1:
        own = np.stack(
            [counts_by(comparisons.of(reviewer == r), source[reviewer == r], clusters, methods) for r in often]
        )
        between, by_clips = _between_reviewers(own, weights[:REVIEWER_DRAWS], methods)
        variance = max(0.0, between - by_clips)
    return Preferences.fitted(
        found,
        by_sources,
        per_source=len(comparisons) * influences(counts, found).T,
        sizes=counts.sum(axis=(1, 2)),
        pairs=len(comparisons),
        reviewers=len(often),
        between=between,
        reviewer_variance=variance,
        share=float(((answers / answers.sum()) ** 2).sum()),
    )


def _between_reviewers(own: np.ndarray, weights: np.ndarray, methods: int) -> tuple[float, float]:
    """(pooled variance of the reviewers' strengths, what the clips alone make of it).

    Args:
        own: float64 [R, G, P, 3], each reviewer's counts. weights: of :func:`resampled`.
    """
    free = (len(own) - 1) * (methods - 1)
    strengths = fit(own.sum(axis=1), methods).strengths
    drawn = np.stack([fit(_weighted(weights, counts), methods).strengths for counts in own], axis=1)  # [B, R, M]
    apart = strengths - strengths.mean(axis=0)
    moved = drawn - drawn.mean(axis=1, keepdims=True) - apart
    return float((apart**2).sum() / free), float((moved**2).sum(axis=(1, 2)).mean() / free)


def _weighted(weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Counts [B, P, 3] of resampled sources, from weights [B, G] and counts [G, P, 3]."""
    return np.tensordot(weights, counts, axes=1)
