"""Which pairs a judge is asked about: those of existing reviews, and more drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmds.errors import InputError
from vlmds.evaluation.reviews import PLAN, Pair, Plan, read_plan, write_plan
from vlmds.review.choose import PAIRS, Choice, choose_pairs
from vlmds.review.evaluations import Evaluations, read_evaluations
from vlmds.review.folder import make_plan, other_runs


def pairs_to_judge(
    folder: Path, runs: Sequence[Path], *, number: int | None, evaluation: str | None = None, data: str | None = None
) -> tuple[Plan, Evaluations, list[Pair]]:
    """(the plan, the captions, the pairs). A folder without reviews gets a plan of pairs drawn at random.

    Args:
        runs: may be left out for existing reviews, whose runs they are then. number: pairs in all; default: those of
            existing reviews, else 200. More than existing reviews have are drawn at random; fewer are the first.

    Raises:
        InputError: runs that the reviews do not have, or that cannot be compared.
    """
    if not (folder / PLAN).is_file():
        if not runs:
            raise InputError(f"RUN: give evaluated runs; {folder} has no reviews to take them from")
        return _planned(folder, runs, number or PAIRS, evaluation, data)
    plan = read_plan(folder)
    evaluations = read_evaluations(runs or [Path(run.evaluation) for run in plan.runs], evaluation)
    own, planned = {run.id for run in evaluations.runs}, {run.id for run in plan.runs}
    if not own <= planned:
        raise other_runs(folder, plan)
    pairs = [pair for pair in plan.pairs if {pair.a, pair.b} <= own and pair.clip in evaluations.clips]
    if number is not None:
        pairs += _more(evaluations, plan, {pair.pair for pair in pairs}, number - len(pairs))
    return plan, evaluations, pairs[:number]


def _planned(
    folder: Path, runs: Sequence[Path], number: int, evaluation: str | None, data: str | None
) -> tuple[Plan, Evaluations, list[Pair]]:
    evaluations = read_evaluations(runs, evaluation)
    choice = Choice(pairs=number, shares={"random": 1.0}, overlap=0)
    pairs, _ = choose_pairs(evaluations, choice)
    plan = make_plan(evaluations, choice, pairs, data or evaluations.data)
    folder.mkdir(parents=True, exist_ok=True)
    write_plan(folder, plan)
    return plan, evaluations, pairs


def _more(evaluations: Evaluations, plan: Plan, taken: set[str], number: int) -> list[Pair]:
    """So many more pairs, drawn at random from all that are not taken."""
    if number <= 0:
        return []
    # Another seed than the plan's, whose sample would be drawn again.
    choice = Choice(pairs=number + len(taken), shares={"random": 1.0}, seed=plan.seed + 1)
    drawn, _ = choose_pairs(evaluations, choice)
    return [pair for pair in drawn if pair.pair not in taken][:number]
