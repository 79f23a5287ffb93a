"""Captions that ended at `max_new_tokens`, in mid-sentence: counts and warnings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SHARE = 0.02
"""Above it the metrics suffer noticeably, and a warning is given."""


def unfinished_captions(records: Sequence[dict], max_new_tokens: int) -> dict[str, Any] | None:
    """{"captions", "share", "max_new_tokens"} of records of clips; None if not all say whether their caption ended
    by itself (those of an older version do not)."""
    known = [record["unfinished"] for record in records if record.get("unfinished") is not None]
    if not known or len(known) < len(records):
        return None
    return {"captions": sum(known), "share": sum(known) / len(known), "max_new_tokens": max_new_tokens}


def unfinished_warning(found: dict[str, Any] | None) -> tuple[str, str] | None:
    """The warning in English and Korean, if the share is above SHARE. found: of :func:`unfinished_captions`."""
    if found is None or found["share"] <= SHARE:
        return None
    count, share, most = f"{found['captions']:,}", f"{found['share']:.1%}", found["max_new_tokens"]
    return (
        f"{count} captions ({share}) ended at --max-new-tokens {most}, in mid-sentence; evaluate again with a larger one. "
        "If the share stays, the model has not learned to stop: see data.max_cut_fraction",
        f"캡션 {count}개({share})가 --max-new-tokens {most}에서 문장 중간에 끊겼습니다. 값을 늘려 다시 평가하세요. "
        "비율이 줄지 않으면 모델이 종료 토큰을 학습하지 못한 것입니다(data.max_cut_fraction 참고)",
    )
