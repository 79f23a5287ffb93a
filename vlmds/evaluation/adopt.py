"""Build or adopt: the trained experiments against models and captions from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmds.evaluation.evaluated_runs import OutsideRun
from vlmds.evaluation.statistics import FEW_SOURCES, Estimates, holm


def build_or_adopt(
    everyone: Mapping[str, Estimates],
    metric: str,
    table: list[dict],
    outside: Sequence[OutsideRun],
    verdict: dict[str, Any],
) -> dict[str, Any]:
    """What is known of the outside models, and whether one of them would do.

    Args:
        everyone: by metric, the estimates of the experiments, then of the outside models, which are fixed.
        table: the rows of the experiments. verdict: on them, with names.

    Returns:
        "reference": the experiment that the verdict takes, or the best one. "systems": a row for each outside model as
        in the table, with its "kind", "source", "revision", "licence", and "gap": what the reference has more, with
        "low", "high", "p", "p_holm" (corrected for the outside models). "best": the name of the best of them.
        "answer": "build", if each outside model is beaten beyond doubt and none is shown to be within the margin of
        the best; "adopt", if the best of them is shown to be within the margin; "few", of too few videos; else "open".
        Both at 95% for all experiments and outside models together.
    """
    found = everyone[metric]
    first = len(table)
    name = verdict["chosen"] or verdict["best"]
    reference = next(number for number, row in enumerate(table) if row["name"] == name)
    gaps = [found.pair(reference, first + number) for number in range(len(outside))]
    corrected = holm([gap.p for gap in gaps])
    systems = []
    for number, (run, gap, p_holm) in enumerate(zip(outside, gaps, corrected, strict=True)):
        row = outside_row(run, everyone, first + number)
        row["gap"] = {"value": gap.value, "low": gap.low, "high": gap.high, "p": gap.p, "p_holm": p_holm}
        systems.append(row)
    values = found.values[first:]
    best = int(np.argmax(values))
    allowed = verdict["margin"] * abs(float(found.values.max()))
    bounds, could_be_best = found.below_best()[first:], found.could_be_best()[first:]
    if found.sources < FEW_SOURCES:
        answer = "few"
    elif bounds[best] > -allowed:
        answer = "adopt"
    elif not could_be_best.any():
        answer = "build"
    else:
        answer = "open"
    return {
        "reference": name,
        "gpu_hours": table[reference]["cost"]["gpu_hours"],
        "systems": sorted(systems, key=lambda row: -row["metrics"][metric]["value"]),
        "best": outside[best].name,
        "sources": found.sources,
        "answer": answer,
    }


def outside_row(run: OutsideRun, estimates: Mapping[str, Estimates], number: int) -> dict[str, Any]:
    """An outside model's row of the table; number: its place in the estimates of each metric."""
    return {
        "name": run.name,
        "projector": None,
        "adapter": None,
        "seeds": None,
        "metrics": {key: found.cell(number) for key, found in estimates.items()},
        "cost": run.cost,
        "kind": run.outside.kind,
        "source": run.outside.source,
        "revision": run.outside.revision,
        "licence": run.outside.licence,
    }


def adopt_sentence(found: dict[str, Any]) -> tuple[str, str] | None:
    """The answer in English and Korean; None without outside models.

    Args:
        found: of :func:`vlmds.evaluation.compare.compare`.
    """
    adopt = found["adopt"]
    if adopt is None:
        return None
    run, other, metric = adopt["reference"], adopt["best"], found["metric"]
    gap = next(row["gap"] for row in adopt["systems"] if row["name"] == other)
    margin = f"{100 * found['verdict']['margin']:g}%"
    ahead = f"{run} − {other} = {gap['value']:.2f} {metric}, 95% interval {gap['low']:.2f} to {gap['high']:.2f}"
    ahead_ko = f"{run} − {other} = {gap['value']:.2f} {metric}, 95% 신뢰구간 {gap['low']:.2f} ~ {gap['high']:.2f}"
    hours = adopt["gpu_hours"]
    spent = "" if hours is None else f", for {hours:,.1f} GPU-hours of training"
    spent_ko = "" if hours is None else f" 학습 비용은 GPU 시간 {hours:,.1f}입니다."
    match adopt["answer"]:
        case "build":
            return (
                f"Build: each outside model is shown to be worse than the best; take {run}{spent} ({ahead}).",
                f"직접 학습 권장: 모든 외부 모델의 점수가 1위보다 낮다는 것이 확인되었습니다. 권장 실험: {run}({ahead_ko}).{spent_ko}",
            )
        case "adopt":
            return (
                f"Adopt: {other} is shown to be at most {margin} below the best, and needs no training ({ahead}).",
                f"도입 권장: {other}의 점수가 1위보다 최대 {margin} 낮다는 것이 확인되었으며 학습이 필요 없습니다({ahead_ko}).",
            )
        case "few":
            return (
                f"Build or adopt: {adopt['sources']} videos are too few to decide ({FEW_SOURCES} at least; {ahead}).",
                f"직접 학습과 도입 중 판정 보류: 영상 {adopt['sources']}개로는 부족합니다({FEW_SOURCES}개 이상 필요, {ahead_ko}).",
            )
    return (
        f"Build or adopt: not decidable with these clips ({ahead}).",
        f"직접 학습과 도입 중 어느 쪽이 나은지 이 클립으로는 판정할 수 없습니다({ahead_ko}).",
    )
