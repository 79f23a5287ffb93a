"""Agreement of reviewers and shares of marks."""

import numpy as np
import pytest

from vlmds.evaluation.agreement import krippendorff_alpha, preference_alpha, share_interval

# Krippendorff, "Computing Krippendorff's alpha-reliability" (2011), example C: four observers, twelve units.
OBSERVERS = "1 2 3 3 2 1 4 1 2 . . . / 1 2 3 3 2 2 4 1 2 5 . 3 / . 3 3 3 2 3 4 2 2 5 1 . / 1 2 3 3 2 4 4 1 2 5 1 ."


def test_alpha_is_the_published_one():
    rows = [[-1 if v == "." else int(v) - 1 for v in row.split()] for row in OBSERVERS.split("/")]
    found = krippendorff_alpha(np.array(rows).T, 5)
    assert found["value"] == pytest.approx(0.743, abs=5e-4) and found["units"] == 11
    assert found["low"] < found["value"] < found["high"] <= 1


def test_alpha_of_chance_of_agreement_and_of_nothing():
    random = np.random.default_rng(0)
    chance = preference_alpha(random.integers(0, 3, (400, 2)), np.arange(400))
    assert abs(chance["value"]) < 0.15 and chance["low"] < 0 < chance["high"] and chance["units"] == 400
    same = np.repeat(random.integers(0, 3, (50, 1)), 3, axis=1)
    assert preference_alpha(same, np.arange(50))["value"] == 1
    assert preference_alpha(np.array([[0, -1], [-1, 2]]), np.arange(2)) is None
    assert krippendorff_alpha(np.zeros((5, 2), dtype=int), 2) is None


def test_alpha_of_preferences_does_not_depend_on_which_is_first():
    random = np.random.default_rng(1)
    one = random.integers(0, 3, (60, 1))
    values = np.concatenate([one, np.where(random.random((60, 1)) < 0.7, one, 1)], axis=1)
    turned = np.where(random.random((60, 1)) < 0.5, 2 - values, values)
    assert preference_alpha(turned, np.arange(60))["value"] == pytest.approx(
        preference_alpha(values, np.arange(60))["value"]
    )


def test_shares_cover_and_count_videos():
    random, covered = np.random.default_rng(0), 0
    for _ in range(200):
        rates = random.beta(1, 9, 60)  # a video whose captions are often wrong
        covered += (found := share_interval(random.binomial(5, rates), np.full(60, 5.0)))["low"] <= 0.1 <= found["high"]
    assert covered >= 180
    none = share_interval(np.zeros(20), np.full(20, 50.0))
    assert none["low"] == 0 and none["high"] > 0.1  # 20 videos, not 1000 answers
    every = share_interval(np.ones(1), np.ones(1))
    assert every["high"] == 1 and every["low"] < 0.1
