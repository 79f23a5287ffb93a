"""A judge's files in a folder of reviews.

judge-NAME.jsonl       its answers, each pair in both orders (:mod:`vlmds.evaluation.reviews`)
judge-NAME.json        what it was asked with, and what became of the requests
judge-cache/NAME.jsonl replies by the sha256 of rubric, model and question
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlmds.errors import InputError
from vlmds.evaluation.reviews import JUDGE, answers_path
from vlmds.files import write
from vlmds.judge.rubric import VERSION, Language, Question, Verdict
from vlmds.runs.rank_jsonl import Appender, RankJsonl

FORMAT, FORMAT_VERSION = "vlmds-judge", 1
CACHE = "judge-cache"


@dataclass(frozen=True)
class Settings:
    """What a judge's answers depend on."""

    model: str
    language: Language
    frames: int
    rubric: int = VERSION


@dataclass
class Counts:
    """What became of requests. failed: without an answer after all retries. malformed: an answer that is none."""

    asked: int = 0
    answered: int = 0
    cached: int = 0
    refused: int = 0
    malformed: int = 0
    failed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def lost(self) -> int:
        return self.refused + self.malformed + self.failed


@dataclass
class JudgeFiles:
    """folder: of the reviews. name: of the judge, its reviewer's name being "judge:NAME"."""

    folder: Path
    name: str
    settings: Settings
    replies: dict[str, Verdict] = field(default_factory=dict)

    @property
    def reviewer(self) -> str:
        return JUDGE + self.name

    @property
    def answers(self) -> Path:
        return answers_path(self.folder, self.reviewer)

    @property
    def record(self) -> Path:
        return self.answers.with_suffix(".json")

    @property
    def cache(self) -> Path:
        return self.folder / CACHE / self.answers.name

    def check(self) -> None:
        """Raise InputError if answers under this name were given with other settings."""
        try:
            before = json.loads(self.record.read_text(encoding="utf-8"))["settings"]
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{self.record}: damaged; delete it, or give another name with --as") from None
        now = asdict(self.settings)
        other = [f"{key} {before.get(key)}" for key in now if before.get(key) != now[key]]
        if other:
            raise InputError(
                f"{self.record}: the answers of judge {self.name} were given with {', '.join(other)}; "
                "give these another name with --as"
            )

    def key(self, question: Question) -> str:
        """The sha256 of all that a reply depends on."""
        content = [asdict(self.settings), question.first, question.second, [*question.references], [*question.frames]]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()

    def read_replies(self) -> None:
        """Read the cache; a line that a kill cut short is left out."""
        for record in RankJsonl(self.cache, self.cache.stem).read():
            try:
                self.replies[record["key"]] = Verdict.model_validate(record["verdict"])
            except (ValueError, KeyError, TypeError):
                continue

    @contextmanager
    def appending(self) -> Iterator[Appender]:
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        with Appender(self.cache) as appender:
            yield appender

    def write_record(self, endpoint: str, counts: Counts) -> None:
        """endpoint: without secrets."""
        record: dict[str, Any] = {"format": FORMAT, "version": FORMAT_VERSION, "settings": asdict(self.settings)}
        record |= {"endpoint": endpoint, "last": asdict(counts)}
        write(self.record, json.dumps(record, ensure_ascii=False, indent=1) + "\n")
