"""The choice of pairs to review: of each clip, two runs' captions.

    random         a systematic sample of the clips, sorted by stratum and source: each clip is equally likely, strata
                   and sources are represented in proportion. Only these pairs enter estimates of which run is better.
    disagreement   clips whose captions differ most
    blind          clips whose references a run finds as likely with another video: it may not use the video

The latter two take strata and sources in turn, the highest values first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from itertools import combinations, pairwise
from operator import itemgetter

import numpy as np

from vlmds.errors import InputError
from vlmds.evaluation.metrics import normalise
from vlmds.evaluation.reviews import Pair, Reason, pair_id
from vlmds.review.evaluations import Evaluations

REASONS: tuple[Reason, ...] = ("random", "disagreement", "blind")
SHARES: dict[Reason, float] = {"random": 0.7, "disagreement": 0.2, "blind": 0.1}
"""Of the pairs, unless ``--choose`` says otherwise."""
PAIRS, OVERLAP = 200, 30
"""Defaults of ``--pairs`` and ``--overlap``."""

Candidate = tuple[str, str, str]
"""A clip, and two runs' ids."""


@dataclass(frozen=True)
class Choice:
    """shares: of the pairs, by reason; they add up to 1. pairs, overlap: numbers of them. stratify: kept column."""

    pairs: int = PAIRS
    shares: Mapping[Reason, float] | None = None
    overlap: int = OVERLAP
    stratify: str | None = None
    seed: int = 0


def read_shares(text: str) -> dict[Reason, float]:
    """ "random=70%,blind=30%" or "random,disagreement" (equal shares) as shares that add up to 1.

    Raises:
        InputError: another text.
    """
    found: dict[Reason, float] = {}
    for part in text.split(","):
        name, given, number = (each.strip() for each in part.partition("="))
        reason = next((reason for reason in REASONS if reason == name), None)
        try:
            share = 1.0 if not given else float(number[:-1]) / 100 if number.endswith("%") else float(number)
        except ValueError:
            share = -1.0
        if reason is None or not 0 <= share <= 1:
            raise InputError(f"--choose {text}: write shares such as random=70%,disagreement=20%,blind=10%")
        found[reason] = share
    total = sum(found.values())
    if not total or "=" in text and abs(total - 1) > 0.001:
        raise InputError(f"--choose {text}: the shares must add up to 100%")
    return {reason: share / total for reason, share in found.items()}


