"""A judge's estimates: position bias, and correction with people's answers."""

import numpy as np
import pytest

from tests.evaluation.opinions import answers_of, drawn_outcomes
from vlmds.evaluation.judged import (
    PairShares,
    corrected_preferences,
    in_both_orders,
    judge_preferences,
    pair_shares,
    position_bias,
)
from vlmds.evaluation.people import as_comparisons
from vlmds.evaluation.preferences import Preferences, estimate_preferences
from vlmds.evaluation.reviews import Pair, Plan, ReviewedRun, pair_id

RUNS = ("a" * 12, "b" * 12)


def plan_of(clips: int) -> Plan:
    runs = tuple(ReviewedRun(id=id, name=id[0], evaluation=f"/runs/{id}", sha256=id) for id in RUNS)
    pairs = tuple(
        Pair(pair=pair_id(f"c{i}", *RUNS), clip=f"c{i}", source=f"v{i // 2}", a=RUNS[0], b=RUNS[1], chosen="random")
        for i in range(clips)
    )
    return Plan(dataset="/data", runs=runs, pairs=pairs)


def by_judge(plan: Plan, place: float, seed: int = 0, lead: float = 0.5):
    better = {RUNS[0]: lead, RUNS[1]: 0.0}
    return [
        answer
        for order in (1, 2)
        for answer in answers_of(plan, "judge:m", better, seed + order, order=order, place=place)
    ]


@pytest.mark.parametrize(("place", "biased"), [(0.0, False), (0.3, False), (4.0, True), (-4.0, True), (50.0, True)])
def test_a_judge_that_sides_with_a_place_is_found(place, biased):
    found = position_bias(by_judge(plan_of(200), place))
    assert found.biased is biased and found.pairs == 200
    if place == 50:
        assert found.first == 200 and found.same == 0


def test_a_judge_that_prefers_one_run_always_is_not_biased_by_place():
    found = position_bias(by_judge(plan_of(100), 0.0, lead=50.0))
    assert found.same == found.run == 100 and not found.biased


def test_few_pairs_show_no_bias_and_half_a_pair_does_not_count():
    answers = by_judge(plan_of(10), 50.0)
    assert not position_bias(answers).biased
    assert len(in_both_orders(answers[:15])) == 5


def test_pairs_are_oriented_by_method():
    answers = by_judge(plan_of(4), 0.0, lead=50.0)
    found = pair_shares(answers, {RUNS[0]: 1, RUNS[1]: 0})
    assert found.shares.tolist() == [[0, 0, 1]] * 4 and found.outcomes().tolist() == [2] * 4
    assert len(pair_shares(answers, {RUNS[0]: 1})) == 0


def shares(names, sources, outcomes) -> PairShares:
    zeros = np.zeros(len(names), dtype=np.int64)
    return PairShares(names, zeros, zeros + 1, sources, np.eye(3)[outcomes])


def world(seed: int, judged: int, seen: int, bias: float, same: float = 1.5):
    """(People's answers about some pairs, a judge's about all). Clips differ, in a way that both see; the judge has
    a bias for the first method."""
    random = np.random.default_rng(seed)
    clip = same * random.standard_normal(judged)
    people, judge = drawn_outcomes(random, -0.3 + clip), drawn_outcomes(random, -0.3 + bias + clip)
    names, sources = [f"p{i}" for i in range(judged)], [f"v{i // 2}" for i in range(judged)]
    return shares(names[:seen], sources[:seen], people[:seen]), shares(names, sources, judge)


def truth() -> float:
    _, judge = world(99, 400_000, 0, 0.0)
    return float(judge.shares[:, 0].mean() + judge.shares[:, 1].mean() / 2)


def test_the_corrected_estimate_covers_the_truth_and_the_uncorrected_does_not():
    wanted, covered, uncorrected = truth(), 0, 0
    for seed in range(25):
        people, judge = world(seed, 1200, 240, bias=0.8)
        own = judge_preferences(judge, 2).win(0, 1)
        found, power = corrected_preferences(judge, people, 2, judge_preferences(people, 2))
        win = found.win(0, 1)
        covered += win["low"] <= wanted <= win["high"]
        uncorrected += own["low"] <= wanted <= own["high"]
        assert 0 <= power <= 1
    assert covered >= 21  # 24 expected
    assert uncorrected <= 2


def test_a_good_judge_makes_the_interval_shorter_and_a_useless_one_hardly_longer():
    def widths(same: float, informed: bool):
        people, judge = world(1, 3000, 300, 0.0, same)
        if not informed:
            random = np.random.default_rng(5)
            judge = shares(judge.names, judge.source, drawn_outcomes(random, np.zeros(len(judge))))
        alone = judge_preferences(people, 2)
        found, power = corrected_preferences(judge, people, 2, alone)
        return found.win(0, 1)["high"] - found.win(0, 1)["low"], alone.win(0, 1)["high"] - alone.win(0, 1)["low"], power

    corrected, alone, power = widths(6.0, True)
    assert corrected < 0.85 * alone and power > 0.5
    corrected, alone, power = widths(1.0, False)
    assert corrected < 1.05 * alone and power < 0.3


def test_few_shared_pairs_correct_nothing_and_no_others_leave_people_alone():
    people, judge = world(0, 200, 19, 0.0)
    assert corrected_preferences(judge, people, 2, judge_preferences(people, 2)) is None
    people, judge = world(0, 100, 100, 2.0)
    found, power = corrected_preferences(judge, people, 2, judge_preferences(people, 2))
    assert power == 0 and found.values == pytest.approx(judge_preferences(people, 2).values)


def test_the_error_of_the_reviewers_stays_in_the_corrected_estimate():
    plan = plan_of(120)
    answers = [
        *answers_of(plan, "민수", {RUNS[0]: 1.5, RUNS[1]: 0.0}, 1),
        *answers_of(plan, "지영", {RUNS[0]: -1.5, RUNS[1]: 0.0}, 2),
    ]
    method_of = {id: i for i, id in enumerate(RUNS)}
    of_people = estimate_preferences(as_comparisons(answers, method_of), 2)
    judged = pair_shares(by_judge(plan_of(600), 0.0), method_of)
    found, _ = corrected_preferences(judged, pair_shares(answers, method_of), 2, of_people)
    assert isinstance(found, Preferences) and found.reviewer_variance == of_people.reviewer_variance > 0.5
    assert found.pair(0, 1).error > of_people.pair(0, 1).error * 0.5
