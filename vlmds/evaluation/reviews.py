"""Comparisons of two captions of a clip by people and by judges: the plan and the answers, as files in one folder.

    review.json            the plan: runs, pairs of captions to compare, and how they were chosen
    REVIEWER.jsonl         answers of a person, one a line, appended
    judge-NAME.jsonl       answers of a judge ("judge:NAME"), each pair in both orders

The last line about a pair counts, and an undo takes the answer back. A line is on disk before :func:`append_answer`
returns; a kill can only cut the last line short, which was not acknowledged then: it is dropped when read, and cut
off before the next one is appended.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from vlmds.errors import InputError
from vlmds.files import sync_folder, write

PLAN = "review.json"
JUDGE = "judge:"
"""A judge's name as a reviewer begins with it; in file names it is "judge-"."""

Choice = Literal["left", "right", "both_good", "both_bad"]
Mark = Literal["invented_object", "wrong_action", "wrong_direction", "wrong_number", "unnatural_korean"]
Reason = Literal["random", "disagreement", "blind"]
"""Why a pair was chosen. Only pairs drawn at random are a fair sample of the clips."""
CHOICES: tuple[Choice, ...] = ("left", "right", "both_good", "both_bad")
MARK_NAMES: dict[Mark, tuple[str, str]] = {
    "invented_object": ("invented object", "없는 사물"),
    "wrong_action": ("wrong action", "잘못된 동작"),
    "wrong_direction": ("wrong direction", "잘못된 방향"),
    "wrong_number": ("wrong number", "잘못된 개수"),
    "unnatural_korean": ("unnatural Korean", "어색한 한국어"),
}
"""Marks in English and Korean."""
MARKS: tuple[Mark, ...] = (*MARK_NAMES,)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class ReviewedRun(_Record):
    """A run of the plan. id: see :func:`run_id`. name: as reports show it. evaluation: folder with predictions.jsonl,
    whose sha256 it had when the plan was made."""

    id: str
    name: str
    evaluation: str
    sha256: str


class Pair(_Record):
    """Two runs' captions of one clip. pair: see :func:`pair_id`. clip: the sample's key. source: the video that it is
    from. a, b: ids of runs."""

    pair: str
    clip: str
    source: str
    a: str
    b: str
    chosen: Reason


class Plan(_Record):
    """What is reviewed. dataset: folder of the clips. split: of the evaluations. choose: the options of
    ``vlmds review`` that chose the pairs. overlap: how many pairs, from the first, every reviewer gets."""

    format: Literal["vlmds-reviews"] = "vlmds-reviews"
    version: Literal[1] = 1
    dataset: str
    split: str | None = None
    runs: tuple[ReviewedRun, ...]
    choose: dict[str, Any] = {}
    seed: int = 0
    overlap: int = 0
    pairs: tuple[Pair, ...]

    def run(self, id: str) -> ReviewedRun:
        return next(run for run in self.runs if run.id == id)


class SideMarks(_Record):
    """What is wrong with each caption."""

    left: tuple[Mark, ...] = ()
    right: tuple[Mark, ...] = ()


class Correction(_Record):
    """A better caption of the clip. run ("from" in the file): id of the run whose caption was corrected."""

    text: str = Field(min_length=1)
    run: str = Field(validation_alias=AliasChoices("from", "run"), serialization_alias="from")


class Answer(_Record):
    """One answer. left, right: ids of the runs whose captions stood there. reference: whether the reviewer asked for
    the reference. seconds: from the pair's showing to the answer. time: ISO, UTC. order: of a judge, 1 or 2."""

    pair: str
    clip: str
    source: str
    left: str
    right: str
    choice: Choice
    marks: SideMarks = SideMarks()
    corrected: Correction | None = None
    reference: bool = False
    chosen: Reason
    seconds: float | None = None
    time: str
    reviewer: str
    order: Literal[1, 2] | None = None

    @property
    def by_judge(self) -> bool:
        return self.reviewer.startswith(JUDGE)

    @property
    def preferred(self) -> str | None:
        """The id of the run whose caption is better; None for a tie (both good, or both bad)."""
        return {"left": self.left, "right": self.right}.get(self.choice)


@dataclass(frozen=True)
class Reviews:
    """A folder of reviews. answers: those that count, reviewer by reviewer, in the order they were given. warnings:
    in English ("en") and Korean ("ko")."""

    folder: Path
    plan: Plan
    answers: list[Answer]
    warnings: list[dict[str, str]]

    @property
    def people(self) -> list[Answer]:
        return [answer for answer in self.answers if not answer.by_judge]

    @property
    def judged(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.by_judge]


def run_id(sha256: str) -> str:
    """A run's id in a plan, from the sha256 of its predictions.jsonl."""
    return sha256[:12]


def pair_id(clip: str, a: str, b: str) -> str:
    """The pair's id, the same whichever run is named first."""
    return hashlib.sha256("\n".join([clip, *sorted((a, b))]).encode()).hexdigest()[:16]


