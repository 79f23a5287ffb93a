"""Statistics of a comparison: what can be said of methods from scores of a few seeds on some clips.

A score is taken as method + clip + method × clip + seed of the method + residual. Clips that were cut
from one video (a source) are not independent, so sources are what is sampled. The variance of a
difference between methods has two parts:

- of the sources: from the seed-averaged differences on the same clips (cluster-robust). Metrics of a
  whole corpus (BLEU, chrF++) are linearised: a clip's value is its influence on the metric
  (Hampel, JASA 69, 1974).
- of the seeds: the variance between the seeds of a method, pooled over all methods, less the residual
  of the clips in it, which the first part contains already.

Student's t with Satterthwaite's degrees of freedom (Biometrics Bulletin 2, 1946) gives intervals and
p-values; nothing is drawn at random for them, so a small p-value is not limited by a number of draws.
With one seed for each method only the first part is there: what is said then holds for these
checkpoints, not for the methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

from vlmds.evaluation.metrics import aggregate

CONFIDENCE = 0.95
FEW_SOURCES = 50
"""With fewer sources p-values come from sign flips, and no winner is named."""
EXACT_SOURCES = 14  # up to which all sign flips are tried
FLIPS = 20_000
DRAWS = 20_000  # of the simultaneous quantiles


@dataclass(frozen=True)
class Difference:
    """A contrast of methods, such as one less another.

    low, high: 95% confidence interval. p: two-sided. df: degrees of freedom.
    """

    value: float
    error: float
    low: float
    high: float
    p: float
    df: float


@dataclass(frozen=True, eq=False)
class Estimates:
    """Values of M methods and what is known of their errors.

    Args:
        values: float64 [M], means over the seeds.
        per_source: float64 [M, G], the influence of each source on them; each row adds up to 0.
        sizes: float64 [G], clips of each source.
        seeds: int [M], seeds of each method.
        seed_values: the value of each seed, by method.
        clips: n.
        residual: variance of one seed's value by the clips' residuals, pooled; 0 without repeated seeds.
        fixed: numbers of methods that are not trained: they have no seed, and no variance over seeds.
    """

    values: np.ndarray
    per_source: np.ndarray
    sizes: np.ndarray
    seeds: np.ndarray
    seed_values: list[np.ndarray]
    clips: int
    residual: float
    fixed: tuple[int, ...] = ()

    @property
    def sources(self) -> int:
        return self.per_source.shape[1]

    @property
    def seed_df(self) -> int:
        """Degrees of freedom of the variance between seeds; 0: of checkpoints only."""
        return int((self.seeds - 1).sum())

    @cached_property
    def between_seeds(self) -> float:
        """Pooled variance of the values of a method's seeds, the clips' residuals included."""
        if not self.seed_df:
            return 0.0
        return float(sum(((v - v.mean()) ** 2).sum() for v in self.seed_values)) / self.seed_df

    @property
    def seed_variance(self) -> float | None:
        """Of a method's value over its seeds, had there been endless clips; None without repeated seeds."""
        return max(0.0, self.between_seeds - self.residual) if self.seed_df else None

    @cached_property
    def seed_shares(self) -> np.ndarray:
        """float64 [M]: of the variance between seeds in a method's value."""
        shares = 1 / self.seeds
        shares[list(self.fixed)] = 0.0
        return shares

    @cached_property
    def clip_covariance(self) -> np.ndarray:
        """float64 [M, M]: of the values, by the choice of the sources."""
        scale = self.sources / max(1, self.sources - 1) / self.clips**2
        return scale * self.per_source @ self.per_source.T

    @cached_property
    def covariance(self) -> np.ndarray:
        """float64 [M, M]: of the values, by sources and seeds."""
        return self.clip_covariance + np.diag((self.seed_variance or 0.0) * self.seed_shares)

    def contrast(self, weights: Sequence[float] | np.ndarray, *, paired: bool = True) -> Difference:
        """weights: [M], such as 1 and -1 for two methods. paired: they add up to 0, so that few sources
        are judged by sign flips."""
        w = np.asarray(weights, dtype=np.float64)
        value = float(w @ self.values)
        error, df = self._error(w)
        if error <= 1e-12 * max(1.0, abs(value)):
            return Difference(value, 0.0, value, value, 1.0 if abs(value) <= 1e-9 else 0.0, df)
        reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, df)) * error
        p = float(2 * stats.t.sf(abs(value) / error, df))
        if paired and self.sources < FEW_SOURCES:
            p = max(p, sign_flips(w @ self.per_source + value * self.sizes))
        return Difference(value, error, value - reach, value + reach, p, df)

    def pair(self, one: int, other: int) -> Difference:
        """One method less another."""
        weights = np.zeros(len(self.values))
        weights[one] += 1
        weights[other] -= 1
        return self.contrast(weights)

    def single(self, one: int) -> Difference:
        """A method's own value; its p-value says nothing."""
        weights = np.zeros(len(self.values))
        weights[one] = 1
        return self.contrast(weights, paired=False)

    def cell(self, one: int) -> dict[str, float | None]:
        """A method's value with its interval, and the standard deviation over its seeds, for a table."""
        value, seeds = self.single(one), self.seed_values[one]
        spread = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else None
        return {"value": value.value, "low": value.low, "high": value.high, "seed_sd": spread}

    def below_best(self) -> np.ndarray:
        """float64 [M]: simultaneous 95% lower bounds of each method's value less that of the best other
        one, at most 0 (multiple comparisons with the best: Hsu, Annals of Statistics 12, 1984). A bound of
        0 means that the method is the best."""
        count = len(self.values)
        bounds = np.zeros(count)
        for method, (errors, quantile) in enumerate(self._against):
            behind = self.values - self.values[method] + quantile * errors
            bounds[method] = -max(0.0, np.delete(behind, method).max(initial=0.0))
        return bounds

    def could_be_best(self) -> np.ndarray:
        """bool [M]: no other method is better beyond doubt, at 95% for all together."""
        count = len(self.values)
        found = np.ones(count, dtype=bool)
        for method, (errors, quantile) in enumerate(self._against):
            ahead = self.values - self.values[method] - quantile * errors
            found[method] = np.delete(ahead, method).max(initial=-1.0) <= 0
        return found

    @cached_property
    def _against(self) -> list[tuple[np.ndarray, float]]:
        """For each method the standard errors of all others' differences to it, [M], and their 95% quantile."""
        errors = [self._errors_against(method) for method in range(len(self.values))]
        return [(own, self._dunnett(method, own)) for method, own in enumerate(errors)]

    def _errors_against(self, method: int) -> np.ndarray:
        covariance = self.covariance
        own = np.diag(covariance)
        return np.sqrt(np.maximum(own + own[method] - 2 * covariance[method], 0.0))

    def _dunnett(self, method: int, errors: np.ndarray) -> float:
        """The 95% quantile of the largest standardised error of the differences to a method."""
        others = [i for i in range(len(errors)) if i != method and errors[i] > 0]
        if not others:
            return 0.0
        df = min(self._error(difference)[1] for difference in np.eye(len(errors))[others] - np.eye(len(errors))[method])
        covariance = self.covariance
        joint = (
            covariance[np.ix_(others, others)]
            - covariance[others, method][:, None]
            - covariance[others, method][None]
            + covariance[method, method]
        )
        scale = errors[others]
        correlation = joint / np.outer(scale, scale)
        random = np.random.RandomState(0)
        normal = random.multivariate_normal(np.zeros(len(others)), correlation, DRAWS, check_valid="ignore")
        spread = np.sqrt(random.chisquare(df, DRAWS) / df)
        return float(np.quantile(normal.max(axis=1) / spread, CONFIDENCE))

    def _error(self, w: np.ndarray) -> tuple[float, float]:
        """Standard error of a contrast and its degrees of freedom. Satterthwaite's come out too many where the
        few seeds happen to lie close together, so they are at most twice those of the seeds."""
        of_clips = float(w @ self.clip_covariance @ w)
        share = float((w**2 * self.seed_shares).sum())  # of the variance between seeds
        variance = of_clips + share * (self.seed_variance or 0.0)
        doubt = of_clips**2 / max(1, self.sources - 1)
        if self.seed_df:
            doubt += (share * self.between_seeds) ** 2 / self.seed_df
        df = variance**2 / doubt if doubt > 0 else 1.0
        return max(0.0, variance) ** 0.5, max(1.0, min(df, 2 * self.seed_df) if self.seed_df and share else df)


