"""The verdict of a comparison by people's preference, and its sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmds.evaluation.bradley_terry import win_probability
from vlmds.evaluation.preferences import Preferences
from vlmds.evaluation.statistics import FEW_SOURCES, Spread, clips_needed
from vlmds.evaluation.verdict import pair_tests, tied_sentence

MARGIN = 0.05
"""How far below one half the probability may be that a cheaper experiment is preferred to the best one; with
`vlmds compare --by people`, `--margin`."""


def people_verdict(
    found: Preferences, names: Sequence[str], costs: Sequence[Any], margin: float = MARGIN
) -> dict[str, Any]:
    """The cheapest method that is shown to be preferred to the best one with a probability of at least 1/2 - margin
    (ties as half), with 95% confidence for all methods together; none if the answers do not show it of any.

    Args:
        names, costs: of the methods; the smallest cost is the cheapest.

    Returns:
        "best", "runner_up" (with "win": value, low, high, and "p_holm"), "could_be_best", "within_margin", "chosen":
        names; the last is None if there is none. "few": fewer than 50 sources. "needed": answers with which methods
        that are equal would be found to be so, {"pairs"}; None if one is chosen, or if more answers of these
        reviewers are not enough ("more_reviewers").
    """
    count = len(found.values)
    order = sorted(range(count), key=lambda method: -found.values[method])
    best, second = order[:2]
    allowed = found.lead_of_share(margin)
    bounds, could_be_best = found.below_best(), found.could_be_best()
    within = [method for method in range(count) if bounds[method] > -allowed]
    few = found.sources < FEW_SOURCES
    chosen = None if few or not within else min(within, key=lambda method: (costs[method], -found.values[method]))
    pairs = None if chosen is not None else _needed(found, allowed)
    tests = pair_tests(found)
    corrected = next(p["p_holm"] for p in tests if {p["one"], p["other"]} == {best, second})
    return {
        "best": names[best],
        "runner_up": {"name": names[second], "win": found.win(best, second), "p_holm": corrected},
        "could_be_best": [names[method] for method in order if could_be_best[method]],
        "within_margin": [names[method] for method in within],
        "at_least": {names[m]: float(win_probability(bounds[m], found.tie)) for m in range(count)},
        "chosen": None if chosen is None else names[chosen],
        "margin": margin,
        "few": few,
        "sources": found.sources,
        "needed": None if pairs is None else {"pairs": pairs},
        "more_reviewers": chosen is None and pairs is None,
        "one_reviewer": found.reviewers < 2,
    }


def _needed(found: Preferences, allowed: float) -> int | None:
    """Answers in all with which equal methods would be found to be within ``allowed`` of each other (power 80%)."""
    covariance, count = found.by_sources, len(found.values)
    one, other = np.triu_indices(count, 1)
    variance = float(np.median(covariance[one, one] + covariance[other, other] - 2 * covariance[one, other]))
    reviewers = (found.reviewer_variance * found.share) ** 0.5
    parts = Spread((variance * found.clips) ** 0.5, reviewers or None)
    needed = clips_needed(parts, allowed, 1, methods=count)
    if needed is None:
        return None
    # Each source gives as many answers as now.
    return max(needed, -(-FEW_SOURCES * found.clips // found.sources))


def people_sentences(v: dict[str, Any]) -> list[tuple[str, str]]:
    """The verdict in English and Korean, the most important sentence first.

    Args:
        v: of :func:`people_verdict`.
    """
    said = [_recommendation(v)]
    if v["needed"]:
        number = f"{v['needed']['pairs']:,}"
        said.append(
            (
                f"About {number} answers about pairs drawn at random would decide it.",
                f"무작위로 뽑은 쌍에 대한 응답이 약 {number}개면 판정할 수 있을 것으로 예상됩니다.",
            )
        )
    if v["more_reviewers"]:
        said.append(
            (
                "More answers alone would not decide it: the reviewers differ too much from one another. More reviewers are needed.",
                "평가자 간 차이가 커서 응답 수만 늘려서는 판정할 수 없습니다. 평가자를 늘리세요.",
            )
        )
    said += tied_sentence(v)
    if v["one_reviewer"]:
        said.append(
            (
                "It holds for this one reviewer: how much people differ is not known.",
                "평가자가 한 명이어서 평가자 간 차이를 알 수 없으며, 이 결과는 해당 평가자에게만 유효합니다.",
            )
        )
    return said


def _recommendation(v: dict[str, Any]) -> tuple[str, str]:
    best, least = v["best"], f"{100 * (0.5 - v['margin']):g}%"
    if v["chosen"] is not None and v["chosen"] != best:
        return (
            f"By people, take {v['chosen']}: it is the cheapest experiment shown to be preferred to the best, {best}, in at "
            f"least {least} of comparisons (ties as half).",
            f"사람 평가 기준 권장: {v['chosen']}. 1위 {best}와(과) 비교했을 때 선호될 확률(무승부는 절반)이 {least} 이상이라고 "
            "확인된 실험 중 비용이 가장 낮습니다.",
        )
    if v["chosen"] is not None:
        return (
            f"By people, take {best}: it is preferred most, and no cheaper experiment is shown to be preferred to it in at "
            f"least {least} of comparisons (ties as half).",
            f"사람 평가 기준 권장: {best}. 가장 많이 선호되며, 이와 비교해 선호될 확률(무승부는 절반)이 {least} 이상이라고 "
            "확인된 더 저렴한 실험은 없습니다.",
        )
    if v["few"]:
        return (
            f"By people, no winner is named: {v['sources']} videos are too few (50 at least). {best} is preferred most.",
            f"사람 평가 기준 판정 보류: 영상 {v['sources']}개로는 부족합니다(50개 이상 필요). 가장 많이 선호된 실험은 "
            f"{best}입니다.",
        )
    return (
        f"By people, not decidable with these answers: no experiment is shown to be preferred to the best in at least {least} "
        f"of comparisons. {best} is preferred most.",
        f"지금까지의 사람 평가로는 판정할 수 없습니다. 1위와 비교해 선호될 확률이 {least} 이상이라고 확인된 실험이 없습니다. "
        f"가장 많이 선호된 실험은 {best}입니다.",
    )


def people_line(v: dict[str, Any]) -> str:
    """The verdict as one line for the terminal, with the second's figures."""
    second, win = v["runner_up"], v["runner_up"]["win"]
    return (
        " ".join(english for english, _ in people_sentences(v))
        + f" ({v['best']} is preferred to {second['name']} in {win['value']:.1%} of comparisons, 95% interval "
        f"{win['low']:.1%} to {win['high']:.1%}, Holm-corrected p {second['p_holm']:.4f})"
    )
