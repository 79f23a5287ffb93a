"""Simulated reviewers and judges whose preference is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmds.evaluation.bradley_terry import method_pairs, probabilities
from vlmds.evaluation.preferences import Comparisons
from vlmds.evaluation.reviews import Answer, Plan

TIME = "2026-11-27T10:00:00+00:00"


def drawn_outcomes(random: np.random.Generator, leads: np.ndarray, tie: float = 0.0) -> np.ndarray:
    """Outcomes (0: the first is preferred, 1: tied, 2: the second) of pairs with these differences of strengths."""
    shares = np.stack(probabilities(leads, tie), axis=1)
    return np.minimum((random.random((len(leads), 1)) > shares.cumsum(axis=1)).sum(axis=1), 2)


def simulated(
    random: np.random.Generator,
    strengths: Sequence[float],
    *,
    reviewers: int = 1,
    each: int = 150,
    sources: int = 100,
    of_reviewers: float = 0.0,
    of_sources: float = 0.5,
) -> Comparisons:
    """Answers about random pairs. each: answers of a reviewer. of_reviewers, of_sources: standard deviations of the
    effects on a method's strength that a reviewer, and a video, has."""
    pairs = method_pairs(len(strengths))
    by_reviewer = of_reviewers * random.standard_normal((reviewers, len(strengths)))
    by_source = of_sources * random.standard_normal((sources, len(strengths)))
    source, reviewer = random.integers(0, sources, reviewers * each), np.repeat(np.arange(reviewers), each)
    versus = pairs[random.integers(0, len(pairs), reviewers * each)]
    seen = np.asarray(strengths) + by_reviewer[reviewer] + by_source[source]
    number = np.arange(len(source))
    outcome = drawn_outcomes(random, seen[number, versus[:, 0]] - seen[number, versus[:, 1]])
    return Comparisons(versus[:, 0], versus[:, 1], outcome, source, reviewer, number, np.ones(len(source), dtype=bool))


def answers_of(
    plan: Plan, reviewer: str, better: dict[str, float], seed: int = 0, *, order: int | None = None, place: float = 0.0
) -> list[Answer]:
    """A reviewer's answers about all pairs of a plan.

    Args:
        better: log-strength by run id; each pair has the same luck for every reviewer and order of one seed.
        order: of a judge; 2 swaps the sides. place: added to the strength of the caption on the left.
    """
    random, found = np.random.default_rng(seed), []
    for pair in plan.pairs:
        swap = order == 2 or (order is None and random.random() < 0.5)
        left, right = (pair.b, pair.a) if swap else (pair.a, pair.b)
        lead = better[pair.a] - better[pair.b]
        shares = np.stack(probabilities(lead + (-place if swap else place), -1.0))
        outcome = int(np.searchsorted(shares.cumsum(), random.random()))
        choice = ("left", "both_good", "right")[2 - min(outcome, 2) if swap else min(outcome, 2)]
        found.append(
            Answer(
                pair=pair.pair, clip=pair.clip, source=pair.source, left=left, right=right, choice=choice,
                chosen=pair.chosen, time=TIME, reviewer=reviewer, order=order,
            )
        )  # fmt: skip
    return found
