"""Answers of people and judges in a comparison: `vlmds compare --reviews`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmds.errors import InputError
from vlmds.evaluation.agreement import preference_alpha, share_interval
from vlmds.evaluation.evaluated_runs import Evaluated, Group, OutsideRun
from vlmds.evaluation.judged import (
    FEWEST_LABELLED,
    PairShares,
    corrected_preferences,
    in_both_orders,
    judge_preferences,
    pair_shares,
    position_bias,
)
from vlmds.evaluation.people_verdict import MARGIN, people_verdict
from vlmds.evaluation.preferences import Comparisons, Preferences, connected, estimate_preferences
from vlmds.evaluation.reviews import JUDGE, MARKS, Answer, Reviews, run_id
from vlmds.evaluation.statistics import holm
from vlmds.evaluation.verdict import pair_tests
from vlmds.files import sha256_of

Note = dict[str, str]
"""A sentence in English ("en") and Korean ("ko")."""
DISAGREEMENTS = 20
"""Clips that are listed, where people and the metric disagree most."""


@dataclass(frozen=True)
class Reviewed:
    """Reviews matched with what is compared. names: of the experiments, of which there are ``trained``, then of the
    outside models. method_of: number in names by run id. runs: by run id. notes: what was left out."""

    reviews: Reviews
    names: list[str]
    trained: int
    method_of: dict[str, int]
    runs: dict[str, Evaluated]
    notes: list[Note]

    def kept(self, answers: Sequence[Answer]) -> list[Answer]:
        """Those about two experiments of the comparison."""
        found = []
        for answer in answers:
            left, right = self.method_of.get(answer.left), self.method_of.get(answer.right)
            if left is not None and right is not None and left != right:
                found.append(answer)
        return found


def match(reviews: Reviews, groups: Sequence[Group], outside: Sequence[OutsideRun] = ()) -> Reviewed:
    """Raises InputError if the reviews are of fewer than two of the experiments and outside models."""
    planned = {run.id: run for run in reviews.plan.runs}
    method_of, runs, notes = {}, {}, list(reviews.warnings)
    evaluated: list[Sequence[Evaluated]] = [*(group.runs for group in groups), *([run] for run in outside)]
    for number, own in enumerate(evaluated):
        for run in own:
            folder = run.path / "evaluation" / run.metrics["folder"]
            found = run_id(sha256_of(folder / "predictions.jsonl"))
            if found in planned:
                method_of[found], runs[found] = number, run
            elif any(Path(other.evaluation) == folder.absolute() for other in planned.values()):
                notes.append(
                    _note(
                        f"{run.name}: evaluated again after it was reviewed; its answers are left out",
                        f"{run.name}: 사람 평가 이후 다시 평가되어 해당 응답을 제외했습니다.",
                    )
                )
            else:
                notes.append(
                    _note(f"{run.name}: not among the reviewed runs", f"{run.name}: 사람 평가 대상이 아닙니다.")
                )
    if len({*method_of.values()}) < 2:
        raise InputError(
            f"--reviews {reviews.folder}: has reviews of {', '.join(run.name for run in planned.values())}, of which fewer "
            "than two experiments or models are compared here, with the same predictions; compare those runs"
        )
    names = [*(group.name for group in groups), *(run.name for run in outside)]
    return Reviewed(reviews, names, len(groups), method_of, runs, notes)


def people(
    reviewed: Reviewed, costs: Sequence[Any], metrics: Sequence[str], margin: float | None = None
) -> dict[str, Any]:
    """All figures of people's and judges' answers. The verdict is on the experiments alone.

    Args:
        costs: of the experiments; the smallest is the cheapest. metrics: that people are compared with, the deciding
            one first. margin: of :func:`vlmds.evaluation.people_verdict.people_verdict`.
    """
    answers = reviewed.kept(reviewed.reviews.people)
    names, trained = reviewed.names, reviewed.trained
    fair = [answer for answer in answers if answer.chosen == "random"]
    notes = list(reviewed.notes)
    left_out = len(reviewed.reviews.people) - len(answers)
    if left_out:
        notes.append(
            _note(f"{left_out} answers are about other runs", f"비교 대상이 아닌 실행에 대한 응답: {left_out}개.")
        )
    numbers, found = _estimated(fair, reviewed.method_of, len(names))
    own_numbers, own = numbers, found
    if trained < len(names):
        of_runs = [a for a in fair if max(reviewed.method_of[a.left], reviewed.method_of[a.right]) < trained]
        own_numbers, own = _estimated(of_runs, reviewed.method_of, trained)
    if found is not None:
        notes += _reviewer_notes(found, fair)
    verdict = None
    if own is not None and own_numbers is not None:
        allowed = MARGIN if margin is None else margin
        verdict = people_verdict(own, [names[m] for m in own_numbers], [costs[m] for m in own_numbers], allowed)
    by_pair = pair_shares(fair, reviewed.method_of)
    return {
        "folder": str(reviewed.reviews.folder),
        "reviewers": sorted({answer.reviewer for answer in answers}),
        "answers": len(answers),
        "random": len(fair),
        "sources": len({answer.source for answer in fair}),
        "table": [
            {"name": name, **_tally(fair, reviewed.method_of, m), **_win(found, numbers, m),
             "marks": _marks(answers, reviewed.method_of, m)}
            for m, name in enumerate(names)
        ],
        "pairs": _pairs(found, numbers, names),
        "verdict": verdict,
        "adopt": _adopt(found, numbers, reviewed, verdict),
        "alpha": _alpha(answers, reviewed.method_of),
        "reviewer_sd": None if found is None or found.reviewers < 2 else found.reviewer_variance**0.5,
        "metrics": metric_agreement(reviewed, fair, metrics),
        "disagreements": disagreements(reviewed, answers, metrics[0]),
        "judges": judges(reviewed, by_pair, found, numbers),
        "notes": notes,
    }  # fmt: skip


def _estimated(
    answers: Sequence[Answer], method_of: dict[str, int], methods: int
) -> tuple[np.ndarray | None, Preferences | None]:
    """(numbers of the methods that the answers connect, their estimates); None without answers."""
    if not answers:
        return None, None
    comparisons = as_comparisons(answers, method_of)
    numbers = connected(comparisons, methods)
    return numbers, estimate_preferences(_renumbered(comparisons, numbers), len(numbers))


def _adopt(
    found: Preferences | None, numbers: np.ndarray | None, reviewed: Reviewed, verdict: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """For each outside model how often people prefer the experiment that the verdict takes, or the best of the
    experiments, to it: [{"name", "reference", "value", "low", "high", "p_holm"}], corrected for the outside models."""
    if found is None or numbers is None:
        return []
    trained = [i for i, m in enumerate(numbers) if m < reviewed.trained]
    others = [i for i, m in enumerate(numbers) if m >= reviewed.trained]
    if not trained or not others:
        return []
    name = verdict and (verdict["chosen"] or verdict["best"])
    reference = next(
        (i for i in trained if reviewed.names[numbers[i]] == name), max(trained, key=lambda i: found.values[i])
    )
    wins = [found.win(reference, other) for other in others]
    corrected = holm([win["p"] for win in wins])
    return [
        {"name": reviewed.names[numbers[other]], "reference": reviewed.names[numbers[reference]],
         "value": win["value"], "low": win["low"], "high": win["high"], "p_holm": float(p)}
        for other, win, p in zip(others, wins, corrected, strict=True)
    ]  # fmt: skip


def as_comparisons(answers: Sequence[Answer], method_of: dict[str, int]) -> Comparisons:
    """Answers of people about pairs of different methods."""
    left, right = (np.array([method_of[getattr(a, side)] for a in answers]) for side in ("left", "right"))
    side = np.array([{"left": -1, "right": 1}.get(a.choice, 0) for a in answers])
    outcome = 1 + np.where(left < right, side, -side)
    source, reviewer, pair = (
        np.unique([getattr(a, name) for a in answers], return_inverse=True)[1]
        for name in ("source", "reviewer", "pair")
    )
    random = np.array([a.chosen == "random" for a in answers])
    return Comparisons(np.minimum(left, right), np.maximum(left, right), outcome, source, reviewer, pair, random)


def _renumbered(comparisons: Comparisons, methods: np.ndarray) -> Comparisons:
    """The comparisons of these methods, with the numbers 0 … for them."""
    place = np.full(max(comparisons.second.max(), methods.max()) + 1, -1)
    place[methods] = np.arange(len(methods))
    kept = comparisons.of((place[comparisons.first] >= 0) & (place[comparisons.second] >= 0))
    return Comparisons(
        place[kept.first], place[kept.second], kept.outcome, kept.source, kept.reviewer, kept.pair, kept.random
    )


def _tally(answers: Sequence[Answer], method_of: dict[str, int], method: int) -> dict[str, int]:
    counts = {"wins": 0, "ties": 0, "losses": 0}
    for answer in answers:
        if method in (method_of[answer.left], method_of[answer.right]):
            preferred = answer.preferred
            counts["ties" if preferred is None else "wins" if method_of[preferred] == method else "losses"] += 1
    return counts


def _win(found: Preferences | None, numbers: np.ndarray | None, method: int) -> dict[str, Any]:
    """The probability that the method is preferred to the mean of the others."""
    if found is None or numbers is None or method not in numbers or len(numbers) < 2:
        return {"win": None}
    return {"win": found.average_win(int(np.flatnonzero(numbers == method)[0]))}


def _pairs(found: Preferences | None, numbers: np.ndarray | None, names: Sequence[str]) -> list[dict[str, Any]]:
    if found is None or numbers is None:
        return []
    return [
        {"one": names[numbers[int(p["one"])]], "other": names[numbers[int(p["other"])]], "p_holm": p["p_holm"],
         **found.win(int(p["one"]), int(p["other"]))}
        for p in pair_tests(found)
    ]  # fmt: skip


def _marks(answers: Sequence[Answer], method_of: dict[str, int], method: int) -> dict[str, dict[str, Any]]:
    """{mark: {"marked", "shown" (of all answers), "value", "low", "high" (of pairs drawn at random, if any)}}."""
    seen = []
    for answer in answers:
        for side in ("left", "right"):
            if method_of[getattr(answer, side)] == method:
                seen.append((answer.source, answer.chosen == "random", getattr(answer.marks, side)))
    _, source = np.unique([s for s, *_ in seen], return_inverse=True)
    fair = np.array([f for _, f, _ in seen], dtype=np.float64)
    found: dict[str, dict[str, Any]] = {}
    for mark in MARKS:
        has = np.array([mark in marks for *_, marks in seen], dtype=np.float64)
        found[mark] = {"marked": int(has.sum()), "shown": len(seen)}
        if fair.any():
            found[mark] |= share_interval(np.bincount(source, has * fair), np.bincount(source, fair))
    return found


def _alpha(answers: Sequence[Answer], method_of: dict[str, int]) -> dict[str, Any] | None:
    """Krippendorff's alpha of the reviewers on pairs that two or more answered."""
    if not answers:
        return None
    found = as_comparisons(answers, method_of)
    table = np.full((found.pair.max() + 1, found.reviewer.max() + 1), -1)
    table[found.pair, found.reviewer] = found.outcome
    source = np.zeros(len(table), dtype=np.int64)
    source[found.pair] = found.source
    return preference_alpha(table, source)


