"""How the learning rates of compared experiments were chosen: what was tried, what it cost, how much it matters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmds.evaluation.evaluated_runs import Group, Run


def tuned_by(run: Run) -> dict[str, Any] | None:
    """The record of the pilots that chose the run's learning rates (:mod:`vlmds.runs.tuning`); None if none did."""
    return run.record.get("tuned")


def budget(run: Run) -> str | None:
    """What the pilots of a run tried and for how long, as options of `vlmds sweep`; None without pilots."""
    if (tuned := tuned_by(run)) is None:
        return None
    rates = ",".join(f"{factor:g}" for factor in tuned["factors"])
    return f"--rates {rates} --tune-share {100 * tuned['share']:g}%"


def tuning(groups: Sequence[Group]) -> dict[str, Any]:
    """What the comparison says of learning rates.

    Returns:
        "rows": for each experiment its "name", whether it is "tuned", the "gpu_hours" that this added, and the
        "stages" (:func:`sensitivity`). "tuned": of all experiments. "same": no experiment is tuned, and all have
        the same rates. "gpu_hours": of all pilots; None if not known. "budget": as options, if it is the same.
    """
    rows = []
    for group in groups:
        records = [tuned_by(run) for run in group.runs]
        found = records[0] if all(records) else None
        rows.append(
            {
                "name": group.name,
                "tuned": found is not None,
                "gpu_hours": found and found["gpu_hours"],
                "stages": [sensitivity(stage) for stage in found["stages"]] if found else [],
            }
        )
    rates = {tuple((stage.name, stage.lr) for stage in group.experiment.stages) for group in groups}
    hours = [row["gpu_hours"] for row in rows if row["tuned"]]
    budgets = {budget(run) for group in groups for run in group.runs}
    return {
        "rows": rows,
        "tuned": all(row["tuned"] for row in rows),
        "same": len(rates) == 1 and not any(row["tuned"] for row in rows),
        "gpu_hours": None if None in hours else sum(hours),
        "budget": budgets.pop() if len(budgets) == 1 else None,
    }


def sensitivity(stage: dict[str, Any]) -> dict[str, Any]:
    """Of one stage's record: the "rates" tried, ascending, with their losses (None: diverged), the "chosen" one, its
    "loss", how much more the next "lower" and "higher" rate have (None: not tried, or diverged), and the "range" of
    all losses."""
    pilots = sorted(stage["pilots"], key=lambda pilot: pilot["lr"])
    losses = [pilot["loss"] for pilot in pilots]
    at = next(i for i, pilot in enumerate(pilots) if pilot["lr"] == stage["chosen"])
    known = [loss for loss in losses if loss is not None]

    def more(i: int) -> float | None:
        return losses[i] - losses[at] if 0 <= i < len(losses) and losses[i] is not None else None

    return {
        "stage": stage["stage"],
        "rates": [{"lr": pilot["lr"], "loss": pilot["loss"]} for pilot in pilots],
        "chosen": stage["chosen"],
        "loss": losses[at],
        "lower": more(at - 1),
        "higher": more(at + 1),
        "range": max(known) - min(known),
        "edge": stage["edge"],
    }


def tuning_sentence(found: dict[str, Any]) -> tuple[str, str] | None:
    """The line on learning rates under the verdict, in English and Korean; None where a warning says it. found: of
    :func:`tuning`."""
    if found["tuned"]:
        how = f" ({found['budget']})" if found["budget"] else ""
        hours = "—" if found["gpu_hours"] is None else f"{found['gpu_hours']:.3g}"
        return (
            f"Learning rates were tuned for each experiment by pilot runs{how}, which took {hours} GPU-hours more in all. "
            "A rate that is best in a short pilot can be too high for the whole stage: compare with untuned runs.",
            f"학습률은 실험마다 예비 학습으로 튜닝했으며{how}, 여기에 모두 {hours} GPU 시간이 추가로 들었습니다. 짧은 예비 학습에서 가장 좋은 "
            "학습률이 전체 단계에는 너무 높을 수 있으므로 튜닝하지 않은 실행과 비교하세요.",
        )
    if any(row["tuned"] for row in found["rows"]):
        return None
    if found["same"]:
        return (
            "One learning rate for all experiments, tuned for none: the verdict is also one on the rate "
            "(vlmds sweep --tune lr).",
            "모든 실험에 같은 학습률을 썼고 실험별로 튜닝하지 않았습니다. 이 판정에는 학습률의 영향도 포함됩니다"
            "(vlmds sweep --tune lr).",
        )
    return (
        "The learning rates differ and were not tuned by pilot runs: the verdict is also one on the rates "
        "(vlmds sweep --tune lr).",
        "실험마다 학습률이 다르며 예비 학습으로 튜닝하지 않았습니다. 이 판정에는 학습률의 영향도 포함됩니다"
        "(vlmds sweep --tune lr).",
    )
