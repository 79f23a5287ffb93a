"""Statistics of a comparison on scores whose truth is known. All draws are seeded."""

import numpy as np
import pytest

from tests.manual.calibration import draw
from vlmds.demo.clips import caption, combinations
from vlmds.evaluation import statistics as module
from vlmds.evaluation.metrics import CHARACTERS, aggregate, resampled_means, score_captions
from vlmds.evaluation.statistics import (
    Spread,
    clips_needed,
    estimate,
    holm,
    influences_of,
    replicated_effect,
    sign_flips,
    spread,
)
from vlmds.evaluation.verdict import pair_tests, verdict

MEAN = "cider_d@char"  # a metric that is the mean of its clips' values


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    """For the simultaneous quantiles; they stay within 2%."""
    monkeypatch.setattr(module, "DRAWS", 2000)
    monkeypatch.setattr(module, "FLIPS", 2000)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_a_paired_difference_equals_the_t_test():
    x, y = np.random.RandomState(0).randn(2, 60, 1)
    found = estimate(MEAN, [x[None], y[None]], range(60)).pair(0, 1)
    d = (x - y)[:, 0]
    t, p = module.stats.ttest_1samp(d, 0.0)
    assert found.value == pytest.approx(d.mean()) and found.p == pytest.approx(p)
    assert found.value / found.error == pytest.approx(t) and found.df == pytest.approx(59)
    low, high = module.stats.t.interval(0.95, 59, d.mean(), d.std(ddof=1) / 60**0.5)
    assert (found.low, found.high) == pytest.approx((low, high))


@pytest.mark.parametrize(
    "case", [(100, 1, 0.0, 1, 0.0), (60, 10, 0.3, 1, 0.0), (300, 1, 0.0, 3, 2.0), (20, 1, 0.0, 1, 0.0)]
)
def test_of_eight_equal_methods_a_pair_differs_in_no_more_than_one_of_twenty_comparisons(case):
    """The family's error, at 5%: 10 of 200 expected at most; 17 is its 98th percentile."""
    random = np.random.default_rng(0)
    wrong = sum(min(p["p_holm"] for p in pair_tests(draw(random, case, [0.0] * 8))) < 0.05 for _ in range(200))
    assert wrong <= 17


def test_intervals_cover_where_clips_of_one_video_resemble_each_other():
    """95% of 300 are 285; taken as independent, the clips' intervals would cover far less."""
    random, covered, naive = np.random.default_rng(1), 0, 0
    for _ in range(300):
        of_source = np.repeat(np.arange(50), 10)
        scores = [100 + (5 * random.standard_normal(50))[of_source] + 5 * random.standard_normal(500) for _ in range(2)]
        groups = [s[None, :, None] for s in scores]
        pair, independent = (estimate(MEAN, groups, sources).pair(0, 1) for sources in (of_source, range(500)))
        covered += pair.low <= 0 <= pair.high
        naive += independent.low <= 0 <= independent.high
    assert 275 <= covered <= 296 and naive < 240


def test_one_seed_speaks_of_checkpoints_only():
    case = (2000, 1, 0.0, 1, 2.0)
    found = draw(np.random.default_rng(0), case, [0.0] * 8)
    assert found.seed_variance is None and verdict(found, pair_tests(found), range(8))["checkpoints_only"]
    several = draw(np.random.default_rng(0), (2000, 1, 0.0, 3, 2.0), [0.0] * 8)
    assert not verdict(several, pair_tests(several), range(8))["checkpoints_only"]
    assert several.seed_variance**0.5 == pytest.approx(2.0, abs=0.8)


def test_the_seeds_variance_does_not_count_the_clips_twice():
    """Seeds that differ by their clips' residuals alone have no variance of their own."""
    random = np.random.default_rng(0)
    values = [draw(random, (100, 1, 0.0, 3, 0.0), [0.0] * 8) for _ in range(40)]
    assert np.mean([v.between_seeds for v in values]) == pytest.approx(np.mean([v.residual for v in values]), rel=0.15)


@pytest.mark.parametrize("clips", [100, 500, 2000])
def test_a_cheap_method_that_is_five_percent_worse_is_not_chosen(clips):
    random = np.random.default_rng(clips)
    for _ in range(10):
        found = draw(random, (clips, 1, 0.0, 3, 0.5), [-5.0, *[0.0] * 3])
        assert verdict(found, pair_tests(found), range(4))["chosen"] != 0


def test_the_cheapest_of_equals_is_chosen_where_the_data_is_enough():
    found = draw(np.random.default_rng(0), (20_000, 1, 0.0, 3, 0.2), [0.0] * 4)
    said = verdict(found, pair_tests(found), [3, 1, 0, 2])
    assert said["chosen"] == 2 and said["within_margin"] == [0, 1, 2, 3] and said["needed"] is None


def test_too_little_data_names_nobody_and_says_what_would_do():
    few = draw(np.random.default_rng(0), (30, 1, 0.0, 3, 0.0), [0.0, 0.0, -90.0])
    said = verdict(few, pair_tests(few), range(3))
    assert said["few"] and said["chosen"] is None and 2 not in said["could_be_best"]
    found = draw(np.random.default_rng(1), (100, 1, 0.0, 3, 1.0), [0.0] * 4)
    said = verdict(found, pair_tests(found), range(4))
    assert said["chosen"] is None and said["needed"]["clips"] > 100 and said["needed"]["seeds"] >= 3


