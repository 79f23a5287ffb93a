"""Estimates from a judge's answers: its own, and corrected with people's answers about some of the same pairs.

The correction is prediction-powered inference (Angelopoulos et al., Science 382, 2023, arXiv:2301.09633) with power
tuning (PPI++, arXiv:2311.01453): to the judge's answers about pairs that people did not see, weighted by lambda, is
added what people's answers differ from lambda times the judge's where both answered. It estimates people's
preference, however wrong the judge is; a good judge makes its interval shorter. The likelihood of the Bradley-Terry
model is linear in the counts of outcomes, so the counts are corrected and the model is fitted to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from vlmds.evaluation.bradley_terry import fit, method_pairs
from vlmds.evaluation.preferences import DRAWS, Preferences, resampled, spread_of
from vlmds.evaluation.reviews import Answer

FEWEST_LABELLED = 20
"""Pairs that both judged, below which nothing is corrected."""
FEWEST_PAIRS = 20  # with which the position bias is judged
BIAS_P = 0.01


@dataclass(frozen=True, eq=False)
class PairShares:
    """What was answered about N pairs. names: the pairs' ids. first, second: int [N], numbers of two methods, the
    smaller one first. source: of each, by name. shares: float64 [N, 3], of the answers (the first is preferred, tied,
    the second)."""

    names: list[str]
    first: np.ndarray
    second: np.ndarray
    source: list[str]
    shares: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def of(self, kept: Sequence[int] | np.ndarray) -> PairShares:
        """Those with these numbers."""
        places = [int(i) for i in kept]
        names, source = [self.names[i] for i in places], [self.source[i] for i in places]
        return PairShares(names, self.first[places], self.second[places], source, self.shares[places])

    def outcomes(self) -> np.ndarray:
        """int [N]: 0 or 2, where more answers prefer the first or the second; else 1."""
        return 1 - np.sign(self.shares[:, 0] - self.shares[:, 2]).astype(np.int64)

    def renumbered(self, methods: Sequence[int] | np.ndarray) -> PairShares:
        """The pairs of these methods (in ascending order), which get the numbers 0 … in their order."""
        place = {int(method): number for number, method in enumerate(methods)}
        kept = [i for i in range(len(self)) if int(self.first[i]) in place and int(self.second[i]) in place]
        found = self.of(kept)
        first, second = (
            np.array([place[int(m)] for m in side], dtype=np.int64) for side in (found.first, found.second)
        )
        return replace(found, first=first, second=second)


def pair_shares(answers: Sequence[Answer], method_of: dict[str, int]) -> PairShares:
    """The answers pair by pair.

    Args:
        method_of: the number of each run's method; pairs of other runs, or of one method, are left out.
    """
    found: dict[str, tuple[int, int, str, np.ndarray]] = {}
    for answer in answers:
        left, right = method_of.get(answer.left), method_of.get(answer.right)
        if left is None or right is None or left == right:
            continue
        first, second = sorted((left, right))
        outcome = 1 if answer.preferred is None else 0 if method_of[answer.preferred] == first else 2
        found.setdefault(answer.pair, (first, second, answer.source, np.zeros(3)))[3][outcome] += 1
    rows = [*found.values()]
    counts = np.array([row[3] for row in rows]).reshape(-1, 3)
    numbers = np.array([row[:2] for row in rows], dtype=np.int64).reshape(-1, 2)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return PairShares([*found], numbers[:, 0], numbers[:, 1], [row[2] for row in rows], shares)


@dataclass(frozen=True)
class PositionBias:
    """What a judge answered about pairs that it saw in both orders.

    pairs: of both orders. same: both answers agree. first, second: both times the caption in that place. run: both
    times the same run. p: that the places differ by chance, of those in which it followed the place.
    """

    pairs: int
    same: int
    first: int
    second: int
    run: int
    p: float

    @property
    def biased(self) -> bool:
        """Whether the place decides more often than the caption, and mostly the same one."""
        return self.pairs >= FEWEST_PAIRS and self.first + self.second > self.run and self.p < BIAS_P


def in_both_orders(answers: Sequence[Answer]) -> dict[str, tuple[Answer, Answer]]:
    """{pair: the answers of order 1 and 2} of pairs that have both."""
    orders: dict[str, dict[int, Answer]] = {}
    for answer in answers:
        orders.setdefault(answer.pair, {})[answer.order or 1] = answer
    return {pair: (found[1], found[2]) for pair, found in orders.items() if len(found) == 2}


def position_bias(answers: Sequence[Answer]) -> PositionBias:
    """Of one judge's answers. The place on the left is the first that it reads."""
    both = [*in_both_orders(answers).values()]
    first = sum(one.choice == other.choice == "left" for one, other in both)
    second = sum(one.choice == other.choice == "right" for one, other in both)
    run = sum(one.preferred is not None and one.preferred == other.preferred for one, other in both)
    same = sum(one.preferred == other.preferred for one, other in both)
    p = float(stats.binomtest(first, first + second).pvalue) if first + second else 1.0
    return PositionBias(len(both), same, first, second, run, p)