def metric_agreement(
    reviewed: Reviewed, answers: Sequence[Answer], metrics: Sequence[str]
) -> dict[str, dict[str, float]]:
    """For each metric in how many answers the preferred caption has the higher score (the same: half), ties left out:
    {"value", "low", "high", "answers"}."""
    decided = [answer for answer in answers if answer.preferred is not None]
    found = {}
    for metric in metrics:
        gaps = [(answer.source, gap) for answer in decided if (gap := _gap(reviewed, answer, metric)) is not None]
        if gaps:
            _, source = np.unique([s for s, _ in gaps], return_inverse=True)
            right = np.array([(np.sign(gap) + 1) / 2 for _, gap in gaps])
            found[metric] = {**share_interval(np.bincount(source, right), np.bincount(source)), "answers": len(gaps)}
    return found


def _gap(reviewed: Reviewed, answer: Answer, metric: str) -> float | None:
    """The score of the preferred caption less the other's."""
    preferred = answer.preferred
    other = answer.right if preferred == answer.left else answer.left
    lines = [reviewed.runs[str(id)].predictions.get(answer.clip, {"scores": {}}) for id in (preferred, other)]
    higher, lower = (line["scores"].get(metric) for line in lines)
    return None if higher is None or lower is None else float(higher - lower)


