"""The verdict of a comparison: which method to take, and whether the data can decide that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmds.evaluation.power import needed
from vlmds.evaluation.statistics import FEW_SOURCES, Estimates, holm, spread
from vlmds.evaluation.tuned import tuning_sentence

MARGIN = 0.03
"""How much worse than the best, as a share of its value, a cheaper method may be; `vlmds compare --margin`."""
MOST_SEEDS = 5  # that are proposed where more clips alone would not do


def pair_tests(found: Estimates) -> list[dict[str, float]]:
    """For each pair of methods, in order: their numbers "one" and "other", the "gap" of their values with
    its 95% interval "low" and "high", "p", and "p_holm", corrected for all pairs."""
    count = len(found.values)
    pairs = []
    for one in range(count):
        for other in range(one + 1, count):
            gap = found.pair(one, other)
            pairs.append({"one": one, "other": other, "gap": gap.value, "low": gap.low, "high": gap.high, "p": gap.p})
    for pair, corrected in zip(pairs, holm([pair["p"] for pair in pairs]), strict=True):
        pair["p_holm"] = corrected
    return pairs


def verdict(
    found: Estimates, pairs: list[dict[str, float]], costs: Sequence[Any], margin: float = MARGIN
) -> dict[str, Any]:
    """The cheapest method that is not worse than the best by more than the margin, with 95% confidence for
    all methods together (non-inferiority); none if the data does not say it of any, or with few sources.

    Args:
        pairs: of :func:`pair_tests`.
        costs: of each method; the smallest is the cheapest.
        margin: as a share of the best value.

    Returns:
        "best": number of the method with the highest value. "could_be_best": those that no other one beats
        beyond doubt. "within_margin": those shown to be within the margin. "chosen": the cheapest of these, or
        None. "checkpoints_only": each method has one seed, so that the verdict holds for these checkpoints
        alone. "few": fewer than 50 sources. "decidable_with": without a chosen one, [{"seeds", "clips"}] with which
        methods that are equal would be found to be so; "needed": the first that has clips, or None. "runner_up": the
        second with its pair's figures, or None.
    """
    count = len(found.values)
    order = sorted(range(count), key=lambda method: -found.values[method])
    best = order[0]
    allowed = margin * abs(float(found.values[best]))
    few = found.sources < FEW_SOURCES
    bounds, could_be_best = found.below_best(), found.could_be_best()
    within = [method for method in range(count) if bounds[method] > -allowed or (count == 1)]
    chosen = None if few or not within else min(within, key=lambda method: (costs[method], -found.values[method]))
    rows = _decidable_with(found, allowed) if chosen is None and count > 1 else []
    return {
        "best": best,
        "could_be_best": [method for method in order if could_be_best[method]],
        "within_margin": within,
        "chosen": chosen,
        "margin": margin,
        "checkpoints_only": count > 1 and found.seed_df == 0,
        "few": few,
        "needed": next((row for row in rows if row["clips"] is not None), None),
        "decidable_with": rows,
        "runner_up": _runner_up(order, pairs) if count > 1 else None,
    }


def _runner_up(order: list[int], pairs: list[dict[str, float]]) -> dict[str, Any]:
    best, second = order[:2]
    pair = next(p for p in pairs if {p["one"], p["other"]} == {best, second})
    sign = 1 if pair["one"] == best else -1
    low, high = sorted((sign * pair["low"], sign * pair["high"]))
    return {
        "method": second,
        "gap": sign * pair["gap"],
        "low": low,
        "high": high,
        "p": pair["p"],
        "p_holm": pair["p_holm"],
        "significant": pair["p_holm"] < 0.05,
    }


def _decidable_with(found: Estimates, allowed: float) -> list[dict[str, int | None]]:
    """Clips for each number of seeds, from those that there are on, see :func:`vlmds.evaluation.power.needed`."""
    fewest = int(found.seeds.min())
    return needed(spread(found), allowed, range(fewest, max(fewest, MOST_SEEDS) + 1), methods=len(found.values))


def verdict_sentences(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The verdict of a comparison in English and Korean, the most important sentence first.

    Args:
        found: of :func:`vlmds.evaluation.compare.compare`.
    """
    if found["outside_only"]:
        return _outside_sentences(found)
    v, metric = found["verdict"], found["metric"]
    best, value = v["best"], f"{v['value']:.2f}"
    if v["runner_up"] is None:
        return [
            (
                f"One experiment only: {best}, {metric} {value}. There is nothing to compare it with.",
                f"실험이 하나뿐입니다: {best}, {metric} {value}. 비교 대상이 없습니다.",
            )
        ]
    said = [_recommendation(found)]
    if v["needed"]:
        clips, seeds = f"{v['needed']['clips']:,}", v["needed"]["seeds"]
        said.append(
            (
                f"About {clips} clips and {seeds} seed{'s' if seeds > 1 else ''} of each experiment would decide it.",
                f"실험마다 시드 {seeds}개, 클립 약 {clips}개면 판정할 수 있을 것으로 예상됩니다.",
            )
        )
    said += tied_sentence(v)
    if v["checkpoints_only"]:
        said.append(
            (
                "Each experiment has one seed: this holds for these checkpoints only, not for the methods.",
                "실험마다 시드가 하나뿐이므로, 이 결과는 학습 방법이 아니라 이 체크포인트들에만 해당합니다.",
            )
        )
    if line := tuning_sentence(found["tuning"]):
        said.append(line)
    return said


