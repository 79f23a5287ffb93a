"""Captions of evaluated runs side by side, read from predictions.jsonl; no model and no PyTorch is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmds.console.progress import phase
from vlmds.console.text import counted
from vlmds.errors import InputError
from vlmds.evaluation.reviews import Plan, ReviewedRun, run_id
from vlmds.evaluation.saved import evaluation_folder, read_captions, read_evaluation, unique_names
from vlmds.files import sha256_of


@dataclass(frozen=True)
class ReviewedClip:
    """source: the video that it is from. references: its captions in the dataset."""

    source: str
    references: list[str]


@dataclass
class Evaluations:
    """The evaluations of several runs, and the clips that all of them have.

    settings: of each run's evaluation, by the run's id. captions: {run: {clip: caption}}. blind: {run: {clip: blind
    score}} (see :func:`blind_score`), without clips that have none. warnings: lines for the user.
    """

    runs: list[ReviewedRun]
    settings: dict[str, dict[str, Any]]
    clips: dict[str, ReviewedClip]
    captions: dict[str, dict[str, str]]
    blind: dict[str, dict[str, float]]
    warnings: list[str] = field(default_factory=list)

    @property
    def split(self) -> str | None:
        return next(iter(self.settings.values())).get("split")

    @property
    def data(self) -> str | None:
        """The dataset of the first run's evaluation."""
        return next(iter(self.settings.values())).get("data")

    @property
    def prompt(self) -> str:
        return next(iter(self.settings.values())).get("prompt") or ""


def blind_score(line: dict[str, Any]) -> float | None:
    """How much likelier the references of a clip are with another clip's video (or black frames) than with its own,
    in nats per token: the higher, the less the model uses the video. None if the evaluation did not measure it."""
    found = line.get("reference_log_probability") or {}
    real, blind = found.get("real"), found.get("shuffled")
    blind = found.get("blank") if blind is None else blind
    return None if real is None or blind is None else blind - real


def read_evaluations(runs: Sequence[Path], evaluation: str | None = None) -> Evaluations:
    """The evaluations of these runs (run folders, or folders of evaluations).

    Args:
        evaluation: name of the folder under RUN/evaluation; default: val, or the only one.

    Raises:
        InputError: fewer than two runs, a run without evaluation, one given twice, or evaluations of other splits,
            other references, or no clip in common.
    """
    if len(runs) < 2:
        raise InputError("RUN: give two evaluated runs or more; a review compares their captions")
    folders = [run if (run / "predictions.jsonl").is_file() else _evaluation(run, evaluation) for run in runs]
    # RUN/evaluation/NAME is called RUN.
    owners = [folder.parent.parent if folder.parent.name == "evaluation" else folder for folder in folders]
    named: list[ReviewedRun] = []
    for name, folder in zip(unique_names(owners), folders, strict=True):
        sha256 = _sha256(folder)
        twin = next((other.name for other in named if other.sha256 == sha256), None)
        if twin:
            raise InputError(f"{twin}, {name}: have the same captions and scores; give one of them")
        named.append(ReviewedRun(id=run_id(sha256), name=name, evaluation=str(folder.absolute()), sha256=sha256))
    return _read(named)


def planned_evaluations(plan: Plan) -> Evaluations:
    """The evaluations of a plan, with its clips.

    Raises:
        InputError: an evaluation has moved, or was made again since the plan.
    """
    for run in plan.runs:
        folder = Path(run.evaluation)
        if not (folder / "predictions.jsonl").is_file():
            raise InputError(f"{folder}: missing, but these reviews compare its captions; move it back there")
        if _sha256(folder) != run.sha256:
            raise InputError(
                f"{folder}: was made again after these reviews were planned, with other captions; "
                "make new reviews in another folder (-o)"
            )
    return _read(plan.runs, {pair.clip for pair in plan.pairs})


def _evaluation(run: Path, name: str | None) -> Path:
    if not run.is_dir():
        raise InputError(f"{run}: no such folder; give runs that were evaluated")
    return evaluation_folder(run, name)


def _sha256(folder: Path) -> str:
    path = folder / "predictions.jsonl"
    if not path.is_file():
        read_evaluation(folder)  # says what is missing
    return sha256_of(path)


def _read(runs: Iterable[ReviewedRun], only: set[str] | None = None) -> Evaluations:
    found = Evaluations([*runs], {}, {}, {}, {})
    with phase("reading the captions", len(found.runs), "runs") as progress:
        for run in found.runs:
            metrics, lines = read_captions(run.evaluation)
            kept = [line for line in lines if only is None or line["key"] in only]
            found.settings[run.id] = metrics["settings"]
            found.captions[run.id] = {line["key"]: line["caption"] for line in kept}
            scores = {line["key"]: blind_score(line) for line in kept}
            found.blind[run.id] = {key: score for key, score in scores.items() if score is not None}
            _add_clips(found, run, kept)
            progress.advance()
    _check_split(found)
    _keep_common(found)
    return found


def _add_clips(found: Evaluations, run: ReviewedRun, lines: list[dict[str, Any]]) -> None:
    other = []
    for line in lines:
        clip = found.clips.setdefault(line["key"], ReviewedClip(line.get("source") or line["key"], line["references"]))
        if clip.references != line["references"]:
            other.append(line["key"])
    if other:
        raise InputError(
            f"{found.runs[0].name}, {run.name}: {len(other)} of their clips have other references, such as {other[0]}; "
            "evaluate them on the same data"
        )


def _check_split(found: Evaluations) -> None:
    splits = {run.name: found.settings[run.id].get("split") for run in found.runs}
    if len({*splits.values()}) > 1:
        listed = ", ".join(f"{name}: {split}" for name, split in splits.items())
        raise InputError(f"the runs were evaluated on different splits ({listed}); choose one with --evaluation NAME")


def _keep_common(found: Evaluations) -> None:
    """Leave out clips that a run does not have."""
    common = [key for key in found.clips if all(key in captions for captions in found.captions.values())]
    sizes = ", ".join(f"{run.name}: {len(found.captions[run.id])}" for run in found.runs)
    if not common:
        raise InputError(f"no clip was evaluated in all of the runs ({sizes}); evaluate them on the same data")
    if len(common) < len(found.clips):
        found.warnings.append(
            f"the runs were not evaluated on the same clips ({sizes}); only the {counted(len(common), 'clip')} that "
            "all runs have can be chosen"
        )
    found.clips = {key: found.clips[key] for key in common}