def estimate(
    metric: str, groups: Sequence[np.ndarray], sources: Sequence[int] | Sequence[str], fixed: Sequence[int] = ()
) -> Estimates:
    """Estimates of methods from their scores on the same clips.

    Args:
        metric: whose statistics they are, see :func:`vlmds.evaluation.metrics.aggregate`.
        groups: for each method float64 [S, n, k]: statistics of n clips for each of its S seeds.
        sources: [n], the source that each clip is from, by number or name.
        fixed: see :class:`Estimates`.
    """
    _, numbers = np.unique(np.asarray(sources), return_inverse=True)
    sizes = np.bincount(numbers).astype(np.float64)
    clips, count = len(numbers), len(sizes)
    values, per_source, seed_values, residuals = [], [], [], []
    for group in groups:
        own, influences = [], []
        for statistics in group:
            value, influence = influences_of(metric, statistics)
            own.append(value)
            influences.append(np.bincount(numbers, weights=influence, minlength=count))
        stacked = np.array(influences)
        values.append(np.mean(own))
        per_source.append(stacked.mean(axis=0))
        seed_values.append(np.array(own))
        if len(own) > 1:
            rest = stacked - stacked.mean(axis=0)
            residuals.append((rest**2).sum() * count / max(1, count - 1) / clips**2)
    seeds = np.array([len(v) for v in seed_values])
    free = int((seeds - 1).sum())
    residual = sum(residuals) / free if free else 0.0
    return Estimates(np.array(values), np.array(per_source), sizes, seeds, seed_values, clips, residual, tuple(fixed))