def _outside_sentences(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The verdict on outside models alone, which no cost decides."""
    v, metric = found["verdict"], found["metric"]
    best, value, margin = v["best"], f"{v['value']:.2f}", f"{100 * v['margin']:g}%"
    highest, highest_ko = (
        f"{best} has the highest {metric}, {value}",
        f"{metric}가 가장 높은 모델은 {best}({value})입니다",
    )
    if v["runner_up"] is None:
        return [
            (
                f"One model only: {best}, {metric} {value}. There is nothing to compare it with.",
                f"모델이 하나뿐입니다: {best}, {metric} {value}. 비교 대상이 없습니다.",
            )
        ]
    if v["few"]:
        said = (
            f"No winner is named: {found['sources']} videos are too few ({FEW_SOURCES} at least). {highest}.",
            f"판정 보류: 영상 {found['sources']}개로는 부족합니다({FEW_SOURCES}개 이상 필요). {highest_ko}.",
        )
    elif v["could_be_best"] == [best]:
        said = (
            f"Take {best}: it has the highest {metric} ({value}), and each other model is shown to be worse.",
            f"권장: {best}. {metric} {value}로 1위이며, 다른 모든 모델의 점수가 이보다 낮다는 것이 확인되었습니다.",
        )
    elif v["chosen"] is not None:
        said = (
            f"Take {best}: it has the highest {metric} ({value}), and is shown to be at most {margin} below the best, "
            "whichever that is.",
            f"권장: {best}. {metric} {value}로 1위이며, 실제 1위가 다른 모델이더라도 그보다 최대 {margin} 낮다는 것이 "
            "확인되었습니다.",
        )
    else:
        said = (
            f"Not decidable with this data: no model is shown to be within {margin} of the best. {highest}.",
            f"이 데이터로는 판정할 수 없습니다. 1위와의 차이가 {margin} 이내라고 확인된 모델이 없습니다. {highest_ko}.",
        )
    sentences = [said]
    if v["needed"]:
        clips = f"{v['needed']['clips']:,}"
        sentences.append(
            (f"About {clips} clips would decide it.", f"클립 약 {clips}개면 판정할 수 있을 것으로 예상됩니다.")
        )
    sentences += tied_sentence(v, "모델")
    sentences.append(
        (
            "None of these models was trained here: costs of training do not count, and whether to build or adopt needs "
            "a run of vlmds beside them.",
            "모두 직접 학습하지 않은 외부 모델이므로 학습 비용은 판정에 쓰지 않습니다. 직접 학습과 도입 중 어느 쪽이 나은지 "
            "판단하려면 vlmds로 학습한 실행을 함께 비교하세요.",
        )
    )
    return sentences


def tied_sentence(v: dict[str, Any], noun: str = "실험") -> list[tuple[str, str]]:
    """Which experiments could be the best as well; nothing if none could. v: a verdict, with names. noun: what they
    are, in Korean."""
    others = ", ".join(name for name in v["could_be_best"] if name != v["best"])
    if not others:
        return []
    return [
        (
            f"Statistically tied with {v['best']}: {others}.",
            f"{v['best']}와(과) 통계적으로 차이가 없는 {noun}: {others}.",
        )
    ]


def _recommendation(found: dict[str, Any]) -> tuple[str, str]:
    """The first sentence: which experiment to take, or why none is named."""
    v, metric = found["verdict"], found["metric"]
    best, value, margin = v["best"], f"{v['value']:.2f}", f"{100 * v['margin']:g}%"
    if v["chosen"] is not None and v["chosen"] != best:
        return (
            f"Take {v['chosen']}: it is the cheapest experiment shown to be at most {margin} below the best, "
            f"{best} ({metric} {value}).",
            f"권장: {v['chosen']}. 1위 {best}({metric} {value})보다 최대 {margin} 낮다는 것이 확인된 실험 중 비용이 "
            "가장 낮습니다.",
        )
    if v["chosen"] is not None:
        return (
            f"Take {best}: it has the highest {metric} ({value}), and no cheaper experiment is shown to be within "
            f"{margin} of it.",
            f"권장: {best}. {metric} {value}로 1위이며, 이보다 저렴하면서 {margin} 이내라고 확인된 실험은 없습니다.",
        )
    if v["few"]:
        return (
            f"No winner is named: {found['sources']} videos are too few (50 at least). {best} has the highest "
            f"{metric}, {value}.",
            f"판정 보류: 영상 {found['sources']}개로는 부족합니다(50개 이상 필요). {metric}가 가장 높은 실험은 "
            f"{best}({value})입니다.",
        )
    return (
        f"Not decidable with this data: no experiment is shown to be within {margin} of the best. {best} has "
        f"the highest {metric}, {value}.",
        f"이 데이터로는 판정할 수 없습니다. 1위와의 차이가 {margin} 이내라고 확인된 실험이 없습니다. "
        f"{metric}가 가장 높은 실험은 {best}({value})입니다.",
    )


def weakened(found: dict[str, Any]) -> tuple[str, str] | None:
    """That there are warnings, which belongs beside the verdict, in English and Korean; None without warnings."""
    count = len(found["warnings"])
    if not count:
        return None
    return (
        f"{count} warning{'s' if count > 1 else ''}: read {'them' if count > 1 else 'it'} before you use this verdict.",
        f"경고 {count}건이 있습니다. 판정을 쓰기 전에 먼저 확인하세요.",
    )


def verdict_line(found: dict[str, Any]) -> str:
    """The verdict as one line for the terminal, with the second-best experiment's gap."""
    first, *others = verdict_sentences(found)
    said = [first, *([warned] if (warned := weakened(found)) else []), *others]
    line = " ".join(english for english, _ in said)
    if other := found["verdict"]["runner_up"]:
        line += (
            f" ({found['verdict']['best']} is {other['gap']:.2f} above {other['name']}, 95% interval "
            f"{other['low']:.2f} to {other['high']:.2f}, Holm-corrected p {other['p_holm']:.4f})"
        )
    return line