def disagreements(reviewed: Reviewed, answers: Sequence[Answer], metric: str) -> list[dict[str, Any]]:
    """Clips where most people prefer the caption that has the lower score, the largest differences first:
    [{"clip", "preferred", "other", "people", "of", "gap"}]."""
    by_pair: dict[str, list[Answer]] = {}
    for answer in answers:
        by_pair.setdefault(answer.pair, []).append(answer)
    found: list[dict[str, Any]] = []
    for own in by_pair.values():
        votes = {run: sum(a.preferred == run for a in own) for run in (own[0].left, own[0].right)}
        (other, fewer), (preferred, more) = sorted(votes.items(), key=lambda item: item[1])
        deciding = next((a for a in own if a.preferred == preferred), None)
        gap = _gap(reviewed, deciding, metric) if deciding and more > fewer else None
        if gap is not None and gap < 0:
            runs = {"preferred": reviewed.runs[preferred].name, "other": reviewed.runs[other].name}
            found.append({"clip": own[0].clip, **runs, "people": more, "of": len(own), "gap": gap})
    return sorted(found, key=lambda each: each["gap"])[:DISAGREEMENTS]


def judges(
    reviewed: Reviewed, of_people: PairShares, found: Preferences | None, numbers: np.ndarray | None
) -> list[dict[str, Any]]:
    """For each judge its bias, its estimate of each experiment ("win", by name), and, where people judged some of the
    same pairs, the corrected one ("corrected") and the agreement with people."""
    by_judge: dict[str, list[Answer]] = {}
    for answer in reviewed.kept(reviewed.reviews.judged):
        by_judge.setdefault(answer.reviewer, []).append(answer)
    names = reviewed.names
    rows = []
    for reviewer, answers in sorted(by_judge.items()):
        bias = position_bias(answers)
        both = in_both_orders([answer for answer in answers if answer.chosen == "random"])
        judged = pair_shares([answer for pair in both.values() for answer in pair], reviewed.method_of)
        row: dict[str, Any] = {
            "name": reviewer.removeprefix(JUDGE), "pairs": len(judged), "seen": bias.pairs, "same": bias.same,
            "first": bias.first, "second": bias.second, "biased": bias.biased,
            "win": {}, "corrected": {}, "power": None, "agreement": None,
        }  # fmt: skip
        if not bias.biased and len(judged):
            row["agreement"] = _agreement(judged, of_people)
            own = _linked(judged, len(names))
            estimate = judge_preferences(judged.renumbered(own), len(own))
            row["win"] = {names[m]: estimate.average_win(i) for i, m in enumerate(own)}
            if found is not None and numbers is not None and {*numbers} <= {*own}:
                parts = judged.renumbered(numbers), of_people.renumbered(numbers)
                corrected = corrected_preferences(*parts, len(numbers), found)
                if corrected:
                    row["corrected"] = {names[m]: corrected[0].average_win(i) for i, m in enumerate(numbers)}
                    row["power"] = corrected[1]
        row["state"] = _state(row)
        rows.append(row)
    return rows


