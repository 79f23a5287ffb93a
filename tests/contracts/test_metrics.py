"""sacrebleu and pycocoevalcap: what vlmds/evaluation/metrics.py uses of their internals."""

import inspect

import numpy as np
import pytest
from pycocoevalcap.cider.cider_scorer import CiderScorer
from pycocoevalcap.rouge.rouge import Rouge
from sacrebleu.metrics import BLEU, CHRF

MADE, WANTED = ["a b c d e", "z g"], [["a b c d f", "z g h"]]


def test_bleus_statistics_are_these_columns():
    """metrics._sacre and _bleu: caption length, reference length, correct 1…4, total 1…4 of each caption."""
    statistics = BLEU(tokenize="none", force=True)._extract_corpus_statistics(MADE, WANTED)
    assert np.array(statistics).tolist() == [[5, 5, 4, 3, 2, 1, 5, 4, 3, 2], [2, 3, 2, 1, 0, 0, 2, 1, 0, 0]]


def test_chrfs_statistics_are_these_columns():
    """metrics._chrf: for each order n-grams of caption, reference, both; characters 1…6, then words 1 and 2."""
    statistics = np.array(CHRF(word_order=2)._extract_corpus_statistics(MADE, WANTED))
    assert statistics.shape == (2, 3 * 8)
    assert statistics[0, :3].tolist() == [5, 5, 4] and statistics[0, -6:].tolist() == [5, 5, 4, 4, 4, 3]


@pytest.mark.parametrize("metric", [BLEU(tokenize="none", force=True, effective_order=True), CHRF(word_order=2)])
def test_statistics_of_one_caption_give_its_score(metric):
    """metrics._sacre: _compute_score_from_stats takes a row of _extract_corpus_statistics."""
    row = metric._extract_corpus_statistics(MADE, WANTED)[0]
    expected = metric.sentence_score(MADE[0], [WANTED[0][0]]).score
    assert metric._compute_score_from_stats(list(row)).score == pytest.approx(expected) and expected > 10


def test_cider_takes_pairs_and_its_document_frequencies_apart():
    """metrics._cider_d: sigma 6 and four orders make CIDEr-D; ten times the mean of the orders' cosines."""
    scorer = CiderScorer(n=4, sigma=6.0)
    for made, wanted in zip(MADE, WANTED[0], strict=True):
        scorer += (made, [wanted])
    scorer.compute_doc_freq()
    cosines = (4 / 5, 3 / 4, 2 / 3, 1 / 2)  # every n-gram is of one clip in two: all idf are log 2
    assert scorer.compute_cider()[0] == pytest.approx(10 * sum(cosines) / 4)


def test_rouge_scores_one_caption_by_its_words():
    """metrics._rouge_l."""
    assert list(inspect.signature(Rouge.calc_score).parameters) == ["self", "candidate", "refs"]
    assert Rouge().calc_score([MADE[0]], [WANTED[0][0]]) == pytest.approx(4 / 5)
