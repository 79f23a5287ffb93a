"""Estimates of preferences from simulated reviewers: strengths, coverage of intervals, the reviewers' variance, the
verdict."""

import numpy as np
import pytest

from tests.evaluation.opinions import simulated
from vlmds.evaluation.bradley_terry import fit, lead_of, method_pairs, probabilities, win_probability, win_slope
from vlmds.evaluation.people_verdict import people_line, people_sentences, people_verdict
from vlmds.evaluation.preferences import Comparisons, connected, counts_by, estimate_preferences


def test_strengths_and_tie_are_recovered_from_expected_counts():
    strengths, tie = np.array([0.6, 0.1, -0.2, -0.5]), -0.4
    pairs = method_pairs(4)
    counts = 1e6 * np.stack(probabilities(strengths[pairs[:, 0]] - strengths[pairs[:, 1]], tie), axis=1)
    found = fit(counts, 4)
    assert found.strengths == pytest.approx(strengths, abs=1e-4) and found.tie == pytest.approx(tie, abs=1e-4)


def test_many_counts_are_fitted_as_each_alone():
    counts = np.random.default_rng(0).poisson(5, (7, 3, 3)).astype(float)
    together = fit(counts, 3)
    for number, own in enumerate(counts):
        alone = fit(own, 3)
        assert together.strengths[number] == pytest.approx(alone.strengths, abs=1e-6)
        assert together.tie[number] == pytest.approx(alone.tie, abs=1e-6)


def test_a_method_that_always_wins_has_a_finite_strength():
    found = fit(np.array([[30.0, 0, 0]]), 2)
    assert 1 < found.strengths[0] < 10 and np.isfinite(found.tie)


def test_the_win_probability_and_its_inverse():
    assert win_probability(0.0, 0.7) == pytest.approx(0.5)
    for share in (0.3, 0.45, 0.55, 0.9):
        assert win_probability(lead_of(share, 0.3), 0.3) == pytest.approx(share)
    step = 1e-5
    slope = (win_probability(0.4 + step, -0.2) - win_probability(0.4 - step, -0.2)) / (2 * step)
    assert win_slope(0.4, -0.2) == pytest.approx(float(slope), rel=1e-4)


def test_the_order_is_recovered_and_intervals_cover():
    """Videos that differ, so that answers about one video are not independent."""
    strengths = [0.5, 0.0, -0.5]
    many = simulated(np.random.default_rng(9), strengths, each=200_000, sources=100_000)
    truth = fit(counts_by(many, np.zeros(len(many), dtype=int), 1, 3)[0], 3).strengths
    covered, order = 0, 0
    for seed in range(60):
        comparisons = simulated(np.random.default_rng(seed), strengths, each=240, sources=80)
        found = estimate_preferences(comparisons, 3)
        gap = found.pair(0, 2)
        covered += gap.low <= truth[0] - truth[2] <= gap.high
        order += bool((np.diff(found.values) < 0).all())
    assert 52 <= covered <= 60  # 57 expected
    assert order >= 50


def test_answers_that_repeat_a_video_count_as_one():
    """The same answer of ten clips of each video: the error is that of the videos."""
    once = simulated(np.random.default_rng(3), [0.4, -0.4], each=120, sources=60)
    tenfold = Comparisons(*(np.repeat(getattr(once, name), 10) for name in once.__dataclass_fields__))
    one, ten = (estimate_preferences(c, 2).pair(0, 1).error for c in (once, tenfold))
    assert ten == pytest.approx(one, rel=0.15)


def test_reviewers_that_differ_widen_the_intervals():
    covered, narrow = 0, 0
    for seed in range(25):
        found = estimate_preferences(
            simulated(np.random.default_rng(seed), [0.3, 0.1, -0.1, -0.3], reviewers=3, of_reviewers=0.6), 4
        )
        clips = np.sqrt(found.by_sources[0, 0] + found.by_sources[3, 3] - 2 * found.by_sources[0, 3])
        gap = found.pair(0, 3)
        covered += gap.low <= 0.6 <= gap.high
        narrow += abs(gap.value - 0.6) < 1.96 * clips
        assert found.reviewer_df == 6
    assert covered >= 21 and narrow <= 19


def test_reviewers_that_agree_and_one_reviewer():
    alike = [
        estimate_preferences(simulated(np.random.default_rng(seed), [0.2, 0.0, -0.2], reviewers=3), 3).reviewer_variance
        for seed in range(10)
    ]
    assert np.median(alike) < 0.05
    one = estimate_preferences(simulated(np.random.default_rng(0), [0.2, -0.2]), 2)
    assert one.reviewers == 1 and one.reviewer_df == 0 and one.reviewer_variance == 0


def test_methods_that_nothing_links_are_not_compared():
    comparisons = simulated(np.random.default_rng(0), [0.2, 0, -0.2], each=60)
    assert connected(comparisons, 5).tolist() == [0, 1, 2]
    assert connected(comparisons.of(comparisons.second == 1), 3).tolist() == [0, 1]


def verdict_of(strengths, costs, each, sources=200, seed=0, **options):
    comparisons = simulated(np.random.default_rng(seed), strengths, each=each, sources=sources, of_sources=0.2)
    names = [f"e{i}" for i in range(len(strengths))]
    return people_verdict(estimate_preferences(comparisons, len(strengths)), names, costs, **options)


def test_the_cheapest_within_the_margin_is_taken():
    found = verdict_of([0.02, 0.0, -1.0], [3, 2, 1], each=12_000)
    assert found["chosen"] == "e1" and found["needed"] is None and "e2" not in found["within_margin"]
    english, korean = people_sentences(found)[0]
    assert "take e1" in english and "45%" in english and "권장: e1" in korean
    assert "one reviewer" in people_line(found)


def test_the_best_is_taken_where_the_cheaper_one_is_worse():
    found = verdict_of([1.0, 0.0], [2, 1], each=1000)
    assert found["chosen"] == found["best"] == "e0" and found["runner_up"]["win"]["low"] > 0.5
    assert "take e0" in people_line(found)


def test_few_answers_do_not_decide_and_say_how_many_would():
    found = verdict_of([0.0, 0.0], [2, 1], each=60, seed=2)
    assert found["chosen"] is None and found["needed"]["pairs"] > 100
    assert f"{found['needed']['pairs']:,} answers" in people_line(found)
    enough = verdict_of([0.0, 0.0], [2, 1], each=found["needed"]["pairs"], sources=2000)
    assert enough["chosen"] is not None


def test_few_videos_name_no_winner():
    found = verdict_of([1.0, -1.0], [2, 1], each=400, sources=30)
    assert found["few"] and found["chosen"] is None and "no winner is named: 30 videos" in people_line(found)


def test_reviewers_that_contradict_each_other_need_more_reviewers():
    comparisons = simulated(
        np.random.default_rng(0), [0.0, 0.0], reviewers=3, each=2000, sources=1000, of_reviewers=1.0
    )
    found = people_verdict(estimate_preferences(comparisons, 2), ["a", "b"], [1, 2])
    assert found["chosen"] is None and found["more_reviewers"] and "More reviewers are needed" in people_line(found)