def choose_pairs(
    evaluations: Evaluations, choice: Choice, strata: Mapping[str, str] | None = None
) -> tuple[list[Pair], list[str]]:
    """(the pairs, of which those drawn at random are first, lines for the user). No pair is chosen twice, and a clip
    only twice once all clips are used.

    Args:
        strata: {clip: value of the kept column}.
    """
    strata, notes = strata or {}, []
    random = np.random.default_rng(choice.seed)
    shares = {**(choice.shares or SHARES)}
    if shares.get("blind") and not any(evaluations.blind.values()):
        notes.append("no evaluation has a blind test, so pairs that would be chosen by it are drawn at random")
        shares["random"] = shares.get("random", 0.0) + shares.pop("blind")
    runs = [run.id for run in evaluations.runs]
    most = len(evaluations.clips) * (len(runs) * (len(runs) - 1) // 2)
    number = min(choice.pairs, most)
    if number < choice.pairs:
        notes.append(f"there are only {most:,} pairs: all of them are chosen")
    counts = _counts(shares, number)
    taken: dict[Candidate, Reason] = {}
    # Random pairs are drawn first, from all clips: what the others choose must not change them.
    for candidate in _random(evaluations, runs, strata, counts["random"], random):
        taken[candidate] = "random"
    sources: dict[Reason, Callable[[], list[Candidate]]] = {
        # As many of each clip as may be needed: usually one of 28.
        "disagreement": lambda: _by_disagreement(evaluations, runs, -(-number // len(evaluations.clips)) + 1),
        "blind": lambda: _by_blind_score(evaluations, runs, random),
    }
    for reason, candidates in sources.items():
        if counts[reason]:
            for candidate in _spread(candidates(), evaluations, strata, counts[reason], taken):
                taken[candidate] = reason
    pairs = [
        Pair(pair=pair_id(*candidate), clip=candidate[0], source=evaluations.clips[candidate[0]].source,
             a=candidate[1], b=candidate[2], chosen=reason)
        for candidate, reason in taken.items()
    ]  # fmt: skip
    return pairs, notes


def distances(evaluations: Evaluations, clip: str, runs: Sequence[str]) -> Iterator[tuple[float, Candidate]]:
    """The distance of any two captions of the clip, 0 to 1: 1 - F1 of their different characters and pairs of
    characters, without whitespace. (As chrF, aclanthology W15-3049, but symmetric, as neither is the reference, and
    with n-grams that are short enough for the 140,000 pairs of 5,000 clips and 8 runs.)"""
    grams = {run: _grams(evaluations.captions[run][clip]) for run in runs}
    for a, b in combinations(runs, 2):
        size = len(grams[a]) + len(grams[b])
        yield 1 - 2 * len(grams[a] & grams[b]) / size if size else 0.0, (clip, a, b)


def _grams(text: str) -> set[str]:
    text = normalise(text).replace(" ", "")
    return {*text, *map("".join, pairwise(text))}


def _counts(shares: Mapping[Reason, float], number: int) -> dict[Reason, int]:
    """Whole numbers of pairs; what rounding leaves is random's, or the first reason's."""
    counts: dict[Reason, int] = {reason: int(shares.get(reason, 0.0) * number + 1e-9) for reason in REASONS}
    rest = next(reason for reason in REASONS if shares.get(reason))
    counts[rest] += number - sum(counts.values())
    return counts


def _random(
    evaluations: Evaluations, runs: Sequence[str], strata: Mapping[str, str], number: int, random: np.random.Generator
) -> Iterator[Candidate]:
    """Clips by systematic sampling, each with two runs in turn, so that any two runs meet equally often."""
    clips = [*evaluations.clips]
    versus = [*combinations(runs, 2)]
    order = _sorted_at_random(evaluations, strata, random)
    turns = [versus[i] for i in random.permutation(len(versus))]
    # In each round all clips once; in the next one every clip with other runs.
    offset = {clip: i for i, clip in enumerate(random.permutation(clips).tolist())}
    for round in range(-(-number // len(clips)) if number else 0):
        size = min(len(clips), number - round * len(clips))
        begin = random.random()
        for i in range(size):
            clip = order[int((begin + i) * len(clips) / size)]
            turn = round + (i if number <= len(clips) else offset[clip])
            yield (clip, *turns[turn % len(turns)])


def _sorted_at_random(evaluations: Evaluations, strata: Mapping[str, str], random: np.random.Generator) -> list[str]:
    """The clips stratum by stratum and source by source, each of these in random order."""
    clips = random.permutation([*evaluations.clips]).tolist()
    rank: dict[str, int] = {}
    for clip in clips:
        rank.setdefault(evaluations.clips[clip].source, len(rank))
        rank.setdefault(f"\0{strata.get(clip)}", len(rank))
    return sorted(clips, key=lambda clip: (rank[f"\0{strata.get(clip)}"], rank[evaluations.clips[clip].source]))


def _by_disagreement(evaluations: Evaluations, runs: Sequence[str], each: int) -> list[Candidate]:
    """each: at most so many of one clip."""
    found: list[tuple[float, Candidate]] = []
    for clip in evaluations.clips:
        found += nlargest(each, distances(evaluations, clip, runs), key=itemgetter(0))
    return [candidate for _, candidate in sorted(found, key=lambda item: -item[0])]


def _by_blind_score(evaluations: Evaluations, runs: Sequence[str], random: np.random.Generator) -> list[Candidate]:
    """The run with the blind score, against another one that is drawn at random."""
    scored = [
        (score, clip, run)
        for run in runs
        for clip, score in evaluations.blind[run].items()
        if clip in evaluations.clips
    ]
    found = []
    for _, clip, run in sorted(scored, key=lambda item: -item[0]):
        others = [other for other in runs if other != run]
        other = others[random.integers(len(others))]
        a, b = sorted((run, other), key=runs.index)
        found.append((clip, a, b))
    return found


def _spread(
    ranked: list[Candidate],
    evaluations: Evaluations,
    strata: Mapping[str, str],
    number: int,
    taken: Mapping[Candidate, Reason],
) -> list[Candidate]:
    """The first ``number`` that are not taken; before a second one of a clip comes one of each clip, and before a
    second one of a source or stratum one of each."""
    of_clip: Counter[str] = Counter(clip for clip, *_ in taken)
    of_source: Counter[tuple[int, str, str]] = Counter()
    queues: dict[tuple[int, str], list[tuple[int, Candidate]]] = defaultdict(list)
    for candidate in dict.fromkeys(ranked):
        if candidate in taken:
            continue
        clip, stratum = candidate[0], str(strata.get(candidate[0]))
        turn, source = of_clip[clip], evaluations.clips[clip].source
        of_clip[clip] += 1
        queues[turn, stratum].append((of_source[turn, stratum, source], candidate))
        of_source[turn, stratum, source] += 1
    placed = []
    for (turn, _), queue in queues.items():
        queue.sort(key=lambda item: item[0])  # stable: the highest values first
        placed += [(turn, place, candidate) for place, (_, candidate) in enumerate(queue)]
    placed.sort(key=lambda item: item[:2])
    return [candidate for *_, candidate in placed[:number]]
