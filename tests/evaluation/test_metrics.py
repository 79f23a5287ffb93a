"""Metrics against hand-computed values, and against independent code on Korean pairs."""

import math
import unicodedata
from collections import Counter

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from vlmds.demo.clips import caption, combinations
from vlmds.errors import InputError
from vlmds.evaluation import metrics
from vlmds.evaluation.metrics import CHARACTERS, characters, morphemes, score_captions


def pairs():
    """60 Korean captions with one to three references, some captions far off, one empty."""
    texts = [caption(a) for a in combinations()[0]][::2]
    made = [" ".join(t.split()[: 3 + i % 4]) if i % 3 else texts[(i * 7) % 60] for i, t in enumerate(texts)]
    made[5] = ""
    references = [[t, *texts[i + 1 : i + 1 + i % 3]] for i, t in enumerate(texts)]
    return made, references


def levels():
    kiwi = morphemes()
    assert kiwi is not None, "the extra `test` installs kiwipiepy"
    return [kiwi, CHARACTERS]


def cider_d(hypotheses, references):
    """CIDEr-D written from the paper's equations (with COCO's length in bigrams)."""
    grams = lambda t, n: Counter(tuple(t[i : i + n]) for i in range(len(t) - n + 1))  # noqa: E731
    df = Counter()
    for targets in references:
        df.update({g for t in targets for n in (1, 2, 3, 4) for g in grams(t, n)})

    def vector(tokens, n):
        return {g: c * (math.log(len(references)) - math.log(max(1, df[g]))) for g, c in grams(tokens, n).items()}

    values = []
    for h, targets in zip(hypotheses, references):
        total = 0.0
        for r in targets:
            penalty = math.exp(-((max(len(h) - 1, 0) - max(len(r) - 1, 0)) ** 2) / (2 * 6.0**2))
            for n in (1, 2, 3, 4):
                a, b = vector(h, n), vector(r, n)
                norm = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
                dot = sum(min(v, b.get(g, 0)) * b.get(g, 0) for g, v in a.items())
                total += penalty * (dot / norm if norm else 0) / 4
        values.append(1000 * total / len(targets))
    return np.array(values)


def rouge_l(h, targets, beta=1.2):
    def lcs(a, b):
        row = [0] * (len(b) + 1)
        for x in a:
            new = [0]
            for j, y in enumerate(b):
                new.append(row[j] + 1 if x == y else max(new[-1], row[j + 1]))
            row = new
        return row[-1]

    if not h:
        return 0.0
    p = max(lcs(h, r) / len(h) for r in targets)
    r = max(lcs(h, r) / len(r) for r in targets)
    return 100 * (1 + beta**2) * p * r / (r + beta**2 * p) if p and r else 0.0


@pytest.mark.parametrize("number", [0, 1])
def test_equal_to_independent_code_on_sixty_korean_pairs(number):
    level = levels()[number]
    made, references = pairs()
    scores = score_captions(made, references, [level])
    h = [level.split(c) for c in made]
    r = [[level.split(t) for t in ts] for ts in references]
    assert len(made) == 60 and len({len(ts) for ts in references}) == 3
    cider = scores[f"cider_d@{level.level}"]
    np.testing.assert_allclose(cider.per_clip, cider_d(h, r), atol=1e-6, rtol=0)
    rouge = scores[f"rouge_l@{level.level}"]
    np.testing.assert_allclose(rouge.per_clip, [rouge_l(a, b) for a, b in zip(h, r)], atol=1e-6)
    # sacrebleu's own corpus scores, of which ours are the vectorised form
    joined = [" ".join(t) for t in h]
    padded = [[" ".join(ts[i]) if i < len(ts) else None for ts in r] for i in range(3)]
    want = BLEU(tokenize="none", smooth_method="none", force=True).corpus_score(joined, padded).score
    assert scores[f"bleu4@{level.level}"].value == pytest.approx(want, abs=1e-6) and want > 1
    if number:
        joined, padded = made, [[ts[i] if i < len(ts) else None for ts in references] for i in range(3)]
    want = CHRF(word_order=2).corpus_score(joined, padded).score
    assert scores[f"chrf++@{level.level}"].value == pytest.approx(want, abs=1e-6) and want > 1