def _linked(judged: PairShares, methods: int) -> np.ndarray:
    zeros = np.zeros(len(judged), dtype=np.int64)
    return connected(Comparisons(judged.first, judged.second, *[zeros] * 5), methods)


def _agreement(judged: PairShares, of_people: PairShares) -> dict[str, Any] | None:
    """How often the judge's answer is that of most people, on pairs of both, and Krippendorff's alpha of the two."""
    place = {name: i for i, name in enumerate(of_people.names)}
    shared = [i for i, name in enumerate(judged.names) if name in place]
    if not shared:
        return None
    by_judge = judged.of(shared)
    one, other = by_judge.outcomes(), of_people.of([place[name] for name in by_judge.names]).outcomes()
    _, source = np.unique(by_judge.source, return_inverse=True)
    share = share_interval(np.bincount(source, one == other), np.bincount(source))
    return {"pairs": len(shared), **share, "alpha": preference_alpha(np.stack([one, other], axis=1), source)}


def _state(row: dict[str, Any]) -> Note:
    """What the judge's figures are worth."""
    if row["biased"]:
        places = f"{row['first']} / {row['second']}"
        return _note(
            f"not used: it prefers a position, not a caption (the first in both orders / the second: {places} of "
            f"{row['seen']} pairs)",
            f"제외: 캡션이 아니라 위치에 따라 답합니다(두 순서 모두 첫째 / 둘째: {row['seen']}쌍 중 {places}).",
        )
    if row["corrected"]:
        return _note(
            f"corrected with people's answers about {row['agreement']['pairs']} of its pairs (prediction-powered inference, "
            f"lambda {row['power']:.2f})",
            f"사람이 함께 평가한 {row['agreement']['pairs']}쌍으로 보정했습니다(예측 기반 추론, λ {row['power']:.2f}).",
        )
    shared = row["agreement"]["pairs"] if row["agreement"] else 0
    return _note(
        f"uncalibrated: people judged {shared} of its pairs drawn at random ({FEWEST_LABELLED} at least are needed)",
        f"보정되지 않음: 무작위로 뽑은 쌍 가운데 사람이 함께 평가한 쌍이 {shared}개입니다(최소 {FEWEST_LABELLED}개 필요).",
    )


def _reviewer_notes(found: Preferences, answers: Sequence[Answer]) -> list[Note]:
    """What the number of reviewers can say."""
    if found.reviewers < 2:
        return [
            _note(
                "One reviewer has 20 answers or more: how much people differ cannot be estimated, so the intervals are for "
                "these answers' reviewers only.",
                "응답이 20개 이상인 평가자가 한 명 이하여서 평가자 간 차이를 추정할 수 없으며, 신뢰구간은 해당 평가자에게만 유효합니다.",
            )
        ]
    if found.reviewers <= 3:
        return [
            _note(
                f"{found.reviewers} reviewers: the variance between them is in the intervals, but only roughly known "
                f"({found.reviewer_df} degrees of freedom). It says how much these people differ, little about others.",
                f"평가자 {found.reviewers}명: 신뢰구간에 평가자 간 분산을 포함했으나 추정이 대략적입니다(자유도 "
                f"{found.reviewer_df}). 이 평가자들의 차이는 알 수 있지만 다른 사람에게 일반화하기는 어렵습니다.",
            )
        ]
    return []


def _note(english: str, korean: str) -> Note:
    return {"en": english, "ko": korean}
