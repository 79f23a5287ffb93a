"""The folder of reviews: a new one is planned, an existing one continued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmds.console.progress import phase
from vlmds.errors import InputError, SampleError
from vlmds.evaluation.reviews import PLAN, Pair, Plan, read_plan, write_plan
from vlmds.files import absolute
from vlmds.permissions import check_writable
from vlmds.review.choose import OVERLAP, PAIRS, SHARES, Choice, choose_pairs
from vlmds.review.clips import ClipStore
from vlmds.review.evaluations import Evaluations, planned_evaluations, read_evaluations

ENCODED = ".clips"
"""Folder of encoded videos in that of the reviews."""


@dataclass(frozen=True)
class Opened:
    """Reviews that can be shown. notes: lines for the user."""

    folder: Path
    plan: Plan
    evaluations: Evaluations
    clips: ClipStore
    notes: list[str]


def open_reviews(
    folder: Path,
    runs: Sequence[Path] = (),
    *,
    data: str | None = None,
    evaluation: str | None = None,
    choice: Choice | None = None,
) -> Opened:
    """Plan reviews of these runs in the folder, or continue those that are there.

    Args:
        runs: may be left out for existing reviews. data: packed dataset of the clips (default: the evaluations'; of
            existing reviews, theirs). choice: None for the defaults, or the existing reviews' own.

    Raises:
        InputError: what is given cannot be reviewed, or existing reviews are of other runs or another choice.
    """
    check_writable(folder, "--output")
    if (folder / PLAN).is_file():
        return _continued(folder, runs, data, evaluation, choice)
    return _planned(folder, runs, data, evaluation, choice or Choice())


def _planned(folder: Path, runs: Sequence[Path], data: str | None, evaluation: str | None, choice: Choice) -> Opened:
    evaluations = read_evaluations(runs, evaluation)
    place = data or evaluations.data
    if not place:
        raise InputError("--data: give the packed dataset of the clips; the evaluations name none")
    cache = folder / ENCODED
    strata = None
    if choice.stratify:
        clips = ClipStore(place, evaluations.clips, cache)
        with phase("reading the kept column"):
            strata = clips.columns(choice.stratify, evaluations.clips)
    with phase("choosing the clips"):
        pairs, notes = choose_pairs(evaluations, choice, strata)
    plan = make_plan(evaluations, choice, pairs, place)
    clips = ClipStore(plan.dataset, {pair.clip for pair in pairs}, cache)
    _check_sources(plan, clips)
    folder.mkdir(parents=True, exist_ok=True)
    write_plan(folder, plan)
    return Opened(folder, plan, evaluations, clips, [*evaluations.warnings, *notes, *_unreadable(clips)])


def _continued(
    folder: Path, runs: Sequence[Path], data: str | None, evaluation: str | None, choice: Choice | None
) -> Opened:
    plan = read_plan(folder)
    if runs and {run.id for run in read_evaluations(runs, evaluation).runs} != {run.id for run in plan.runs}:
        raise other_runs(folder, plan)
    if choice is not None and described(choice) != plan.choose:
        raise InputError(
            f"{folder}: its pairs were chosen with other options ({options_text(plan.choose)}); leave these options out "
            "to continue, or choose another folder with -o"
        )
    clips = ClipStore(data or plan.dataset, {pair.clip for pair in plan.pairs}, folder / ENCODED)
    _check_sources(plan, clips)
    return Opened(folder, plan, planned_evaluations(plan), clips, _unreadable(clips))


def make_plan(evaluations: Evaluations, choice: Choice, pairs: Sequence[Pair], dataset: str | None) -> Plan:
    """The plan of pairs that were chosen so."""
    return Plan(
        dataset=absolute(dataset) if dataset else "",
        split=evaluations.split,
        runs=tuple(evaluations.runs),
        choose=described(choice),
        seed=choice.seed,
        overlap=min(choice.overlap, len(pairs)),
        pairs=tuple(pairs),
    )


def other_runs(folder: Path, plan: Plan) -> InputError:
    """The error for runs that the reviews in the folder are not of."""
    return InputError(
        f"{folder}: has reviews of other runs, or of other evaluations of them "
        f"({', '.join(run.name for run in plan.runs)}); choose another folder with -o"
    )


def described(choice: Choice) -> dict[str, Any]:
    """The options as the plan records them."""
    return {
        "pairs": choice.pairs,
        "shares": {**(choice.shares or SHARES)},
        "overlap": choice.overlap,
        "stratify": choice.stratify,
        "seed": choice.seed,
    }


def options_text(choose: dict[str, Any]) -> str:
    """The recorded options as on the command line."""
    shares = ",".join(f"{reason}={share:.0%}" for reason, share in choose.get("shares", {}).items())
    texts = [
        f"--pairs {choose.get('pairs', PAIRS)}",
        f"--choose {shares}",
        f"--overlap {choose.get('overlap', OVERLAP)}",
    ]
    texts += [f"--{name} {choose[name]}" for name in ("stratify", "seed") if choose.get(name) is not None]
    return " ".join(texts)


def _check_sources(plan: Plan, clips: ClipStore) -> None:
    """Raise InputError if a clip of the dataset is of another video than the one that the runs captioned. (Of 200:
    another dataset differs in many.)"""
    for pair in plan.pairs[:200]:
        try:
            source = clips.description(pair.clip).get("source", pair.clip)
        except SampleError:
            continue  # reported as a shard that cannot be read, or in the page
        if source != pair.source:
            raise InputError(
                f"--data {clips.index.root}: clip {pair.clip} is of {source}, but the runs captioned {pair.source}; "
                "give the dataset that they were evaluated on"
            )


def _unreadable(clips: ClipStore) -> list[str]:
    return [f"{line}; its clips are shown without video until then" for line in clips.missing_shards()]
