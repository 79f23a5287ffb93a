"""What each reviewer is shown: the next pair, its sides, the progress; and the answers, written before the next pair.

A pair is shown to one reviewer, the first ``overlap`` pairs of the plan to each. Which of the others is next is
decided when it is shown: those that someone else has answered, or was shown in the last ten minutes, are left out.
"""

from __future__ import annotations

import hashlib
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vlmds.errors import SampleError
from vlmds.evaluation.reviews import (
    Answer,
    Choice,
    Correction,
    Pair,
    SideMarks,
    answers_path,
    append_answer,
    append_undo,
    now,
    read_reviews,
)
from vlmds.review.folder import Opened

LEASE = 600.0
"""Seconds for which a pair that was shown is not given to another reviewer."""
RECENT = 20
"""Answers from which the time left is estimated."""


@dataclass
class _Reviewer:
    """answers: those that count, by pair, in order. skipped, asked: pairs that were put off, and whose reference was
    shown. seen: time of the last request."""

    answers: dict[str, Answer] = field(default_factory=dict)
    skipped: dict[str, None] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    order: list[Pair] = field(default_factory=list)
    seen: float = float("-inf")


class Sessions:
    """All reviewers of one folder. Threads may share it; another process may not serve the same folder, but its
    answers would not be lost."""

    def __init__(self, opened: Opened):
        self.folder, self.plan = opened.folder, opened.plan
        self.evaluations, self.clips = opened.evaluations, opened.clips
        self.pairs = {pair.pair: pair for pair in self.plan.pairs}
        self.shared = {pair.pair for pair in self.plan.pairs[: self.plan.overlap]}
        self._lock = threading.RLock()
        self._reviewers: dict[str, _Reviewer] = {}
        self._leases: dict[str, tuple[str, float]] = {}
        reviews = read_reviews(self.folder)
        self.warnings = [warning["en"] for warning in reviews.warnings]
        for answer in reviews.people:
            if answer.pair in self.pairs:
                self._reviewer(answer.reviewer).answers[answer.pair] = answer

    def next(self, name: str) -> dict[str, Any]:
        """What the page shows next: the pair, the one after it (to prefetch), and the progress."""
        with self._lock:
            first, second = self._coming(name)
            return {
                "pair": first and self.shown(name, first),
                "upcoming": second and self.shown(name, second),
                "progress": self.progress(name),
            }

    def shown(self, name: str, pair: Pair) -> dict[str, Any]:
        """A pair as the page gets it: captions by side, and nothing from which a run could be recognised. An answer
        that is there, of an undo or another tab, is "answer"."""
        reviewer = self._reviewer(name)
        captions = {side: self.evaluations.captions[run][pair.clip] for side, run in self.sides(name, pair).items()}
        found: dict[str, Any] = {"id": pair.pair, "captions": captions, "media": self._media(pair)}
        answer = reviewer.answers.get(pair.pair)
        if answer:
            found["answer"] = _draft(answer)
        if pair.pair in reviewer.asked:
            found["references"] = self.evaluations.clips[pair.clip].references
        return found

    def sides(self, name: str, pair: Pair) -> dict[str, str]:
        """{"left": id of a run, "right": id}: drawn for each reviewer and pair, the same whenever they are shown."""
        a, b = (pair.a, pair.b) if _drawn(self.plan.seed, name, pair.pair) % 2 else (pair.b, pair.a)
        return {"left": a, "right": b}

    def answer(
        self,
        name: str,
        pair: Pair,
        choice: Choice,
        marks: SideMarks,
        corrected: tuple[str, str] | None,
        seconds: float | None,
    ) -> bool:
        """Write the answer; it is on disk when this returns. Returns whether it replaces another one of this reviewer.

        Args:
            corrected: (text, side of the caption that was corrected).

        Raises:
            OSError: it could not be written, and does not count.
        """
        with self._lock:
            reviewer, sides = self._reviewer(name), self.sides(name, pair)
            answer = Answer(
                pair=pair.pair,
                clip=pair.clip,
                source=pair.source,
                left=sides["left"],
                right=sides["right"],
                choice=choice,
                marks=marks,
                corrected=Correction(text=corrected[0], run=sides[corrected[1]]) if corrected else None,
                reference=pair.pair in reviewer.asked,
                chosen=pair.chosen,
                seconds=seconds,
                time=now(),
                reviewer=name,
            )
            append_answer(answers_path(self.folder, name), answer)
            before = reviewer.answers.pop(pair.pair, None)
            reviewer.answers[pair.pair] = answer
            reviewer.skipped.pop(pair.pair, None)
            return before is not None and _draft(before) != _draft(answer)

    def undo(self, name: str) -> dict[str, Any] | None:
        """Take the reviewer's last answer back, on disk too. Returns its pair as the page shows it, with the answer;
        None if there is none. Raises OSError."""
        with self._lock:
            reviewer = self._reviewer(name)
            last = next(reversed(reviewer.answers), None)
            if last is None:
                return None
            shown = self.shown(name, self.pairs[last])
            append_undo(answers_path(self.folder, name), last, name)
            del reviewer.answers[last]
            self._lease(name, self.pairs[last])
            return shown

    def skip(self, name: str, pair: Pair) -> None:
        """Show the pair after all others. (A start of the server forgets it.)"""
        with self._lock:
            reviewer = self._reviewer(name)
            reviewer.skipped.pop(pair.pair, None)
            reviewer.skipped[pair.pair] = None

    def references(self, name: str, pair: Pair) -> list[str]:
        """The captions of the dataset; that they were asked for is recorded with the answer."""
        with self._lock:
            self._reviewer(name).asked.add(pair.pair)
            return self.evaluations.clips[pair.clip].references

    def progress(self, name: str) -> dict[str, Any]:
        """answered and left: pairs of this reviewer, where pairs that anyone may answer are divided among those who
        are here. seconds: the estimated time for them; None before the third answer."""
        with self._lock:
            reviewer, time_now = self._reviewer(name), time.monotonic()
            mine = sum(pair not in reviewer.answers for pair in self.shared)
            others = sum(not self._answered(pair.pair) for pair in self.plan.pairs if pair.pair not in self.shared)
            here = sum(other.seen > time_now - LEASE for other in self._reviewers.values())
            left = mine + -(-others // max(1, here))
            times = [answer.seconds for answer in reviewer.answers.values() if answer.seconds][-RECENT:]
            return {
                "answered": len(reviewer.answers),
                "left": left,
                "seconds": round(statistics.median(times) * left) if len(times) > 2 else None,
            }

    def _coming(self, name: str) -> tuple[Pair | None, Pair | None]:
        reviewer = self._reviewer(name)
        reviewer.seen = time.monotonic()
        coming = [pair for pair, _ in zip(self._open(name, reviewer), range(2))]
        for pair in coming:
            self._lease(name, pair)
        first, second = [*coming, None, None][:2]
        return first, second

    def _open(self, name: str, reviewer: _Reviewer) -> Iterator[Pair]:
        """The pairs that the reviewer may be shown, in order; those put off at the end."""
        for pair in reviewer.order:
            if pair.pair not in reviewer.skipped and self._is_open(name, reviewer, pair):
                yield pair
        for put_off in reviewer.skipped:
            if self._is_open(name, reviewer, self.pairs[put_off]):
                yield self.pairs[put_off]

    def _is_open(self, name: str, reviewer: _Reviewer, pair: Pair) -> bool:
        if pair.pair in reviewer.answers:
            return False
        if pair.pair in self.shared:
            return True
        holder, until = self._leases.get(pair.pair, (name, 0.0))
        return not self._answered(pair.pair) and (holder == name or until < time.monotonic())

    def _answered(self, pair: str) -> bool:
        return any(pair in reviewer.answers for reviewer in self._reviewers.values())

    def _lease(self, name: str, pair: Pair) -> None:
        self._leases[pair.pair] = name, time.monotonic() + LEASE

    def _reviewer(self, name: str) -> _Reviewer:
        """A new one has the pairs in an order of their own; those that everyone gets are in its first half, so that
        agreement can be measured early."""
        if name not in self._reviewers:

            def place(pair: Pair) -> float:
                drawn = _drawn(self.plan.seed, name, pair.pair, "order") / 2**64
                return drawn / 2 if pair.pair in self.shared else drawn

            self._reviewers[name] = _Reviewer(order=sorted(self.plan.pairs, key=place))
        return self._reviewers[name]

    def _media(self, pair: Pair) -> dict[str, Any]:
        try:
            media = self.clips.media(pair.clip)
        except SampleError as error:
            return {"kind": "unreadable", "why": str(error)}
        return {
            "kind": media.kind,
            "start": media.start,
            "end": media.end,
            "encode": media.encode,
            "count": media.count,
        }


def _draft(answer: Answer) -> dict[str, Any]:
    """An answer as the page gets it, without runs."""
    side = "left" if answer.corrected and answer.corrected.run == answer.left else "right"
    return {
        "choice": answer.choice,
        "marks": answer.marks.model_dump(mode="json"),
        "corrected": {"text": answer.corrected.text, "side": side} if answer.corrected else None,
    }


def _drawn(*parts: object) -> int:
    """64 bits that depend on the parts alone."""
    return int.from_bytes(hashlib.sha256("\n".join(map(str, parts)).encode()).digest()[:8], "big")
