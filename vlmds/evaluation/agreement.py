"""How far reviewers agree, and shares of marks: figures that need no model of preferences."""

from __future__ import annotations

import numpy as np
from scipy import stats

from vlmds.evaluation.preferences import DRAWS, resampled
from vlmds.evaluation.statistics import CONFIDENCE


def share_interval(marked: np.ndarray, shown: np.ndarray) -> dict[str, float]:
    """A share with its 95% interval over sources: Clopper and Pearson's for the number of independent answers that has
    the variance of the clusters (Korn and Graubard, Survey Methodology 24, 1998); without variance, the sources.

    Args:
        marked, shown: float64 [G], counts of each source; together at least one is shown.

    Returns:
        "value", "low", "high".
    """
    marked, shown = marked[shown > 0], shown[shown > 0]
    total, sources = shown.sum(), len(shown)
    value = float(marked.sum() / total)
    variance = ((marked - value * shown) ** 2).sum() * sources / max(1, sources - 1) / total**2
    effective = min(value * (1 - value) / variance, total) if variance > 0 and 0 < value < 1 else sources
    if sources > 1:  # as the variance is not known either
        effective *= (stats.norm.ppf(0.5 + CONFIDENCE / 2) / stats.t.ppf(0.5 + CONFIDENCE / 2, sources - 1)) ** 2
    tail, hits = (1 - CONFIDENCE) / 2, value * effective
    low = stats.beta.ppf(tail, hits, effective - hits + 1) if value > 0 else 0.0
    high = stats.beta.ppf(1 - tail, hits + 1, effective - hits) if value < 1 else 1.0
    return {"value": value, "low": float(low), "high": float(high)}


def krippendorff_alpha(
    values: np.ndarray, categories: int, sources: np.ndarray | None = None
) -> dict[str, float] | None:
    """Krippendorff's alpha for nominal values (Content Analysis, 4th ed., 2018, chapter 12).

    Args:
        values: int [units, coders], from 0; -1: not coded.
        sources: [units]; units of one source are resampled together for the interval (default: each unit its own).

    Returns:
        "value", "low", "high" (95%, bootstrap), "units" that two coders or more coded; None if there are none, or all
        values are the same, for which alpha is undefined.
    """
    seen = np.stack([(values == category).sum(axis=1) for category in range(categories)], axis=1).astype(np.float64)
    coders = seen.sum(axis=1)
    kept = coders > 1
    seen, coders = seen[kept], coders[kept]
    if not len(seen):
        return None
    # Coincidences of each unit [units, categories, categories].
    pairs = seen[:, :, None] * seen[:, None, :] - seen[:, :, None] * np.eye(categories)
    pairs /= (coders - 1)[:, None, None]
    place = np.arange(len(kept)) if sources is None else np.asarray(sources)
    _, source = np.unique(place[kept], return_inverse=True)
    clusters = int(source.max()) + 1
    summed = np.zeros((clusters, categories, categories))
    np.add.at(summed, source, pairs)
    value = float(_alpha(summed.sum(axis=0)[None])[0])
    if np.isnan(value):
        return None
    drawn = _alpha(np.tensordot(resampled(clusters, DRAWS), summed, axes=1))
    low, high = np.quantile(drawn[~np.isnan(drawn)], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {"value": value, "low": float(low), "high": float(high), "units": int(len(seen))}


def preference_alpha(outcomes: np.ndarray, sources: np.ndarray) -> dict[str, float] | None:
    """:func:`krippendorff_alpha` of outcomes (0: the first is preferred, 1: tied, 2: the second). Which method is first
    means nothing, so each unit enters in both orders.

    Args:
        outcomes: int [pairs, reviewers]; -1: not answered.
    """
    mirrored = np.where(outcomes < 0, -1, 2 - outcomes)
    found = krippendorff_alpha(np.concatenate([outcomes, mirrored]), 3, np.concatenate([sources, sources]))
    return found and found | {"units": found["units"] // 2}


def _alpha(coincidences: np.ndarray) -> np.ndarray:
    """float64 [B], from coincidences [B, K, K]; NaN where only one value is there."""
    of_value = coincidences.sum(axis=2)
    total = of_value.sum(axis=1)
    observed = total - np.trace(coincidences, axis1=1, axis2=2)
    expected = (total**2 - (of_value**2).sum(axis=1)) / np.maximum(total - 1, 1)
    return 1 - np.divide(observed, expected, out=np.full(len(total), np.nan), where=expected > 0)
