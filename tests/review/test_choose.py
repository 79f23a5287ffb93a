"""Which pairs are chosen: equal chances, balance, and the highest values."""

from collections import Counter

import numpy as np
import pytest

from vlmds.errors import InputError
from vlmds.evaluation.reviews import ReviewedRun
from vlmds.review.choose import Choice, choose_pairs, distances, read_shares
from vlmds.review.evaluations import Evaluations, ReviewedClip, blind_score

RUNS = ("A", "B", "C", "D")


def make(clips: int = 60, sources: int = 20, blind=None, captions=None) -> Evaluations:
    keys = [f"c{i:03d}" for i in range(clips)]
    return Evaluations(
        [ReviewedRun(id=run, name=run, evaluation=run, sha256=run) for run in RUNS],
        dict.fromkeys(RUNS, {}),
        {key: ReviewedClip(f"v{i % sources}", ["정답"]) for i, key in enumerate(keys)},
        {run: captions(run) if captions else {key: f"{key} 캡션 {run}" for key in keys} for run in RUNS},
        {run: blind(run) if blind else {} for run in RUNS},
    )


def test_every_clip_is_equally_likely_in_strata_of_any_size():
    evaluations = make(40)
    strata = {clip: "rare" if i < 5 else "often" for i, clip in enumerate(evaluations.clips)}
    drawn = Counter()
    for seed in range(2000):
        pairs, _ = choose_pairs(evaluations, Choice(10, {"random": 1.0}, seed=seed), strata)
        assert len({pair.clip for pair in pairs}) == 10
        assert sum(strata[pair.clip] == "rare" for pair in pairs) in (1, 2)  # 10 of 40: 1.25 of 5
        drawn.update(pair.clip for pair in pairs)
    # 2,000 draws of probability 1/4 each: a standard deviation of 19.4; 40 clips.
    assert all(abs(count - 500) < 5 * 19.4 for count in drawn.values()) and len(drawn) == 40


def test_any_two_runs_meet_equally_often_and_sources_are_spread():
    pairs, _ = choose_pairs(make(60, 20), Choice(30, {"random": 1.0}))
    assert {*Counter((p.a, p.b) for p in pairs).values()} == {5}
    assert {*Counter(p.source for p in pairs).values()} <= {1, 2}


def test_no_pair_twice_and_all_pairs_if_more_are_asked_for():
    pairs, notes = choose_pairs(make(7), Choice(1000, {"random": 1.0}))
    assert len({p.pair for p in pairs}) == len(pairs) == 7 * 6 and "only 42 pairs" in notes[0]
    pairs, _ = choose_pairs(make(7), Choice(20))
    assert len({(p.clip, p.a, p.b) for p in pairs}) == len(pairs) == 20
    assert max(Counter(p.clip for p in pairs).values()) <= 4


def test_random_pairs_do_not_depend_on_the_other_shares():
    evaluations = make(blind=lambda run: {f"c{i:03d}": 0.1 * i for i in range(60)})

    def drawn(shares):
        return [p for p in choose_pairs(evaluations, Choice(20, shares, seed=3))[0] if p.chosen == "random"]

    alone = {p.pair for p in drawn({"random": 0.5, "disagreement": 0.5})}
    other = {p.pair for p in drawn({"random": 0.5, "blind": 0.2, "disagreement": 0.3})}
    assert alone == other and len(alone) == 10


def test_the_largest_disagreement_is_chosen_one_of_each_clip_and_source():
    words = {"A": "가나다라마바사", "B": "가나다라마바사", "C": "가나다라마바사", "D": "가나다라마바사"}

    def captions(run):
        found = {f"c{i:03d}": words[run] for i in range(20)}
        if run == "C":
            found |= {"c003": "가나다라마바아", "c007": "타파하", "c011": "가나다라"}
        return found

    evaluations = make(20, 20, captions=captions)
    pairs, _ = choose_pairs(evaluations, Choice(3, {"disagreement": 1.0}))
    assert [p.clip for p in pairs] == ["c007", "c011", "c003"] and all("C" in (p.a, p.b) for p in pairs)
    assert all(p.chosen == "disagreement" for p in pairs)
    value = {(a, b): distance for distance, (_, a, b) in distances(evaluations, "c007", RUNS)}
    assert value["A", "C"] == 1 and value["A", "B"] == 0


def test_strata_take_turns_for_chosen_pairs():
    evaluations = make(20, 20, captions=lambda run: {f"c{i:03d}": "가" * (i + 1) + run for i in range(20)})
    strata = {clip: "x" if i < 15 else "y" for i, clip in enumerate(evaluations.clips)}
    pairs, _ = choose_pairs(evaluations, Choice(6, {"disagreement": 1.0}), strata)
    assert Counter(strata[p.clip] for p in pairs) == {"x": 3, "y": 3}


def test_high_blind_scores_are_chosen():
    def blind(run):
        return {f"c{i:03d}": (5.0 if (run, i) in {("B", 4), ("D", 9)} else -1.0) for i in range(20)}

    pairs, _ = choose_pairs(make(20, 20, blind=blind), Choice(2, {"blind": 1.0}))
    assert {(p.clip, "B" in (p.a, p.b), "D" in (p.a, p.b)) for p in pairs} >= {("c004", True, pairs[0].b == "D")}
    assert (
        [p.clip for p in pairs] == ["c004", "c009"]
        and "B" in (pairs[0].a, pairs[0].b)
        and "D" in (pairs[1].a, pairs[1].b)
    )
    pairs, notes = choose_pairs(make(20), Choice(10, {"blind": 0.5, "random": 0.5}))
    assert {p.chosen for p in pairs} == {"random"} and "no evaluation has a blind test" in notes[0]


def test_blind_scores():
    assert blind_score({"reference_log_probability": {"real": -1.0, "shuffled": -1.5, "blank": -3.0}}) == -0.5
    assert blind_score({"reference_log_probability": {"real": -1.0, "shuffled": None, "blank": -3.0}}) == -2.0
    assert blind_score({}) is None is blind_score({"reference_log_probability": None})


def test_shares():
    assert read_shares("random=70%,disagreement=0.2,blind=10%") == pytest.approx(
        {"random": 0.7, "disagreement": 0.2, "blind": 0.1}
    )
    assert read_shares("random,disagreement") == {"random": 0.5, "disagreement": 0.5}
    for text in ("", "best", "random=x", "random=50%", "random=150%", "random=-1", "random=0"):
        with pytest.raises(InputError, match="--choose"):
            read_shares(text)


def test_an_estimate_from_random_pairs_is_unbiased_and_one_from_all_is_not():
    """A is preferred on 30% of the clips, on which the captions differ most."""
    keys = [f"c{i:03d}" for i in range(60)]
    wins = {key: i % 10 < 3 for i, key in enumerate(keys)}

    def captions(run):
        return {key: "전혀 다른 말" if wins[key] and run == "A" else f"같은 캡션입니다 {key}" for key in keys}

    evaluations = make(60, 60, captions=captions)
    evaluations.runs = evaluations.runs[:2]
    shares = {"random": 0.5, "disagreement": 0.5}
    drawn = [choose_pairs(evaluations, Choice(20, shares, seed=seed))[0] for seed in range(300)]
    fair = np.mean([[wins[p.clip] for p in pairs if p.chosen == "random"] for pairs in drawn])
    every = np.mean([[wins[p.clip] for p in pairs] for pairs in drawn])
    assert abs(fair - 0.3) < 0.03 and every > 0.5
