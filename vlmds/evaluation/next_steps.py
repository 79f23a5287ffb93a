"""What to do after a comparison: steps with their commands, in English and Korean."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from vlmds.evaluation.evaluated_runs import Group
from vlmds.evaluation.statistics import FEW_SOURCES


@dataclass(frozen=True)
class Step:
    """text: in English and Korean. command: that does it, if one does."""

    text: tuple[str, str]
    command: str = ""


def next_steps(groups: list[Group], found: dict[str, Any]) -> list[Step]:
    """The steps, the first one first.

    Args:
        found: of :func:`vlmds.evaluation.compare.compare`.
    """
    v = found["verdict"]
    steps: list[Step] = []
    if found["warnings"]:
        steps.append(
            Step(
                (
                    "Resolve the warnings beside the verdict, or check that they do not matter; then compare again.",
                    "판정 옆의 경고를 해결하거나 영향을 검토한 뒤 다시 비교하세요.",
                )
            )
        )
    if v["runner_up"] is None:
        another = "model" if found["outside_only"] else "experiment"
        another_ko = "모델" if found["outside_only"] else "실험"
        steps.append(
            Step((f"Evaluate another {another}, and compare the two.", f"다른 {another_ko}을 평가해 함께 비교하세요."))
        )
        return steps
    if v["chosen"] is None:
        steps.append(_more_data(groups, found))
    elif found["outside_only"]:
        steps.append(
            Step(
                (
                    "Compare it with a model that vlmds trained, to decide whether to build or adopt.",
                    "vlmds로 학습한 모델과 함께 비교해 직접 학습과 도입 중 하나를 결정하세요.",
                ),
                "vlmds compare RUN …",
            )
        )
    elif v["checkpoints_only"]:
        steps.append(
            Step(
                (
                    "To decide between the methods, not only these checkpoints, train more seeds of each experiment.",
                    "체크포인트가 아니라 학습 방법을 비교하려면 실험마다 시드를 늘려 학습하세요.",
                ),
                "vlmds sweep … --seeds 3",
            )
        )
    chosen = v["chosen"] or v["best"]
    steps.append(
        Step(
            (
                f"Read captions of {chosen} under Clips, those with the largest differences first.",
                f"아래 클립 목록을 점수 차이가 큰 순서로 정렬해 {chosen}의 캡션을 직접 확인하세요.",
            )
        )
    )
    if v["chosen"] is not None and (path := _path(groups, chosen)):
        steps += [
            Step(
                (f"Try {chosen} on videos of your own.", f"직접 준비한 영상으로 {chosen}의 캡션을 시험해 보세요."),
                f"vlmds serve --run {path}",
            ),
            Step(
                (f"Export {chosen}.", f"배포할 형식으로 {chosen} 모델을 내보내세요."),
                f"vlmds export --run {path} --output exported",
            ),
        ]
    return steps


def _more_data(groups: list[Group], found: dict[str, Any]) -> Step:
    v = found["verdict"]
    runs = " ".join(shlex.quote(str(run.path)) for group in groups for run in group.runs)
    command = f"vlmds power {runs}" if sum(len(group.runs) for group in groups) <= 8 else "vlmds power RUN …"
    if v["few"]:
        return Step(
            (
                f"Evaluate on at least {FEW_SOURCES} videos; these are {found['sources']}.",
                f"영상을 {FEW_SOURCES}개 이상으로 늘려 평가하세요(현재 {found['sources']}개).",
            )
        )
    if found["outside_only"]:
        clips = f"about {v['needed']['clips']:,}" if v["needed"] else "more"
        clips_ko = f"약 {v['needed']['clips']:,}개" if v["needed"] else "더 많은 수"
        return Step(
            (
                f"Evaluate on {clips} clips, or accept a larger margin (compare --margin).",
                f"클립 {clips_ko}로 평가하거나 허용 폭(compare --margin)을 넓히세요.",
            )
        )
    if v["needed"]:
        return Step(
            (
                f"Evaluate on about {v['needed']['clips']:,} clips, with {v['needed']['seeds']} seeds of each experiment "
                "(other combinations are in the table below).",
                f"실험마다 시드 {v['needed']['seeds']}개, 클립 약 {v['needed']['clips']:,}개로 평가하세요"
                "(다른 조합은 아래 표 참고).",
            ),
            command,
        )
    return Step(
        (
            "More clips alone will not decide it: train more seeds, or accept a larger margin (compare --margin).",
            "클립만 늘려서는 판정할 수 없습니다. 시드를 늘리거나 허용 폭(compare --margin)을 넓히세요.",
        ),
        command,
    )


def _path(groups: list[Group], name: str) -> str | None:
    return next((shlex.quote(str(group.runs[0].path)) for group in groups if group.name == name), None)
