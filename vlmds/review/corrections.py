"""Answers of people as data: corrected and approved captions as a manifest, preferences in TRL's format."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmds.console.text import counted
from vlmds.data.index import ShardIndex
from vlmds.errors import InputError, SampleError
from vlmds.evaluation.metrics import normalise
from vlmds.evaluation.reviews import Answer, Reviews, read_reviews
from vlmds.files import as_path, write
from vlmds.packing.shards import read_marker
from vlmds.review.clips import ClipStore
from vlmds.review.evaluations import Evaluations, planned_evaluations
from vlmds.review.folder import ENCODED

SIDES = ("left", "right")


@dataclass
class _Caption:
    """A caption of a clip, with those who wrote or approved it: [{kind, reviewer, time, run}]."""

    text: str
    review: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Export:
    """The reviews with the clips' facts."""

    reviews: Reviews
    evaluations: Evaluations
    clips: ClipStore

    @classmethod
    def open(cls, folder: Path, data: str | None) -> _Export:
        reviews = read_reviews(folder)
        if not reviews.people:
            raise InputError(f"{folder}: no person has answered yet; vlmds review -o {folder} opens the page")
        keys = {answer.clip for answer in reviews.people}
        clips = ClipStore(data or reviews.plan.dataset, keys, folder / ENCODED)
        return cls(reviews, planned_evaluations(reviews.plan), clips)

    def caption(self, answer: Answer, side: str) -> str:
        return self.evaluations.captions[getattr(answer, side)][answer.clip]

    def notes(self) -> list[str]:
        return [f"note: {warning['en']}" for warning in self.reviews.warnings]


