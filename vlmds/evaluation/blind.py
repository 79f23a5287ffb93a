"""Blind tests: caption loss and metrics with the clip's own video, with another clip's video and with
black frames. A model that uses the video is worse without it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmds.evaluation.metrics import aggregate, interval, resampled_means, score_captions
from vlmds.evaluation.scoring import ClipText

BLIND = {"shuffled": ("other clips' videos", "다른 클립의 영상"), "blank": ("black frames", "검은 화면")}


def blind_tests(
    texts: Sequence[ClipText],
    records: Sequence[dict],
    captions: Sequence[str],
    borrowed: dict[int, list],
    partner: dict[int, str],
    blank: dict[str | None, str],
) -> dict[str, Any]:
    """The caption loss and the metrics with each video. gap: how much worse the blind model is, with
    its paired 95% bootstrap interval; an interval that contains 0 is within noise.

    Args:
        records: of the texts: "real" and "blank" are [sum, tokens] of log-probabilities.
        captions: of the clips' own videos.
        borrowed: {position: [sum, tokens]} with the other clip's video. partner: its caption.
        blank: {prompt: caption of black frames}.
    """
    found: dict[str, Any] = {"loss": {}, "metrics": {}, "warnings": []}
    for blind, others in (
        ("shuffled", [borrowed.get(t.position) for t in texts]),
        ("blank", [r["blank"] for r in records]),
    ):
        kept = [i for i, other in enumerate(others) if other]
        if blind == "shuffled":
            made = [partner.get(t.position, "") for t in texts]
        else:
            made = [blank[t.prompt] for t in texts]
        if len(kept) < 2:
            continue
        own = np.array([records[i]["real"] for i in kept], dtype=np.float64)
        other = np.array([others[i] for i in kept], dtype=np.float64)
        sources = [texts[i].source for i in kept]
        means = resampled_means([own, other], sources=sources)
        loss = [-float(x[:, 0].sum() / x[:, 1].sum()) for x in (own, other)]
        gaps = means[0][:, 0] / means[0][:, 1] - means[1][:, 0] / means[1][:, 1]
        found["loss"][blind] = _gap(loss[0], loss[1], loss[1] - loss[0], gaps)
        references = [texts[i].captions for i in kept]
        ours = score_captions([captions[i] for i in kept], references)
        theirs = score_captions([made[i] for i in kept], references)
        found["metrics"][blind] = {}
        for name in ours:
            pair = resampled_means([ours[name].statistics, theirs[name].statistics], sources=sources)
            gaps = aggregate(name, pair[0]) - aggregate(name, pair[1])
            values = ours[name].value, theirs[name].value
            found["metrics"][blind][name] = _gap(*values, values[0] - values[1], gaps)
    found["warnings"] = [doubt["en"] for doubt in doubts(found)]
    return found


def doubts(evidence: dict[str, Any]) -> list[dict[str, str]]:
    """Why the model may not use the video, in English ("en") and Korean ("ko").

    Args:
        evidence: of :func:`blind_tests`. The loss counts, and the first of its metrics.
    """
    found = []
    for blind, (english, korean) in BLIND.items():
        if blind not in evidence["loss"]:
            found.append(
                {"en": f"{english}: too few clips to decide", "ko": f"{korean}: 클립이 너무 적어 판단할 수 없습니다"}
            )
            continue
        metric, gap_of_metric = next(iter(evidence["metrics"][blind].items()))
        for name, subject, gap in (("loss", "손실", evidence["loss"][blind]), (metric, metric, gap_of_metric)):
            if gap["low"] <= 0:
                low, high = f"{gap['low']:.4g}", f"{gap['high']:.4g}"
                found.append(
                    {
                        "en": f"{name} with {english} is not significantly worse: gap "
                        f"{gap['gap']:.4g}, 95% interval {low} to {high}",
                        "ko": f"입력을 바꿔도({korean}) 유의하게 나빠지지 않는 값: {subject}, 차이 "
                        f"{gap['gap']:.4g}, 95% 신뢰 구간 {low} ~ {high}",
                    }
                )
    return found


def _gap(own: float, blind: float, gap: float, samples: np.ndarray) -> dict[str, float]:
    low, high = interval(samples)
    return {"own": own, "blind": blind, "gap": gap, "low": low, "high": high}