def test_the_best_is_always_among_those_that_could_be():
    random, kept = np.random.default_rng(3), 0
    for _ in range(100):
        found = draw(random, (100, 1, 0.0, 2, 1.0), [0.0, -1.0, -2.0, -20.0])
        possible = found.could_be_best()
        assert possible[found.values.argmax()] and not possible[3]
        kept += possible[0]
    assert kept >= 93


@pytest.mark.parametrize("metric", ["bleu4", "chrf++", "cider_d", "rouge_l"])
def test_influences_are_the_change_when_a_clip_is_left_out(metric):
    texts = [caption(attributes) for attributes in combinations()[0][:80]]
    captions = [text if i % 3 else texts[(i + 1) % 80] for i, text in enumerate(texts)]
    name = f"{metric}@char"
    statistics = score_captions(captions, [[text] for text in texts], [CHARACTERS])[name].statistics
    value, influences = influences_of(name, statistics)
    assert influences.sum() == pytest.approx(0, abs=1e-6 * abs(value) * 80)
    without = [aggregate(name, np.delete(statistics, i, 0).mean(axis=0)[None])[0] for i in range(80)]
    changes = value - np.array(without)  # a corpus's value is not linear in its clips, BLEU's least of all
    assert np.corrcoef(changes, influences)[0, 1] > 0.995
    assert np.allclose(changes, influences / 79, atol=0.2 * np.abs(influences / 79).max())


def test_sign_flips_by_hand():
    """Of 8 flips of (1, 2, 3) two are as far from 0."""
    assert sign_flips(np.array([1.0, 2.0, 3.0])) == 2 / 8
    assert sign_flips(np.array([1.0, -1.0])) == 1.0
    assert sign_flips(np.ones(40)) == pytest.approx(1 / 2001)


def test_an_adapter_is_judged_by_its_repetitions_over_the_projectors():
    found = replicated_effect([1.0, 1.2, 0.8, 1.1])
    _, p = module.stats.ttest_1samp([1.0, 1.2, 0.8, 1.1], 0.0)
    assert found.p == pytest.approx(p) and found.df == 3
    assert replicated_effect([0.0, 0.0]).p == 1.0


def test_clips_needed_are_enough_and_not_far_too_many():
    """At 80% power, by drawing: two methods that differ by 3, one seed."""
    needed = clips_needed(Spread(20.0, None), 3.0, seeds=1)
    assert needed == 349  # (20 · (1.960 + 0.842) / 3)²
    random = np.random.default_rng(0)
    found = sum(
        estimate(MEAN, [(3 + 20 * random.standard_normal((1, needed, 1))), np.zeros((1, needed, 1))], range(needed))
        .pair(0, 1)
        .p
        < 0.05
        for _ in range(300)
    )
    assert found / 300 == pytest.approx(0.8, abs=0.06)
    assert clips_needed(Spread(20.0, 5.0), 3.0, seeds=2) is None  # the seeds alone differ by more
    assert clips_needed(Spread(20.0, 1.0), 3.0, seeds=5) > needed


def test_the_spread_is_found_again():
    parts = spread(draw(np.random.default_rng(0), (4000, 1, 0.0, 5, 2.0), [0.0] * 8))
    assert parts.clip_sd == pytest.approx((2 * (20**2 + 15**2 / 5)) ** 0.5, rel=0.05)
    assert parts.seed_sd == pytest.approx(2.0, rel=0.3)


def test_sources_are_drawn_as_a_whole():
    values = np.repeat(np.random.RandomState(0).randn(50, 1), 20, axis=0)
    names = [str(i // 20) for i in range(1000)]
    (by_clip,), (by_source,) = resampled_means([values]), resampled_means([values], sources=names)
    assert by_source.std() == pytest.approx(values[::20].std() / 50**0.5, rel=0.1)
    assert by_source.std() > 3 * by_clip.std()


def test_planted_effects_are_found_in_their_order():
    """Eight systems with three seeds each, whose captions have wrong words in so many clips."""
    wrong, random = (0, 0, 0, 0.02, 0.05, 0.1, 0.2, 0.4), np.random.default_rng(0)
    training, _ = combinations()
    texts = [caption(training[i % len(training)]) for i in range(300)]
    sources, groups = [i // 3 for i in range(300)], []
    for share in wrong:
        seeds = []
        for _ in range(3):
            swapped = random.random(300) < max(0.0, share + 0.002 * random.standard_normal())
            captions = [texts[(i + 7) % 300] if swapped[i] else text for i, text in enumerate(texts)]
            seeds.append(score_captions(captions, [[text] for text in texts], [CHARACTERS])["rouge_l@char"].statistics)
        groups.append(np.stack(seeds))
    found = estimate("rouge_l@char", groups, sources)
    assert (np.diff(found.values[2:]) < 0).all()
    pairs = {(p["one"], p["other"]): p["p_holm"] for p in pair_tests(found)}
    assert all(pairs[pair] > 0.05 for pair in ((0, 1), (0, 2), (1, 2)))
    assert pairs[0, 5] < 0.05 and pairs[0, 6] < 0.05 and pairs[0, 7] < 0.05 and pairs[6, 7] < 0.05
    possible = found.could_be_best()
    assert possible[:3].all() and not possible[5:].any()