def write_manifest(
    folder: Path, output: Path, *, data: str | None = None, split: str | None = None, picked: bool = False
) -> list[str]:
    """Write the captions that people corrected or approved (both good, and unmarked) as rows of a manifest, one for
    each caption; returns lines for the user.

    Columns: video, start, end and prompt as in the manifest that the clips were packed from; caption; split; id, which
    depends on clip and caption, so that pack --append adds each once; review: [{kind, reviewer, time, run}].

    Args:
        data: dataset of the clips (default: the plan's). split: default: the clip's own. picked: also captions that
            were preferred to another one, and have no mark.

    Raises:
        InputError: no answers, damaged reviews, an evaluation that was made again, or another kind of file.
    """
    if output.suffix != ".jsonl":
        raise InputError(f"--manifest {output}: name a .jsonl file")
    export = _Export.open(folder, data)
    captions = _captions(export, picked)
    named = _Named(export.clips.index)
    rows: list[dict[str, Any]] = []
    lines = export.notes()
    unread: list[str] = []
    for clip, found in captions.items():
        try:
            facts = named.facts(export.clips, clip)
        except SampleError as error:
            unread.append(str(error))
            continue
        rows += [_row(facts, caption, split) for caption in found]
    write(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    kinds = Counter(review["kind"] for row in rows for review in row["review"][:1])
    listed = ", ".join(f"{number} {kind}" for kind, number in kinds.items()) or "none"
    lines.append(f"{output}: {counted(len(rows), 'caption')} of {counted(len(captions), 'clip')} ({listed})")
    lines += _advice(export, output, rows, unread, split)
    return lines


def write_preferences(folder: Path, output: Path, *, data: str | None = None) -> list[str]:
    """Write TRL's conversational preference format: lines of prompt, chosen and rejected (lists of messages), with
    video, start, end, clip and reviewers besides; returns lines for the user.

    A pair gives its preferred caption over the other; the majority decides, and a tie gives none. A corrected caption
    is chosen over the one that it corrects.

    Raises:
        InputError: as of :func:`write_manifest`.
    """
    if output.suffix != ".jsonl":
        raise InputError(f"--preferences {output}: name a .jsonl file")
    export = _Export.open(folder, data)
    named = _Named(export.clips.index)
    written: list[dict[str, Any]] = []
    unread: list[str] = []
    for answer, chosen, rejected, reviewers in _preferences(export):
        try:
            facts = named.facts(export.clips, answer.clip)
        except SampleError as error:
            unread.append(str(error))
            continue
        line: dict[str, Any] = {
            "prompt": [{"role": "user", "content": facts.get("prompt") or export.evaluations.prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        line |= {name: facts[name] for name in ("video", "start", "end") if name in facts}
        written.append(line | {"clip": answer.clip, "reviewers": reviewers})
    write(output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in written))
    return [*export.notes(), f"{output}: {counted(len(written), 'preference')}", *_unread(unread)]


def _captions(export: _Export, picked: bool) -> dict[str, list[_Caption]]:
    """{clip: captions that were corrected or approved}, the corrected ones first. A caption that anyone marked, or
    that was called bad, is not approved."""
    found: defaultdict[str, dict[str, _Caption]] = defaultdict(dict)
    refused = {
        (answer.clip, normalise(export.caption(answer, side)))
        for answer in export.reviews.people
        for side in SIDES
        if getattr(answer.marks, side) or answer.choice == "both_bad"
    }
    names = {run.id: run.name for run in export.reviews.plan.runs}

    def add(answer: Answer, text: str, kind: str, run: str) -> None:
        who = {"kind": kind, "reviewer": answer.reviewer, "time": answer.time, "run": names[run]}
        found[answer.clip].setdefault(normalise(text), _Caption(text)).review.append(who)

    for answer in export.reviews.people:
        if answer.corrected:
            add(answer, answer.corrected.text, "corrected", answer.corrected.run)
    for answer in export.reviews.people:
        for side in SIDES:
            text = export.caption(answer, side)
            approved = answer.choice == "both_good" or picked and answer.choice == side
            if approved and text.strip() and (answer.clip, normalise(text)) not in refused:
                add(answer, text, "approved", getattr(answer, side))
    return {clip: [*captions.values()] for clip, captions in found.items()}


def _preferences(export: _Export) -> Iterator[tuple[Answer, str, str, list[str]]]:
    """(answer, chosen text, rejected text, reviewers)"""
    votes: defaultdict[str, list[Answer]] = defaultdict(list)
    for answer in export.reviews.people:
        if answer.preferred:
            votes[answer.pair].append(answer)
        if answer.corrected:
            before = export.evaluations.captions[answer.corrected.run][answer.clip]
            if normalise(before) != normalise(answer.corrected.text):
                yield answer, answer.corrected.text, before, [answer.reviewer]
    for answers in votes.values():
        (winner, most), *others = Counter(answer.preferred for answer in answers).most_common()
        if others and others[0][1] == most:
            continue
        first = next(answer for answer in answers if answer.preferred == winner)
        chosen, rejected = (
            export.caption(first, side) for side in (first.choice, *(s for s in SIDES if s != first.choice))
        )
        if normalise(chosen) != normalise(rejected):
            yield first, chosen, rejected, [answer.reviewer for answer in answers if answer.preferred == winner]


class _Named:
    """Clips as the manifest that they were packed from named them. A packed video may have been cut to its span, and
    then its index has times of the cut file; the marker of its shard has the manifest's."""

    def __init__(self, index: ShardIndex):
        self.index = index
        self._inputs: dict[tuple[str, int], dict[str, list[Any]]] = {}

    def facts(self, clips: ClipStore, clip: str) -> dict[str, Any]:
        """id, video, split, and start, end, prompt where there are some. Raises SampleError."""
        described = clips.description(clip)
        split, shard = clips.shard(clip)
        inputs = self._of_shard(split, shard).get(clip)
        own = [described.get("id", clip), described.get("source", clip), described.get("start"), described.get("end")]
        id, source, start, end = inputs or own
        facts: dict[str, Any] = {"id": id, "video": source, "start": start, "end": end, "split": split}
        facts["prompt"] = described.get("prompt")
        return {name: value for name, value in facts.items() if value is not None}

    def _of_shard(self, split: str, shard: int) -> dict[str, list[Any]]:
        """{key: [id, source, start, end]} of the manifest's rows, where the marker of the shard has them."""
        if (split, shard) not in self._inputs:
            try:
                inputs = read_marker(as_path(self.index.root) / split / f"{shard:06d}.json").get("inputs", ())
            except (OSError, InputError):
                inputs = ()  # shards may be copied without their markers
            self._inputs[split, shard] = {key: [id, *named] for id, key, *named in inputs}
        return self._inputs[split, shard]


def _row(facts: dict[str, Any], caption: _Caption, split: str | None) -> dict[str, Any]:
    digest = hashlib.sha256(normalise(caption.text).encode()).hexdigest()[:8]
    row = {**facts, "caption": caption.text, "id": f"{facts['id']}-reviewed-{digest}", "review": caption.review}
    return row | ({"split": split} if split else {})


def _advice(
    export: _Export, output: Path, rows: Sequence[dict[str, Any]], unread: Sequence[str], split: str | None
) -> list[str]:
    lines = _unread(unread)
    missing = sum("://" not in row["video"] and not (output.parent / row["video"]).exists() for row in rows)
    if missing:
        lines.append(
            f"note: {counted(missing, 'video')} not found from {output.parent}: put the file into the folder of the "
            "manifest that the clips were packed from"
        )
    own = {row["split"] for row in rows}
    reviewed = export.reviews.plan.split
    if split and reviewed and split != reviewed:
        lines.append(
            f"WARNING: the clips are of split {reviewed}. Once a model has trained on them, its scores on {reviewed} "
            "are too good; evaluate on other videos"
        )
    elif rows and "train" not in own:
        lines.append(f"note: the rows are of split {', '.join(sorted(own))}; --split train makes them training data")
    lines.append(f"next: vlmds pack {output} {export.clips.index.root} --append --keep-columns review")
    return lines


def _unread(reasons: Sequence[str]) -> list[str]:
    if not reasons:
        return []
    return [f"WARNING: {counted(len(reasons), 'clip')} left out, which cannot be read, such as {reasons[0]}"]
