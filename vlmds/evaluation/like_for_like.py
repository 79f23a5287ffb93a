"""Whether runs can be compared like for like, in three classes.

- Refused: what the evaluation alone decides and another evaluation repairs: the split, the references of the
  clips, the generation options, settings changed with ``evaluate --set``. Scores are not comparable there.
- Warnings: what makes the comparison doubtful, "read this first".
- Settings that differ: everything that is recorded of the experiments, the runs and their evaluations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vlmds.errors import InputError
from vlmds.evaluation.blind import doubts
from vlmds.evaluation.cost import hardware
from vlmds.evaluation.evaluated_runs import NOT_LEARNED, Evaluated, OutsideRun, Run, under
from vlmds.evaluation.tuned import budget, tuned_by
from vlmds.evaluation.unfinished import unfinished_warning
from vlmds.experiments.differences import flat_settings

EXPECTED = ("owner", "priority", "name", "projector", "peft.type", "training.seed")
"""Settings that are meant to differ between experiments."""
SAME = ("data_fingerprint", "clips", "prompt", "num_frames", "vision", "llm", "llm_precision", "tokenisation")
"""Settings of the evaluation that make scores doubtful where they differ."""
PLACES = ("vision", "llm")
"""Of these, names or paths of base weights, which run.json knows by their hashes."""
AGAIN = "evaluate them in the same way (vlmds evaluate --again, or --as NAME and compare --evaluation NAME)"


def refuse(runs: Sequence[Run], outside: Sequence[OutsideRun] = ()) -> None:
    """Raise :class:`InputError`, naming runs and settings, where evaluations cannot be compared."""
    everyone: list[Evaluated] = [*runs, *outside]
    splits = {run.name: run.metrics["settings"].get("split") for run in everyone}
    if _differ(splits):
        raise InputError(f"the evaluations differ in the split ({_listed(splits)}); {AGAIN}")
    for what, value in (
        ("the generation options", lambda run: run.metrics["settings"].get("generation")),
        ("settings changed with --set", _changed_settings),
    ):
        values = {run.name: value(run) for run in runs}
        if _differ(values):
            raise InputError(f"the evaluations differ in {what} ({_listed(_only_differing(values))}); {AGAIN}")
    first, *others = everyone
    for run in others:
        other = [
            key
            for key, line in run.predictions.items()
            if key in first.predictions and first.predictions[key]["references"] != line["references"]
        ]
        if other:
            raise InputError(
                f"{first.name}, {run.name}: {len(other)} of their clips have other references, such as {other[0]}; "
                "evaluate them on the same data"
            )


def _changed_settings(run: Run) -> list[str]:
    """Settings that were others in the evaluation than in training, "key old -> new". Evaluations before 0.2
    record the prompt and the number of frames alone."""
    settings, data = run.metrics["settings"], run.experiment.data
    if "changed" in settings:
        return settings["changed"]
    return [
        f"data.{key} {trained!r} -> {settings[key]!r}"
        for key, trained in (("num_frames", data.num_frames), ("prompt", data.prompt))
        if settings.get(key, trained) != trained
    ]


def warnings(runs: list[Run], keys: list[str], outside: Sequence[OutsideRun] = ()) -> list[dict[str, str]]:
    """What makes the comparison doubtful, most important first, in English ("en") and Korean ("ko")."""
    found = [*_of_clips([*runs, *outside], keys), *_of_evaluations(runs), *_of_trainings(runs)]
    for run in runs:
        found += _of_run(run)
    return [{"en": english, "ko": korean} for english, korean in found]


def outside_warnings(outside: Sequence[OutsideRun], keys: list[str]) -> list[dict[str, str]]:
    """As :func:`warnings`, for outside models alone."""
    found = [*_of_clips(outside, keys)]
    for run in outside:
        if cut := unfinished_warning(run.metrics.get("unfinished")):
            found.append((f"{run.name}: {cut[0]}", f"{run.name}: {cut[1]}"))
    return [{"en": english, "ko": korean} for english, korean in found]


def _of_clips(runs: Sequence[Evaluated], keys: list[str]) -> Iterator[tuple[str, str]]:
    """The warning, in English and Korean, that runs were evaluated on different clips."""
    sizes = {run.name: len(run.predictions) for run in runs}
    if set(sizes.values()) != {len(keys)}:
        yield (
            f"The runs were not evaluated on the same clips ({_listed(sizes)}); only the {len(keys)} clips "
            "that all runs have are compared.",
            f"실험마다 평가한 클립이 다릅니다 ({_listed(sizes)}). 공통 클립 {len(keys)}개만 비교합니다.",
        )


def _of_evaluations(runs: list[Run]) -> Iterator[tuple[str, str]]:
    """Warnings about what was evaluated and how."""
    if runs[0].metrics["settings"].get("split") == "train":
        yield (
            "The clips are of split train: the models were trained on them, and may have memorised them.",
            "학습에 쓰인 train 분할의 클립으로 평가했습니다. 모델이 정답을 외웠을 수 있습니다.",
        )
    if changed := _changed_settings(runs[0]):
        yield (
            f"All evaluations have other settings than the training: {'; '.join(changed)}",
            f"모든 평가의 설정이 학습 때와 다릅니다: {'; '.join(changed)}",
        )
    hashed = all(run.record.get("weights") for run in runs)
    for setting in SAME:
        if hashed and setting in PLACES:
            continue
        values = {run.name: run.metrics["settings"].get(setting) for run in runs}
        yield from _differing(values, f"Evaluations differ in {setting}", f"평가 설정이 서로 다릅니다 ({setting})")
    ids: dict[str, list[str]] = {}
    for run in runs:
        if "id" in run.record:
            ids.setdefault(run.record["id"], []).append(run.name)
    for copies in (", ".join(names) for names in ids.values() if len(names) > 1):
        yield (f"The same run more than once: {copies}", f"같은 모델이 두 번 이상 들어 있습니다: {copies}")


def _of_trainings(runs: list[Run]) -> Iterator[tuple[str, str]]:
    """Warnings about what the runs were trained from."""
    yield from _differing(
        {run.name: _data(run.record) for run in runs},
        "The runs were not trained on the same data",
        "학습 데이터가 서로 다릅니다",
    )
    for part, korean in (("vision", "비전 타워"), ("llm", "언어 모델")):
        yield from _differing(
            {run.name: _base(run, part) for run in runs if run.record.get("weights")},
            f"The runs were trained from different weights of {part}.model",
            f"{korean}({part}.model)의 사전 학습 가중치가 서로 다릅니다",
        )
    yield from _differing(
        {run.name: json.dumps(run.record["sampling"]) for run in runs if "sampling" in run.record},
        "The frames of the training data were sampled or fitted differently",
        "학습 데이터의 프레임 추출 또는 크기 맞춤 방식이 서로 다릅니다",
    )
    yield from _differing(
        {run.name: run.record.get("global_batch") for run in runs},
        "The runs were trained with different global batches, and so with different numbers of steps "
        "(set training.global_batch)",
        "글로벌 배치 크기가 서로 달라 학습 스텝 수도 다릅니다 (training.global_batch로 맞추세요)",
    )
    yield from _differing(
        {run.name: budget(run) for run in runs},
        "The learning rates were not tuned with the same budget (vlmds sweep --tune lr; —: not tuned), so some "
        "experiments had more tries than others",
        "학습률 튜닝 예산이 서로 달라 일부 실험만 더 많은 학습률을 시도했습니다(vlmds sweep --tune lr, —: 튜닝하지 않음)",
    )
    if learned := [d["key"] for d in _setting_rows(runs) if not d["expected"]]:
        yield (
            f"The experiments differ in more than projector, adapter and seed: {', '.join(learned)} "
            '(values under "Settings that differ")',
            f"프로젝터, 어댑터, 시드 외에도 실험 설정이 다릅니다: {', '.join(learned)} "
            "(값은 아래 '서로 다른 설정' 표 참고)",
        )


def _of_run(run: Run) -> Iterator[tuple[str, str]]:
    """Warnings about one run."""
    artifact = run.metrics["settings"]["artifact"]
    if not run.finished:
        yield (
            f"{run.name}: training is not finished; the evaluation is of stage {artifact}",
            f"{run.name}: 학습이 끝나지 않았습니다. {artifact} 단계를 평가한 결과입니다.",
        )
    elif artifact != run.experiment.stages[-1].name:
        yield (
            f"{run.name}: the evaluation is of stage {artifact}, not of the last stage; evaluate again",
            f"{run.name}: 마지막 단계가 아닌 {artifact} 단계를 평가했습니다. 다시 평가하세요.",
        )
    if run.changed:
        yield (
            f"{run.name}: the run's weights changed after the evaluation; evaluate again",
            f"{run.name}: 평가한 뒤에 모델의 가중치가 바뀌었습니다. 다시 평가하세요.",
        )
    for stage in (tuned_by(run) or {}).get("stages", ()):
        if stage["edge"]:
            yield (
                f"{run.name}: the rate chosen for stage {stage['stage']}, {stage['chosen']:g}, is the lowest or highest of "
                "the rates that were tried (vlmds sweep --rates)",
                f"{run.name}: {stage['stage']} 단계에서 선택한 학습률 {stage['chosen']:g}은(는) 시도한 범위의 끝에 있습니다"
                "(vlmds sweep --rates).",
            )
    for warning in run.warnings:
        english, korean = (f"{run.name}, {warning['stage']}: {warning[language]}" for language in ("en", "ko"))
        yield english, korean
    if cut := unfinished_warning(run.metrics.get("unfinished")):
        english, korean = (f"{run.name}: {text}" for text in cut)
        yield english, korean
    if found_doubts := doubts(run.metrics["looking"]):
        english, korean = ("; ".join(doubt[language] for doubt in found_doubts) for language in ("en", "ko"))
        yield (
            f"{run.name} may not use the video: {english}",
            f"{run.name}: 모델이 영상을 활용하지 않을 수 있습니다 ({korean})",
        )


def _differing(values: dict[str, Any], english: str, korean: str) -> Iterator[tuple[str, str]]:
    """The warning with the values, if they are not all the same."""
    if _differ(values):
        listed = _listed(values)
        yield f"{english}: {listed}", f"{korean}: {listed}"


def _data(record: dict) -> str:
    """The beginning of the fingerprint of a run's data, or of each stage's data. record: run.json."""
    stages = record.get("stage_data") or {"all": str(record.get("data_fingerprint"))}
    return ", ".join(dict.fromkeys(fingerprint[:12] for fingerprint in stages.values()))


def differing_settings(runs: list[Run]) -> list[dict]:
    """[{key, expected, values by run}] of everything recorded that is not the same in all: experiment keys, and
    what run.json and the evaluation record ("run: …", "evaluation: …"). Those that are meant to differ, or that
    change nothing that is learned, are "expected"."""
    hashed = all(run.record.get("weights") for run in runs)
    recorded: tuple[tuple[str, bool, Callable[[Run], Any]], ...] = (
        ("run: global batch", False, lambda run: run.record.get("global_batch")),
        ("run: steps", False, lambda run: run.steps),
        ("run: data", False, lambda run: run.record.get("data_fingerprint")),
        ("run: sampling", False, lambda run: run.record.get("sampling")),
        ("run: vision weights", False, lambda run: _base(run, "vision")),
        ("run: llm weights", False, lambda run: _base(run, "llm")),
        ("run: ranks", True, lambda run: _of_starts(run, "world_size")),
        ("run: hardware", True, lambda run: hardware(run.record)),
        ("run: versions", False, lambda run: _versions(run)),
        ("run: git commit", False, lambda run: _of_starts(run, "git")),
        *(
            (f"evaluation: {name}", hashed and name in PLACES, lambda run, name=name: run.metrics["settings"].get(name))
            for name in (*SAME, "artifact")
        ),
        *(
            (f"evaluation: {name}", True, lambda run, name=name: run.metrics.get("timing", {}).get(name))
            for name in ("ranks", "batch_size", "devices")
        ),
    )
    found = _setting_rows(runs)
    for key, expected, value in recorded:
        values = {run.name: value(run) for run in runs}
        if _differ(values):
            found.append({"key": key, "expected": expected, "values": values})
    return sorted(found, key=lambda d: d["expected"])


def _setting_rows(runs: list[Run]) -> list[dict]:
    """The rows of :func:`differing_settings` of experiment keys."""
    flat = {run.name: flat_settings(run.experiment.model_dump()) for run in runs}
    found = []
    for key in sorted(set().union(*flat.values())):
        values = {name: settings.get(key) for name, settings in flat.items()}
        if _differ(values):
            expected = under(key, (*EXPECTED, *NOT_LEARNED))
            if re.fullmatch(r"stages\.\d+\.lr", key) and all(tuned_by(run) for run in runs):
                expected = True
            if key == "projector.init" and None in values.values():  # some had a better start
                expected = False
            found.append({"key": key, "expected": expected, "values": values})
    return found


def _base(run: Run, part: str) -> str | None:
    """The hashes of the base weights of "vision" or "llm", shortened; None if not recorded."""
    hashes = {name: value for name, value in run.record.get("weights", {}).items() if name.startswith(f"{part}/")}
    return ", ".join(f"{name.split('/')[1]} {value[:12]}" for name, value in sorted(hashes.items())) or None


def _of_starts(run: Run, name: str) -> list:
    """The values of all starts, each once, in order."""
    return [json.loads(v) for v in dict.fromkeys(json.dumps(start.get(name)) for start in run.record.get("starts", ()))]


def _versions(run: Run) -> list[str]:
    versions = [start.get("versions", {}) for start in run.record.get("starts", ())]
    return sorted({f"{package} {version}" for found in versions for package, version in found.items()})


def _only_differing(values: dict[str, Any]) -> dict[str, Any]:
    """Of dicts only the entries that differ, which one can read."""
    if not all(isinstance(value, dict) for value in values.values()):
        return values
    keys = set().union(*values.values())
    shown = [key for key in sorted(keys) if _differ({name: value.get(key) for name, value in values.items()})]
    return {name: {key: value.get(key) for key in shown} for name, value in values.items()}


def _differ(values: dict[str, Any]) -> bool:
    return len({json.dumps(value, default=str, sort_keys=True) for value in values.values()}) > 1


def _listed(values: dict[str, Any]) -> str:
    return "; ".join(
        f"{name}: {'—' if (text := shown_value(value)) is None else text}" for name, value in values.items()
    )


def shown_value(value: Any) -> str | None:
    """A setting or recorded value as text; None for what is not set or empty."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown_value(part) or '—'}" for key, part in value.items()) or None
    if isinstance(value, (list, tuple)):
        return ", ".join(shown_value(part) or "—" for part in value) or None
    return None if value is None or value == "" else str(value)