def now() -> str:
    """The time of an answer."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def reviewer_name(name: str) -> str:
    """The name in the form that files have (NFC).

    Raises:
        InputError: it cannot be a file's name, or is one of a judge.
    """
    name = unicodedata.normalize("NFC", name.strip())
    if not re.fullmatch(r"\w[\w.-]{0,39}", name) or name.lower().startswith("judge-"):
        raise InputError(
            f"reviewer {name!r}: give a name of letters, digits, - _ . (40 at most) that does not begin with judge-"
        )
    return name


def answers_path(folder: Path, reviewer: str) -> Path:
    """The file of a reviewer's answers; of a judge, "judge:NAME"."""
    if reviewer.startswith(JUDGE):
        reviewer = f"judge-{re.sub(r'[^0-9A-Za-z가-힣._-]', '_', reviewer.removeprefix(JUDGE))}"
    return folder / f"{reviewer}.jsonl"


def write_plan(folder: Path, plan: Plan) -> None:
    write(folder / PLAN, plan.model_dump_json(indent=1) + "\n")


def read_plan(folder: str | Path) -> Plan:
    """Raises InputError if there is none, or it is damaged."""
    path = Path(folder) / PLAN
    try:
        return Plan.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: missing; make reviews with vlmds review RUN… --data DIR -o {folder}") from None
    except ValidationError as error:
        raise InputError(f"{path}: not a plan of this vlmds: {_first(error)}") from None


def read_reviews(folder: str | Path) -> Reviews:
    """The plan and all answers that count.

    Raises:
        InputError: no plan, or a damaged line other than a last one that a kill cut short; names file and line.
    """
    folder = Path(folder)
    plan = read_plan(folder)
    answers: list[Answer] = []
    warnings: list[dict[str, str]] = []
    for path in sorted(folder.glob("*.jsonl")):
        found, cut = read_answers(path, plan)
        answers += found
        if cut:
            warnings.append(
                {
                    "en": f"{path}: the last line is cut off and was left out; that answer was never confirmed",
                    "ko": f"{path}: 마지막 줄이 중간에 끊겨 제외했습니다. 저장이 확인되지 않은 응답입니다.",
                }
            )
    return Reviews(folder, plan, answers, warnings)


def read_answers(path: Path, plan: Plan) -> tuple[list[Answer], bool]:
    """(the answers of one file that count, whether its last line was cut short); none if it is missing.

    Raises:
        InputError: a damaged line, or one about a run that the plan does not have.
    """
    data = path.read_bytes() if path.is_file() else b""
    *lines, rest = data.split(b"\n")
    runs = {run.id for run in plan.runs}
    found: dict[tuple[str, int | None], Answer] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if record.get("undo"):
                pair = record["pair"]
                for key in [key for key in found if key[0] == pair]:
                    del found[key]
                continue
            answer = Answer.model_validate_json(line)
        except ValidationError as error:
            raise InputError(f"{path}: line {number}: {_first(error)}; repair or delete the line") from None
        except (ValueError, AttributeError, KeyError):
            raise InputError(f"{path}: line {number}: not an answer; repair or delete the line") from None
        named = {answer.left, answer.right, *([answer.corrected.run] if answer.corrected else [])}
        if unknown := named - runs:
            raise InputError(
                f"{path}: line {number}: no run {min(unknown)} in {PLAN}; the file belongs to other reviews"
            )
        key = answer.pair, answer.order
        found.pop(key, None)  # the order is that of the answers that count
        found[key] = answer
    return list(found.values()), bool(rest)


def append_answer(path: Path, answer: Answer) -> None:
    """Append the answer; it is on disk when this returns. Raises OSError, and then nothing was added."""
    _append(path, answer.model_dump(mode="json", by_alias=True, exclude_none=True) | {"corrected": _dumped(answer)})


def append_undo(path: Path, pair: str, reviewer: str) -> None:
    """Take the answer about the pair back, as :func:`append_answer` writes."""
    _append(path, {"pair": pair, "undo": True, "time": now(), "reviewer": reviewer})


def _dumped(answer: Answer) -> dict[str, str] | None:
    return answer.corrected.model_dump(by_alias=True) if answer.corrected else None


def _append(path: Path, record: dict[str, Any]) -> None:
    """One line, under a lock: two processes may serve the same folder."""
    data = (json.dumps(record, ensure_ascii=False) + "\n").encode()
    new = not path.exists()
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = _end_of_last_line(file)
        os.ftruncate(file, end)
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(file, data[written:], end + written)
            os.fsync(file)
        except OSError:
            os.ftruncate(file, end)
            raise
    finally:
        os.close(file)
    if new:
        sync_folder(path.parent)


def _end_of_last_line(file: int, block: int = 4096) -> int:
    """The place after the last newline of the file."""
    end = os.fstat(file).st_size
    while end:
        begin = max(0, end - block)
        found = os.pread(file, end - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def _first(error: ValidationError) -> str:
    """The first of the errors, in one line."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the line'}: {first['msg']}"