def test_values_by_hand():
    # 4 tokens of 5 right at the front: precisions 4/5, 3/4, 2/3, 1/2
    scores = score_captions(["가나다라마", "하"], [["가나다라바"], ["하"]], [CHARACTERS])
    bleu = score_captions(["가나다라마"], [["가나다라바"]], [CHARACTERS])["bleu4@char"]
    assert bleu.value == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, abs=1e-9)
    assert scores["rouge_l@char"].per_clip == pytest.approx([80, 100])
    # Every n-gram is in one document of two, so all idf are log 2 and cancel.
    assert scores["cider_d@char"].per_clip[0] == pytest.approx(1000 * (4 / 5 + 3 / 4 + 2 / 3 + 1 / 2) / 4)


def test_a_perfect_caption_scores_full_and_another_script_is_kept():
    texts = ["강아지가 뜁니다 😀.", "漢字 ñandú가 보입니다!", "ㅋㅋㅋ 웃는 아이가 달려갑니다"]
    for level in levels():
        scores = score_captions(texts, [[t] for t in texts], [level])
        assert scores[f"cider_d@{level.level}"].value == pytest.approx(1000)
        assert scores[f"bleu4@{level.level}"].value == pytest.approx(100)
        assert scores[f"chrf++@{level.level}"].value == pytest.approx(100)
    assert characters("강아지 😀 漢字ñ") == list("강아지😀漢字ñ")
    for sign in "😀漢字":
        assert any(sign in t for text in texts for t in levels()[0].split(text))


def test_separate_hangul_letters_are_the_same_text():
    texts = ["강아지가 공원에서 뜁니다", "아이가 노래합니다"]
    apart = [unicodedata.normalize("NFD", t) for t in texts]
    assert apart != texts
    for level in levels():
        same = score_captions(apart, [[t] for t in texts], [level])
        assert same[f"bleu4@{level.level}"].value == pytest.approx(100)


def test_morphemes_forgive_what_whitespace_words_do_not():
    """Another particle on the same noun: no word is shared, most morphemes are."""
    assert levels()[0].split("강아지가") == ["강아지", "가"]
    score = score_captions(["강아지는"], [["강아지가"]], [levels()[0]])["rouge_l@morpheme"]
    assert score.value == pytest.approx(50)


def test_intervals_contain_the_value_and_shrink_with_more_clips():
    made, references = pairs()
    small = metrics.summarise(score_captions(made[:15], references[:15], [CHARACTERS]))
    large = metrics.summarise(score_captions(made * 4, references * 4, [CHARACTERS]))
    for name in small:
        assert large[name]["low"] <= large[name]["value"] <= large[name]["high"]
        assert large[name]["tokenisation"] == CHARACTERS.name
        assert large[name]["high"] - large[name]["low"] < small[name]["high"] - small[name]["low"]


def test_resampling_is_paired_and_deterministic():
    values = np.random.RandomState(0).rand(40, 1)
    a, b = metrics.resampled_means([values, values + 1], 250)
    assert np.allclose(b - a, 1) and a.std() > 0.01
    again = metrics.resampled_means([values], 250)[0]
    np.testing.assert_allclose(a, again, rtol=1e-12)


def test_facts_about_captions():
    facts = metrics.describe_captions(["가나다라가나다라", "", "마", "마"], CHARACTERS)
    assert facts["empty"] == 0.25 and facts["most_frequent"] == 0.5 and facts["different"] == 0.75
    assert facts["distinct_1"] == 5 / 10
    assert facts["repetition"] == pytest.approx(1 / 5)  # 5 four-grams, the last was there before
    assert facts["mean_characters"] == 2.5


def test_all_empty_captions_score_zero_without_a_warning():
    with np.errstate(all="raise"):
        summary = metrics.summarise(score_captions(["", ""], [["가나"], ["다"]], [CHARACTERS]))
    assert {v["value"] for v in summary.values()} == {0.0}


@pytest.mark.parametrize(("made", "references"), [([], []), (["가"], [[]]), (["가"], [])])
def test_nothing_to_score_is_bad_input(made, references):
    with pytest.raises(InputError):
        score_captions(made, references, [CHARACTERS])
