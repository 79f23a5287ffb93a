"""Blind tests: caption loss and metrics with the clip's own video, with another clip's video and with
black frames; the loss also with the clip's own frames reversed, shuffled or reduced to one.

A model that uses the video is worse without it, and by how much is its effect size: the share of the
caption's log-likelihood, or of the score, that is lost. A model counts as using the video if that share is
reliably at least ``FLOOR`` with another clip's video and with black frames, and if the own video makes the
references of enough clips likelier (``CLIPS_FLOOR``), not only of a few by much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmds.evaluation.metrics import aggregate, interval, resampled_means, score_captions
from vlmds.evaluation.scoring import ClipText

BLIND = {"shuffled": ("other clips' videos", "다른 클립의 영상"), "blank": ("black frames", "검은 화면")}
ORDER = {
    "frames_reversed": ("frames reversed", "프레임 역순"),
    "frames_shuffled": ("frames shuffled", "프레임 순서 섞기"),
    "one_frame": ("middle frame only", "가운데 프레임만"),
}
VIDEOS = BLIND | ORDER
"""Each test of the loss, in English and Korean."""
FLOOR = 0.05
"""Share of the log-likelihood, and of the metric, that a model which uses the video loses at least without it."""
CLIPS_FLOOR = 0.1
"""Share of clips whose references are likelier with their own video, less the share where they are not."""


def blind_tests(
    texts: Sequence[ClipText],
    records: Sequence[dict],
    captions: Sequence[str],
    borrowed: dict[int, list],
    partner: dict[int, str],
    blank: dict[str | None, str],
) -> dict[str, Any]:
    """The caption loss and the metrics with each video, as {"loss": {video: test}, "metrics": {video: {metric: test}},
    "warnings"}.

    A test has "own" and "blind" (values), "gap" (how much worse the blind one is; "low", "high"), "share" (of the
    log-likelihood or score that is lost; "share_low", "share_high"; missing if there may be nothing to lose) and for
    the loss "clips" (see CLIPS_FLOOR; "clips_low", "clips_high"); all with paired 95% bootstrap intervals over the
    sources.

    Args:
        records: of the texts: "real", "blank" and those of ORDER are [sum, tokens] of log-probabilities; those of
            ORDER may be missing.
        captions: of the clips' own videos.
        borrowed: {position: [sum, tokens]} with the other clip's video. partner: its caption.
        blank: {prompt: caption of black frames}.
    """
    found: dict[str, Any] = {"loss": {}, "metrics": {}, "warnings": []}
    for video in VIDEOS:
        others = [borrowed.get(t.position) if video == "shuffled" else r.get(video) for t, r in zip(texts, records)]
        kept = [i for i, other in enumerate(others) if other]
        if len(kept) < 2:
            continue
        sources = [texts[i].source for i in kept]
        found["loss"][video] = _loss([records[i]["real"] for i in kept], [other for other in others if other], sources)
        if video in ORDER:  # no captions were made
            continue
        made = [partner.get(t.position, "") if video == "shuffled" else blank[t.prompt] for t in texts]
        references = [texts[i].captions for i in kept]
        ours = score_captions([captions[i] for i in kept], references)
        theirs = score_captions([made[i] for i in kept], references)
        found["metrics"][video] = {}
        for name in ours:
            pair = resampled_means([ours[name].statistics, theirs[name].statistics], sources=sources)
            own, blind = ours[name].value, theirs[name].value
            samples = [aggregate(name, means) for means in pair]
            found["metrics"][video][name] = _test(own, blind, own - blind, samples[0] - samples[1], own, samples[0])
    found["warnings"] = [doubt["en"] for doubt in doubts(found)]
    return found


def doubts(evidence: dict[str, Any]) -> list[dict[str, str]]:
    """Why the model may not use the video, in English ("en") and Korean ("ko"); none is the verdict that it does.

    Args:
        evidence: of :func:`blind_tests`, also of an older version, which had no shares. The loss counts, and the
            first of its metrics.
    """
    found = []

    def add(english: str, korean: str, shares: tuple[float, float, float], floor: float) -> None:
        value, low, high = (f"{100 * share:.1f}%" for share in shares)
        found.append(
            {
                "en": f"{english}: {value} (95% interval {low} to {high}; at least {floor:.0%} is required)",
                "ko": f"{korean}: {value} (95% 신뢰구간 {low} ~ {high}, 기준 {floor:.0%} 이상)",
            }
        )

    for video, (english, korean) in BLIND.items():
        if video not in evidence["loss"]:
            found.append(
                {"en": f"{english}: too few clips to decide", "ko": f"{korean}: 클립이 너무 적어 판단할 수 없습니다"}
            )
            continue
        loss = evidence["loss"][video]
        metric, of_metric = next(iter(evidence["metrics"][video].items()))
        for name, subject, test, whole in (("loss", "손실", loss, "blind"), (metric, metric, of_metric, "own")):
            shares = _shares(test, whole)
            if not shares[1] >= FLOOR:
                add(
                    f"{name} with {english} is not clearly worse",
                    f"입력을 바꿔도({korean}) 뚜렷이 나빠지지 않는 값 ({subject})",
                    shares,
                    FLOOR,
                )
        if loss.get("clips_low", 1) < CLIPS_FLOOR:
            shares = loss["clips"], loss["clips_low"], loss["clips_high"]
            add(
                f"clips with a smaller loss than with {english}, less those with a larger one",
                f"{korean}일 때보다 손실이 작은 클립의 비율에서 큰 클립의 비율을 뺀 값",
                shares,
                CLIPS_FLOOR,
            )
    return found


def _shares(test: dict[str, Any], whole: str) -> tuple[float, float, float]:
    """(share, low, high); of an older evaluation the interval of the gap, as a share of the whole."""
    if test.get("share") is not None:
        return test["share"], test["share_low"], test["share_high"]
    base = test[whole]
    return (test["gap"] / base, test["low"] / base, test["high"] / base) if base else (0.0, 0.0, 0.0)


def _loss(own: list[list], blind: list[list], sources: list[str]) -> dict[str, float]:
    """The test of the loss, from [sum, tokens] of log-probabilities of each clip."""
    ours, theirs = (np.array(pairs, dtype=np.float64) for pairs in (own, blind))
    # Rounded, for equal losses differ in their last digits.
    signs = np.sign(np.round(ours[:, 0] / ours[:, 1] - theirs[:, 0] / theirs[:, 1], 4))[:, None]
    means = resampled_means([ours, theirs, signs], sources=sources)
    real, other = (-float(pairs[:, 0].sum() / pairs[:, 1].sum()) for pairs in (ours, theirs))
    samples = [-mean[:, 0] / mean[:, 1] for mean in means[:2]]
    low, high = interval(means[2][:, 0])
    test = _test(real, other, other - real, samples[1] - samples[0], other, samples[1])
    return test | {"clips": float(signs.mean()), "clips_low": low, "clips_high": high}


def _test(own: float, blind: float, gap: float, gaps: np.ndarray, whole: float, wholes: np.ndarray) -> dict[str, float]:
    """whole: what the gap is a share of, the own score or the blind loss. gaps, wholes: bootstrap samples."""
    low, high = interval(gaps)
    test = {"own": own, "blind": blind, "gap": gap, "low": low, "high": high}
    if (wholes > 0).all():
        low, high = interval(gaps / wholes)
        test |= {"share": gap / whole, "share_low": low, "share_high": high}
    return test
