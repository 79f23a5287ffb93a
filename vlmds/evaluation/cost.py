"""Cost of a run: GPU-hours of all its stages, inherited ones too, memory, speed of training and captioning,
energy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vlmds.errors import InputError
from vlmds.experiments.schema import Experiment
from vlmds.models.artifact import projector_sha256
from vlmds.runs.folder import RunFolder
from vlmds.runs.journal import read_metrics

COST = {  # key: (English, Korean, format)
    "visual_tokens": ("visual tokens", "시각 토큰 수", "{:,.0f}"),
    "trainable": ("trainable parameters", "학습 파라미터 수", "{:,.0f}"),
    "samples_per_s": ("samples/s", "샘플/초", "{:,.2f}"),
    "memory_gib": ("peak memory, GiB", "최대 메모리(GiB)", "{:,.2f}"),
    "hours": ("training, hours", "학습 시간(시간)", "{:,.2f}"),
    "gpu_hours": ("GPU-hours, all stages", "GPU 시간(모든 단계)", "{:,.2f}"),
    "kilowatt_hours": ("GPU energy, kWh", "GPU 전력량(kWh)", "{:,.2f}"),
    "captions_per_s": ("captions/s per GPU", "GPU당 캡션/초", "{:,.2f}"),
}


@dataclass
class StageTime:
    """Time of a stage's training, validation and checkpoints not counted.

    gpu_hours: hours of all ranks; None where the number of ranks is not known.
    """

    samples: int = 0
    seconds: float = 0.0
    gpu_hours: float | None = 0.0


@dataclass
class Cost:
    """values: by the keys of COST, None where not known. unknown: the stages without which there are no
    GPU-hours, and why, in English and Korean. hardware: that the counted stages were trained on."""

    values: dict[str, float | None]
    unknown: list[tuple[str, str]] = field(default_factory=list)
    hardware: list[str] = field(default_factory=list)


def run_cost(path: Path, record: dict, experiment: Experiment, records: list[dict], metrics: dict) -> Cost:
    """The cost of the run at ``path``.

    Args:
        record: run.json. records: metrics.jsonl. metrics: metrics.json of its evaluation.
    """
    times = stage_times(records, record)
    cost = Cost({}, hardware=hardware(record))
    total: float | None = 0.0
    for stage in (stage.name for stage in experiment.stages):
        own = _gpu_hours(path, record, stage, times, cost)
        total = None if own is None or total is None else total + own
    samples, seconds = (sum(getattr(time, name) for time in times.values()) for name in ("samples", "seconds"))
    memory = [r["memory_gib"] for r in records if r.get("memory_gib")]
    joules = {r["stage"]: r["joules"] for r in records if r["kind"] == "energy"}
    model, timing = metrics["model"], metrics.get("timing", {})
    cost.values = {
        "visual_tokens": model["visual_tokens"],
        "trainable": model["projector_parameters"] + model["adapter_parameters"],
        "samples_per_s": samples / seconds if seconds else None,
        "memory_gib": max(memory, default=None),
        "hours": seconds / 3600 if seconds else None,
        "gpu_hours": total or None,
        "kilowatt_hours": sum(joules.values()) / 3.6e6 if joules else None,
        "captions_per_s": captioning_speed(timing),
    }
    return cost


def captioning_speed(timing: dict) -> float | None:
    """Captions per second and GPU of an evaluation. timing: of its metrics.json."""
    return timing["captioned"] / timing["captioning_seconds"] if timing.get("captioning_seconds") else None


def hardware(record: dict) -> list[str]:
    """Names of the GPUs that a run was trained on; empty if one of its starts did not record them."""
    found = [start.get("hardware", []) for start in record.get("starts", ())]
    return sorted({name for names in found for name in names}) if all(found) else []


def stage_times(records: list[dict], record: dict) -> dict[str, StageTime]:
    """By stage, from metrics.jsonl and run.json. Records before 0.2 lack the number of ranks: there it is known
    if all starts had the same."""
    sizes = {start.get("world_size") for start in record.get("starts", ())}
    same = sizes.pop() if len(sizes) == 1 else None
    times: dict[str, StageTime] = {}
    pending = 0
    for line in (r for r in records if r["kind"] == "train"):
        pending += line["samples"]
        if line.get("samples_per_s"):  # of the window that ends here
            time = times.setdefault(line["stage"], StageTime())
            seconds, ranks = pending / line["samples_per_s"], line.get("ranks", same)
            time.samples, time.seconds, pending = time.samples + pending, time.seconds + seconds, 0
            known = time.gpu_hours is not None and ranks is not None
            time.gpu_hours = time.gpu_hours + ranks * seconds / 3600 if known else None
    return times


def _gpu_hours(path: Path, record: dict, stage: str, times: dict[str, StageTime], cost: Cost) -> float | None:
    """GPU-hours of one stage, counted where it was trained; None, with the reason in ``cost``, if not known."""
    seen = {path.resolve()}
    resumed = record.get("resumed_from", {}).get("checkpoint")
    while origin := record.get("inherited", {}).get(stage):
        path = Path(origin["run"])
        try:
            record = RunFolder.read(path)
            there = projector_sha256(path / "artifacts" / stage) == origin["projector_sha256"]
        except InputError:
            there = False
        if not there or path.resolve() in seen:
            cost.unknown.append(
                (
                    f"stage {stage} was inherited from {path}, which no longer exists",
                    f"{stage} 단계를 학습한 실행 폴더를 찾을 수 없습니다({path})",
                )
            )
            return None
        seen.add(path.resolve())
        resumed = record.get("resumed_from", {}).get("checkpoint")
        times = stage_times(read_metrics(path / "metrics.jsonl"), record)
        names = hardware(record)
        cost.hardware = sorted({*cost.hardware, *names}) if cost.hardware and names else []
    if resumed and Path(resumed).parent.parent.resolve() != path.resolve():
        cost.unknown.append(
            (
                f"stage {stage} started from a checkpoint of another run, {resumed}",
                f"{stage} 단계는 다른 실행의 체크포인트 {resumed}에서 시작했습니다",
            )
        )
        return None
    hours = times[stage].gpu_hours if stage in times else None
    if hours is None:
        cost.unknown.append(
            (
                f"the record of stage {stage} lacks its time or its ranks",
                f"{stage} 단계의 시간 또는 랭크 수 기록이 없습니다",
            )
        )
    return hours