def influences_of(metric: str, statistics: np.ndarray) -> tuple[float, np.ndarray]:
    """(The metric of these clips, each clip's influence on it: float64 [n], which add up to 0).

    Args:
        statistics: float64 [n, k].
    """
    mean = statistics.mean(axis=0)
    value = float(aggregate(metric, mean[None])[0])
    steps = 1e-5 * np.maximum(np.abs(mean), 1e-3)
    # A count that is 0 cannot be less.
    below, above = np.maximum(mean[None] - np.diag(steps), 0), mean[None] + np.diag(steps)
    if (mean < 0).any():
        below = mean[None] - np.diag(steps)
    slope = (aggregate(metric, above) - aggregate(metric, below)) / (above - below).diagonal()
    return value, (statistics - mean) @ slope


def sign_flips(differences: np.ndarray) -> float:
    """Two-sided p-value of a mean of 0, by flipping the signs of differences between paired sums (Fisher,
    The Design of Experiments, 1935): all flips of up to 14, else 20,000 at random.

    Args:
        differences: float64 [G].
    """
    count = len(differences)
    if count <= EXACT_SOURCES:
        signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
        sums = np.abs(signs @ differences)
        return float((sums >= abs(differences.sum()) * (1 - 1e-9)).mean())
    random = np.random.RandomState(0)
    signs = 1 - 2 * random.randint(0, 2, (FLIPS, count))
    sums = np.abs(signs @ differences)
    return float(((sums >= abs(differences.sum()) * (1 - 1e-9)).sum() + 1) / (FLIPS + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Scandinavian Journal of Statistics 6, 1979)."""
    order = np.argsort(p_values, kind="stable")
    corrected, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = running
    return corrected


def replicated_effect(differences: Sequence[float]) -> Difference:
    """The mean of independent differences, such as DoRA less LoRA for each projector, by their own spread
    alone: it needs no second seed, because the projectors repeat the comparison."""
    d = np.asarray(differences, dtype=np.float64)
    error = float(d.std(ddof=1) / len(d) ** 0.5)
    df, value = len(d) - 1, float(d.mean())
    if error == 0:
        return Difference(value, 0.0, value, value, 1.0 if value == 0 else 0.0, df)
    reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, df)) * error
    return Difference(value, error, value - reach, value + reach, float(2 * stats.t.sf(abs(value) / error, df)), df)


@dataclass(frozen=True)
class Spread:
    """What the error of a difference between two methods is made of.

    clip_sd: standard deviation of the paired difference of one clip, of seed-averaged scores; the square root
    of (variance of the mean × clips), so that clips of one source count as what they are worth.
    seed_sd: standard deviation of a method's value over its seeds; None: not known.
    """

    clip_sd: float
    seed_sd: float | None


def spread(found: Estimates) -> Spread:
    """The median over the pairs of methods."""
    count = len(found.values)
    covariance = found.clip_covariance
    variances = [
        covariance[i, i] + covariance[j, j] - 2 * covariance[i, j] for i in range(count) for j in range(i + 1, count)
    ]
    clip_sd = float(np.sqrt(max(0.0, np.median(variances)) * found.clips)) if variances else 0.0
    return Spread(clip_sd, None if found.seed_variance is None else found.seed_variance**0.5)


def clips_needed(spread: Spread, difference: float, seeds: int, *, methods: int = 2, power: float = 0.8) -> int | None:
    """Clips with which a true difference is found with this power, or, for a margin, with which equal methods
    are found to be within it; None if no number of clips is enough with so few seeds.

    Args:
        difference: in the metric's units.
        methods: that are compared with one another; their pairs share the 5%.
    """
    pairs = methods * (methods - 1) / 2
    df = max(1.0, methods * (seeds - 1)) if spread.seed_sd and seeds > 1 else 1e6
    reach = stats.t.ppf(1 - (1 - CONFIDENCE) / 2 / max(1.0, pairs), df) + stats.norm.ppf(power)
    wanted = (difference / reach) ** 2 - 2 * (spread.seed_sd or 0.0) ** 2 / seeds
    return None if wanted <= 0 else int(np.ceil(spread.clip_sd**2 / wanted))
