"""The error rate of a comparison's verdict, on scores drawn with a known truth.

    python -m tests.manual.calibration [REPEATS]     (default 400)

Eight methods are compared in each repeat. Clips come from sources (videos) whose clips resemble each other;
each method has seeds with an offset of their own. The score is 100 on average, so seed sd 2 is 2%.
"""

from __future__ import annotations

import sys

import numpy as np

from vlmds.evaluation.statistics import Estimates, estimate
from vlmds.evaluation.verdict import pair_tests, verdict

METHODS = 8
CLIP_SD, INTERACTION_SD, RESIDUAL_SD = 30.0, 20.0, 15.0  # of one clip
WORSE = 5.0  # of the cheapest method in the second table
CASES = (  # sources, clips of each, correlation within a source, seeds, seed sd
    (10, 1, 0.0, 1, 0.0),
    (20, 1, 0.0, 1, 0.0),
    (100, 1, 0.0, 1, 0.0),
    (50, 10, 0.3, 1, 0.0),
    (100, 1, 0.0, 3, 2.0),
    (500, 1, 0.0, 2, 2.0),
    (500, 1, 0.0, 3, 2.0),
    (2000, 1, 0.0, 2, 2.0),
    (2000, 1, 0.0, 3, 2.0),
    (5000, 1, 0.0, 3, 2.0),
)


def draw(random: np.random.Generator, case: tuple, effects: list[float]) -> Estimates:
    """One comparison of methods whose true values are 100 + effects."""
    sources, each, correlation, seeds, seed_sd = case
    of_source = np.repeat(np.arange(sources), each)
    clips = len(of_source)

    def clustered(sd: float) -> np.ndarray:
        common = (correlation**0.5 * random.standard_normal(sources))[of_source]
        return sd * (common + (1 - correlation) ** 0.5 * random.standard_normal(clips))

    clip = clustered(CLIP_SD)
    groups = []
    for effect in effects:
        method = 100 + effect + clip + clustered(INTERACTION_SD)
        own = [
            method + seed_sd * random.standard_normal() + RESIDUAL_SD * random.standard_normal(clips)
            for _ in range(seeds)
        ]
        groups.append(np.stack(own)[:, :, None])
    return estimate("cider_d@char", groups, of_source)


def calibration(repeats: int, cases=CASES) -> list[dict[str, float]]:
    """For each case the shares of comparisons in which: "family", of equal methods any pair differs; "covered",
    the interval of a pair contains its true difference (averaged over all pairs); "named_worse", with the cheapest
    method 5% worse than the seven others it is named; "found", its difference from the best is significant;
    "decided", of equal methods one is named."""
    rows = []
    for case in cases:
        random = np.random.default_rng(0)
        counts = dict.fromkeys(("family", "covered", "named_worse", "found", "decided"), 0)
        for _ in range(repeats):
            equal = draw(random, case, [0.0] * METHODS)
            pairs = pair_tests(equal)
            counts["family"] += min(p["p_holm"] for p in pairs) < 0.05
            counts["covered"] += sum(p["low"] <= 0 <= p["high"] for p in pairs) / len(pairs)
            counts["decided"] += verdict(equal, pairs, range(METHODS))["chosen"] is not None
            worse = draw(random, case, [-WORSE, *[0.0] * (METHODS - 1)])
            pairs = pair_tests(worse)
            said = verdict(worse, pairs, range(METHODS))
            counts["named_worse"] += said["chosen"] == 0
            counts["found"] += any(p["p_holm"] < 0.05 for p in pairs if {p["one"], p["other"]} == {0, said["best"]})
        rows.append({name: value / repeats for name, value in counts.items()})
    return rows


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    print("| sources × clips | correlation | seeds | seed sd | family error | 95% interval covers | equal: one named | "
          "5% worse: named | 5% worse: found |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|")  # fmt: skip
    for case in CASES:
        (row,) = calibration(repeats, [case])
        sources, each, correlation, seeds, seed_sd = case
        shares = (row[name] for name in ("family", "covered", "decided", "named_worse", "found"))
        print(
            f"| {sources} × {each} | {correlation} | {seeds} | {seed_sd:g}% | "
            + " | ".join(f"{100 * share:.1f}%" for share in shares)
            + " |",
            flush=True,
        )


if __name__ == "__main__":
    main()
