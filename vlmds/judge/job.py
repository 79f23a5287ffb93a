"""`vlmds judge`: questions, their cost, and answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from vlmds.console.progress import phase
from vlmds.console.text import counted
from vlmds.errors import InputError, SampleError
from vlmds.evaluation.reviews import Answer, Pair, Plan, append_answer, now, read_answers
from vlmds.judge.endpoint import Endpoint, Failed, is_local, shown_url
from vlmds.judge.rubric import FRAME_SIDE, Language, Question, Verdict, messages, read_verdict
from vlmds.judge.store import Counts, JudgeFiles
from vlmds.review.evaluations import Evaluations

if TYPE_CHECKING:  # imports PyTorch
    from vlmds.judge.frames import ClipFrames

ORDERS = (1, 2)
FREE_REQUESTS = 2000
"""Requests to a server elsewhere that start without --yes, where no price is given."""
FREE_COST = 5.0
"""Cost at the given prices that starts without --yes."""
OUT_TOKENS = 150  # of an answer, as assumed for the cost
FRAME_TOKENS = round(FRAME_SIDE**2 / 750)  # likewise of a frame
MALFORMED_TRIES = 2
FEWEST_TRIED, MOST_LOST = 20, 0.5
"""A judge that gave no answer to half of 20 or more questions is stopped."""


@dataclass(frozen=True)
class Prices:
    """Of a million tokens, in any currency; None: not known."""

    tokens_in: float | None = None
    tokens_out: float | None = None

    @property
    def known(self) -> bool:
        return self.tokens_in is not None or self.tokens_out is not None

    def of(self, tokens_in: float, tokens_out: float) -> float:
        return ((self.tokens_in or 0.0) * tokens_in + (self.tokens_out or 0.0) * tokens_out) / 1e6


@dataclass(frozen=True)
class Task:
    """A pair in one order."""

    pair: Pair
    order: int

    @property
    def sides(self) -> tuple[str, str]:
        """The runs left (shown first) and right."""
        return (self.pair.a, self.pair.b) if self.order == 1 else (self.pair.b, self.pair.a)


class JudgeJob:
    """Asking one judge about pairs.

    Args:
        frames: None for text only.
    """

    def __init__(
        self,
        files: JudgeFiles,
        endpoint: Endpoint,
        evaluations: Evaluations,
        plan: Plan,
        pairs: Sequence[Pair],
        frames: ClipFrames | None = None,
    ):
        self.files, self.endpoint, self.evaluations, self.frames = files, endpoint, evaluations, frames
        self.counts = Counts()
        self._lock = threading.Lock()
        files.check()
        files.read_replies()
        done = {(answer.pair, answer.order) for answer in read_answers(files.answers, plan)[0]}
        self.pairs = len(pairs)
        self.tasks = [Task(pair, order) for pair in pairs for order in ORDERS if (pair.pair, order) not in done]
        self.done = len(pairs) * len(ORDERS) - len(self.tasks)

    def question(self, task: Task) -> Question:
        """Raises SampleError if the clip's frames cannot be read."""
        first, second = (self.evaluations.captions[run][task.pair.clip] for run in task.sides)
        frames = self.frames.of(task.pair.clip) if self.frames else []
        return Question(first, second, self.evaluations.clips[task.pair.clip].references, frames)

    def expected_tokens(self) -> tuple[int, int]:
        """Estimated tokens in and out of all tasks, as if none were in the cache."""
        text = 0.0
        for task in self.tasks:
            first, second = (self.evaluations.captions[run][task.pair.clip] for run in task.sides)
            asked = messages(Question(first, second, self.evaluations.clips[task.pair.clip].references), self.language)
            text += sum(_tokens(str(message["content"])) for message in asked)
        images = FRAME_TOKENS * self.files.settings.frames * len(self.tasks)
        return round(text + images), OUT_TOKENS * len(self.tasks)

    @property
    def language(self) -> Language:
        return self.files.settings.language

    def cost_line(self, prices: Prices) -> str:
        """What it will take, before it starts."""
        tokens_in, tokens_out = self.expected_tokens()
        parts = [f"{counted(len(self.tasks), 'request')} ({counted(self.pairs, 'pair')} in both orders"]
        parts[0] += f", {self.done:,} answered before)" if self.done else ")"
        parts.append(f"about {tokens_in:,} tokens in and {tokens_out:,} out")
        if prices.known:
            parts.append(f"about {prices.of(tokens_in, tokens_out):,.2f} at the given prices")
        return f"judge {self.files.name} at {shown_url(self.endpoint.url)}: {', '.join(parts)}; cached answers cost nothing"

    def check_cost(self, prices: Prices, agreed: bool) -> None:
        """Raise InputError if this is more than a command should start unasked."""
        if agreed:
            return
        cost = prices.of(*self.expected_tokens())
        if prices.known and cost > FREE_COST:
            raise InputError(f"--yes: about {cost:,.2f} at the given prices; repeat the command with --yes to start")
        if not prices.known and not is_local(self.endpoint.url) and len(self.tasks) > FREE_REQUESTS:
            raise InputError(
                f"--yes: {len(self.tasks):,} requests to {shown_url(self.endpoint.url)}, which may cost money; repeat the "
                "command with --yes to start (--price-in and --price-out show the cost)"
            )

    def run(self, parallel: int) -> None:
        """Ask about all tasks. Each answer is on disk before the next of its thread is asked.

        Raises:
            InputError: the server refuses every request, or most answers are none; what was answered is kept.
        """
        waiting: set[Future[None]] = set()
        pool = ThreadPoolExecutor(parallel)
        try:
            with (
                self.files.appending() as self._cache,
                phase("judging", len(self.tasks), "requests", left=True) as shown,
            ):
                for task in self.tasks:
                    waiting.add(pool.submit(self._one, task))
                    if len(waiting) >= 2 * parallel:
                        waiting = self._finished(waiting, shown)
                while waiting:
                    waiting = self._finished(waiting, shown)
        except BaseException:
            self.endpoint.stopping.set()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            self.files.write_record(shown_url(self.endpoint.url), self.counts)

    def _finished(self, waiting: set[Future[None]], shown) -> set[Future[None]]:
        done, rest = wait(waiting, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
            shown.advance()
        lost, tried = self.counts.lost, self.counts.lost + self.counts.answered
        if tried >= FEWEST_TRIED and lost > MOST_LOST * tried:
            raise InputError(
                f"--model {self.files.settings.model}: {lost} of {tried} requests gave no answer ({self.lost_text()}); the "
                "others are kept; try another model or server"
            )
        return rest

    def lost_text(self) -> str:
        """What was lost, by kind."""
        c = self.counts
        kinds = ((c.refused, "refused"), (c.malformed, "malformed"), (c.failed, "failed"))
        return ", ".join(f"{number:,} {kind}" for number, kind in kinds if number) or "none"

    def _one(self, task: Task) -> None:
        start = time.monotonic()
        try:
            question = self.question(task)
        except SampleError:
            self._count(failed=1)
            return
        key = self.files.key(question)
        verdict = self.files.replies.get(key)
        if verdict is None:
            verdict = self._asked(question)
            if verdict is None:
                return
            with self._lock:
                self.files.replies[key] = verdict
                self._cache.add([{"key": key, "verdict": verdict.model_dump(mode="json")}])
        else:
            self._count(cached=1)
        left, right = task.sides
        pair = task.pair
        answer = Answer(
            pair=pair.pair,
            clip=pair.clip,
            source=pair.source,
            left=left,
            right=right,
            choice=verdict.side,
            marks=verdict.marks,
            reference=True,
            chosen=pair.chosen,
            seconds=round(time.monotonic() - start, 3),
            time=now(),
            reviewer=self.files.reviewer,
            order=1 if task.order == 1 else 2,
        )
        with self._lock:
            append_answer(self.files.answers, answer)

    def _asked(self, question: Question) -> Verdict | None:
        """The judge's answer; None if it gave none, which is counted."""
        asked = messages(question, self.language)
        for _ in range(MALFORMED_TRIES):
            self._count(asked=1)
            try:
                reply = self.endpoint.ask(asked)
            except Failed:
                self._count(failed=1)
                return None
            self._count(tokens_in=reply.tokens_in, tokens_out=reply.tokens_out)
            if reply.text is None:
                self._count(refused=1)
                return None
            if verdict := read_verdict(reply.text):
                self._count(answered=1)
                return verdict
        self._count(malformed=1)
        return None

    def _count(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                setattr(self.counts, name, getattr(self.counts, name) + amount)

    def result_lines(self, prices: Prices) -> Iterator[str]:
        """What became of the requests, for the user."""
        c = self.counts
        yield (
            f"answers: {c.answered + c.cached:,} new ({c.cached:,} cached), {self.done:,} before, {c.lost:,} without an answer"
            + (f" ({self.lost_text()}); the same command asks again" if c.lost else "")
        )
        if c.tokens_in or c.tokens_out:
            cost = f", {prices.of(c.tokens_in, c.tokens_out):,.2f} at the given prices" if prices.known else ""
            yield f"tokens: {c.tokens_in:,} in, {c.tokens_out:,} out{cost}"


def _tokens(text: str) -> float:
    """A rough number of tokens: four characters of English each, one or two of Korean."""
    plain = sum(character.isascii() for character in islice(text, 20_000))
    return plain / 4 + (min(len(text), 20_000) - plain) * 0.8