def judge_preferences(judged: PairShares, methods: int, seed: int = 0) -> Preferences:
    """The judge's own estimate of methods that its pairs link, with the error of the clips alone."""
    source, clusters = _numbered(judged.source)
    counts = _counts(judged, source, clusters, methods)
    draws = fit(np.tensordot(resampled(clusters, DRAWS, seed), counts, axes=1), methods).strengths
    return _preferences(counts.sum(axis=0), draws, clusters, len(judged), methods)


def corrected_preferences(
    judged: PairShares, people: PairShares, methods: int, of_people: Preferences, seed: int = 0
) -> tuple[Preferences, float] | None:
    """(The judge's estimate corrected with people's answers, lambda); None if they share too few pairs.

    Args:
        people, judged: about pairs drawn at random. of_people: from whom the error of the reviewers is taken.
    """
    place = {name: i for i, name in enumerate(people.names)}
    shared = [i for i, name in enumerate(judged.names) if name in place]
    if len(shared) < FEWEST_LABELLED:
        return None
    by_judge = judged.of(shared)
    by_people = people.of([place[name] for name in by_judge.names])
    rest = judged.of([i for i, name in enumerate(judged.names) if name not in place])
    source, clusters = _numbered([*by_judge.source, *rest.source])
    labelled, other = source[: len(shared)], source[len(shared) :]
    # [G, P, 3]: people's and the judge's counts of the pairs that both judged, and the judge's of the rest.
    parts = [
        _counts(by_people, labelled, clusters, methods),
        _counts(by_judge, labelled, clusters, methods),
        _counts(rest, other, clusters, methods),
    ]
    weights = resampled(clusters, DRAWS, seed)
    drawn = [_as_many(np.tensordot(weights, part, axes=1), len(shared)) for part in parts]
    power = _power(*(fit(part, methods).strengths for part in drawn)) if len(rest) else 0.0

    def corrected(y: np.ndarray, f: np.ndarray, u: np.ndarray) -> np.ndarray:
        return y + power * (u - f)

    counts = corrected(*(_as_many(part.sum(axis=0), len(shared)) for part in parts))
    draws = fit(corrected(*drawn), methods).strengths
    found = _preferences(counts, draws, clusters, len(shared), methods)
    of_reviewers = {name: getattr(of_people, name) for name in ("reviewers", "between", "reviewer_variance", "share")}
    return replace(found, **of_reviewers), power


def _power(people: np.ndarray, judge: np.ndarray, rest: np.ndarray) -> float:
    """The lambda between 0 and 1 with the least variance. All: strengths of the draws [B, M]."""
    people, moved = people - people.mean(axis=0), (rest - judge) - (rest - judge).mean(axis=0)
    variance = float((moved**2).sum())
    return float(np.clip(-(people * moved).sum() / variance, 0.0, 1.0)) if variance > 0 else 0.0


def _as_many(counts: np.ndarray, number: int) -> np.ndarray:
    """Counts [..., P, 3] scaled to this number in all."""
    return number * counts / np.maximum(counts.sum(axis=(-2, -1), keepdims=True), 1e-9)


def _numbered(sources: Sequence[str]) -> tuple[np.ndarray, int]:
    names, numbers = np.unique(np.asarray(sources), return_inverse=True)
    return numbers, len(names)


def _counts(pairs: PairShares, source: np.ndarray, clusters: int, methods: int) -> np.ndarray:
    """float64 [clusters, P, 3]: sums of the shares."""
    versus = {(int(i), int(j)): number for number, (i, j) in enumerate(method_pairs(methods))}
    places = [versus[int(i), int(j)] for i, j in zip(pairs.first, pairs.second, strict=True)]
    counts = np.zeros((clusters, len(versus), 3))
    np.add.at(counts, (source, np.array(places, dtype=np.int64)), pairs.shares)
    return counts


def _preferences(counts: np.ndarray, draws: np.ndarray, clusters: int, pairs: int, methods: int) -> Preferences:
    """counts: float64 [P, 3]. draws: [B, M]."""
    found = fit(counts, methods)
    return Preferences.fitted(
        found,
        by_sources=spread_of(draws) * clusters / max(1, clusters - 1),
        per_source=np.zeros((methods, clusters)),
        sizes=np.ones(clusters),
        pairs=pairs,
    )
