"""The Bradley-Terry model with ties (Davidson, JASA 65, 1970), fitted to many sets of counts at once.

Methods i and j with log-strengths s and d = s_i - s_j: i is preferred, both are tied, or j is preferred with
probabilities proportional to exp(d / 2), exp(tie) and exp(-d / 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PRIOR_SD = 3.0
"""Standard deviation of the normal prior of log-strengths and tie, as of a few comparisons: without it a method that
always wins would have an infinite strength."""
STEPS, LONGEST_STEP, CONVERGED = 50, 2.0, 1e-7


@dataclass(frozen=True)
class Fit:
    """strengths: float64 [..., M], with mean 0. tie: float64 [...]."""

    strengths: np.ndarray
    tie: np.ndarray


def method_pairs(methods: int) -> np.ndarray:
    """int [P, 2]: all pairs of methods, the smaller number first."""
    return np.array(np.triu_indices(methods, 1)).T


def fit(counts: np.ndarray, methods: int) -> Fit:
    """The mode of the posterior, by Newton's method.

    Args:
        counts: float64 [..., P, 3], for each of :func:`method_pairs`: the first preferred, tied, the second preferred.
            Weighted counts may be fractions or negative, if those of a pair do not add up to less than 0.
    """
    shape = counts.shape[:-2]
    flat = counts.reshape(-1, *counts.shape[-2:])
    found = np.zeros((len(flat), methods + 1))
    for _ in range(STEPS):
        gradient, information = derivatives(flat, found)
        step = np.linalg.solve(information, gradient[..., None])[..., 0]
        longest = np.abs(step).max(axis=1, keepdims=True, initial=0.0)
        found += step * np.minimum(1.0, LONGEST_STEP / np.maximum(longest, 1e-12))
        if longest.max(initial=0.0) < CONVERGED:
            break
    strengths = found[:, :-1] - found[:, :-1].mean(axis=1, keepdims=True)
    return Fit(strengths.reshape(*shape, methods), found[:, -1].reshape(shape))


def derivatives(counts: np.ndarray, parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(gradient [B, M + 1], information [B, M + 1, M + 1]) of the log-posterior.

    Args:
        counts: float64 [B, P, 3]. parameters: float64 [B, M + 1], the strengths and the tie.
    """
    methods = parameters.shape[1] - 1
    design = _design(methods)
    totals = counts.sum(axis=2)
    win, tied, lose = probabilities(parameters[:, :-1] @ design.T, parameters[:, -1:])
    lead = win - lose
    scores = counts @ np.array([[0.5, 0.0], [0.0, 1.0], [-0.5, 0.0]])  # [B, P, 2]: of d and of the tie
    expected = totals[..., None] * np.stack([lead / 2, tied], axis=2)
    residual = scores - expected
    precision = 1 / PRIOR_SD**2
    gradient = np.concatenate([residual[..., 0] @ design, residual[..., 1].sum(axis=1, keepdims=True)], axis=1)
    gradient -= precision * parameters
    information = np.zeros((len(counts), methods + 1, methods + 1))
    squares = (design[:, :, None] * design[:, None, :]).reshape(len(design), -1)
    information[:, :-1, :-1] = ((totals / 4 * (win + lose - lead**2)) @ squares).reshape(-1, methods, methods)
    information[:, :-1, -1] = information[:, -1, :-1] = (-totals / 2 * lead * tied) @ design
    information[:, -1, -1] = (totals * tied * (1 - tied)).sum(axis=1)
    information += precision * np.eye(methods + 1)
    return gradient, information


def influences(per_source: np.ndarray, found: Fit) -> np.ndarray:
    """float64 [G, M]: how much each source moves the log-strengths.

    Args:
        per_source: float64 [G, P, 3], counts. found: fitted to their sum.
    """
    methods = found.strengths.shape[-1]
    parameters = np.append(found.strengths, found.tie)[None]
    _, information = derivatives(per_source.sum(axis=0, keepdims=True), parameters)
    own, _ = derivatives(per_source, np.repeat(parameters, len(per_source), axis=0))
    own += parameters / PRIOR_SD**2  # the prior is of no source
    moved = own @ np.linalg.inv(information[0])
    return (moved - moved[:, :methods].mean(axis=1, keepdims=True))[:, :methods]


def probabilities(d: np.ndarray, tie: np.ndarray | float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The probabilities that the first is preferred, that both are tied, and that the second is preferred.

    Args:
        d: the first's log-strength less the second's.
    """
    d, tie = np.broadcast_arrays(np.asarray(d, dtype=np.float64), np.asarray(tie, dtype=np.float64))
    logits = np.stack([d / 2, tie, -d / 2])
    shares = np.exp(logits - logits.max(axis=0))
    win, tied, lose = shares / shares.sum(axis=0)
    return win, tied, lose


def win_probability(d: np.ndarray | float, tie: np.ndarray | float) -> np.ndarray:
    """The probability that the first is preferred, ties counted as half."""
    win, tied, _ = probabilities(np.asarray(d), tie)
    return win + tied / 2


def win_slope(d: np.ndarray | float, tie: np.ndarray | float) -> np.ndarray:
    """The derivative of :func:`win_probability` by d."""
    win, _, lose = probabilities(np.asarray(d), tie)
    return (win + lose - (win - lose) ** 2) / 4


def lead_of(probability: float, tie: float) -> float:
    """The d at which :func:`win_probability` is this, between 0 and 1."""
    # sinh(d/2) / (2 cosh(d/2) + e^tie) = p - 1/2, a quadratic equation in exp(d/2).
    lead, weight = 2 * (probability - 0.5), np.exp(tie)
    root = (lead * weight + np.sqrt((lead * weight) ** 2 + 4 * (1 - lead**2))) / (2 * (1 - lead))
    return float(2 * np.log(root))


def _design(methods: int) -> np.ndarray:
    """float64 [P, M]: 1 for the first method of each pair, -1 for the second."""
    pairs = method_pairs(methods)
    return np.eye(methods)[pairs[:, 0]] - np.eye(methods)[pairs[:, 1]]
