"""Whether runs can be compared like for like: what differs that should not, and what may."""

from __future__ import annotations

import json

from vlmds.evaluation.blind import doubts
from vlmds.evaluation.runs import Run
from vlmds.experiments.differences import flat_settings

EXPECTED = ("name", "owner", "priority", "projector", "peft.type", "training.seed")
"""Settings that are meant to differ between experiments."""
SAME = (
    "data_fingerprint",
    "split",
    "clips",
    "prompt",
    "num_frames",
    "generation",
    "vision",
    "llm",
    "llm_precision",
    "tokenisation",
)
"""Settings of the evaluation without which scores cannot be compared."""


def warnings(runs: list[Run], keys: list[str]) -> list[dict[str, str]]:
    """What makes the comparison doubtful, most important first, in English ("en") and Korean ("ko")."""
    found = []

    def add(english: str, korean: str) -> None:
        found.append({"en": english, "ko": korean})

    def listed(values: dict) -> str:
        return "; ".join(f"{name}: {value}" for name, value in values.items())

    sizes = {run.name: len(run.predictions) for run in runs}
    if set(sizes.values()) != {len(keys)}:
        add(
            f"The runs were not evaluated on the same clips ({listed(sizes)}); only the {len(keys)} clips "
            "that all runs have are compared.",
            f"실험마다 평가한 클립이 다릅니다 ({listed(sizes)}). 공통 클립 {len(keys)}개만 비교합니다.",
        )
    for setting in SAME:
        values = {run.name: run.metrics["settings"].get(setting) for run in runs}
        if len({json.dumps(v) for v in values.values()}) > 1:
            add(
                f"Evaluations differ in {setting}: {listed(values)}",
                f"평가 설정이 서로 다릅니다 ({setting}): {listed(values)}",
            )
    records = {run.name: json.loads((run.path / "run.json").read_text()) for run in runs}
    ids: dict[str, list[str]] = {}
    for name, record in records.items():
        if "id" in record:
            ids.setdefault(record["id"], []).append(name)
    for copies in (", ".join(names) for names in ids.values() if len(names) > 1):
        add(f"The same run more than once: {copies}", f"같은 모델이 두 번 이상 들어 있습니다: {copies}")
    trained = {name: str(record.get("data_fingerprint"))[:12] for name, record in records.items()}
    if len(set(trained.values())) > 1:
        add(
            f"The runs were not trained on the same data: {listed(trained)}",
            f"학습 데이터가 서로 다릅니다: {listed(trained)}",
        )
    batches = {name: record.get("global_batch") for name, record in records.items()}
    if len(set(batches.values())) > 1:
        add(
            "The runs were trained with different global batches, and so with different numbers of steps "
            f"(set training.global_batch): {listed(batches)}",
            "글로벌 배치 크기가 서로 달라 학습 스텝 수도 다릅니다 (training.global_batch로 맞추세요): "
            f"{listed(batches)}",
        )
    for run in runs:
        artifact = run.metrics["settings"]["artifact"]
        if not run.finished:
            add(
                f"{run.name}: training is not finished; the evaluation is of stage {artifact}",
                f"{run.name}: 학습이 끝나지 않았습니다. {artifact} 단계를 평가한 결과입니다.",
            )
        elif artifact != run.experiment.stages[-1].name:
            add(
                f"{run.name}: the evaluation is of stage {artifact}, not of the last stage; evaluate again",
                f"{run.name}: 마지막 단계가 아닌 {artifact} 단계를 평가했습니다. 다시 평가하세요.",
            )
        for warning in run.warnings:
            add(*(f"{run.name}, {warning['stage']}: {warning[language]}" for language in ("en", "ko")))
        if found_doubts := doubts(run.metrics["looking"]):
            english, korean = ("; ".join(doubt[language] for doubt in found_doubts) for language in ("en", "ko"))
            add(
                f"{run.name} may not use the video: {english}",
                f"{run.name}: 모델이 영상을 활용하지 않을 수 있습니다 ({korean})",
            )
    return found


def differing_settings(runs: list[Run]) -> list[dict]:
    """[{key, expected, values by run}] of every experiment key that is not the same in all."""
    flat = {run.name: flat_settings(run.experiment.model_dump()) for run in runs}
    found = []
    for key in sorted(set().union(*flat.values())):
        values = {name: settings.get(key) for name, settings in flat.items()}
        if len({json.dumps(v, default=str) for v in values.values()}) > 1:
            expected = any(key == e or key.startswith(f"{e}.") for e in EXPECTED)
            found.append({"key": key, "expected": expected, "values": values})
    return sorted(found, key=lambda d: d["expected"])
