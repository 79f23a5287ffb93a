"""Near-duplicates: samples of different source videos whose frames look the same, as in a re-encoded, resized or
shortened copy. Those in train and in another split at once are leaks.

Hashes of frames (`vlmds.video.frame_hash`) are in the shards' markers. They are sorted by each of seven bands of
their bits and compared with the next few alone (the sorted-neighbourhood method): the time grows as N log N.
"""

import json
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vlmds.console.text import counted
from vlmds.data.index import ShardIndex
from vlmds.files import write
from vlmds.packing.shards import json_line
from vlmds.video.frame_hash import FRAMES, bits, frame_distance, read_hashes

NAME = "near_duplicates.jsonl"
SHOWN = 10
"""Pairs in the summary and the report; the file has all."""
ALIKE = 10
"""Bits of 63 in which more than half of the frames of one sample differ at most from some frame of the other. Chosen
by `python -m tests.manual.near_duplicates`; docs/packing.md has the rates."""
BANDS, BAND_BITS = 7, 9
NEIGHBOURS = 16  # frames with the same band that a frame is compared with: those with the nearest following bits
MOST_CANDIDATES = 20_000_000
SLICE, CHUNK = 1 << 20, 1 << 14  # hashes, and pairs of samples, that are compared at once


@dataclass(frozen=True)
class NearDuplicate:
    """Two sources that look alike. samples: "split/key" of the nearest two. distance: of their hashes (bits). leak:
    one of them is in train, the other is not."""

    samples: tuple[str, str]
    sources: tuple[str, str]
    distance: int
    leak: bool


@dataclass(frozen=True)
class Found:
    """The counts of a search, as dataset.json has them. pairs: of sources. compared: samples. plain: samples whose
    frames show too little for a comparison. unhashed: samples without hashes. complete: false if the search ended
    early."""

    pairs: int
    leaks: int
    compared: int
    plain: int
    unhashed: int
    complete: bool


class Hashed:
    """The samples of a dataset with the hashes of their frames."""

    def __init__(self) -> None:
        self._names: list[str] = []  # "split/key"
        self._groups: dict[tuple[str, str], int] = {}  # (source, split): number
        self._group = array("q")  # of each sample
        self._counts = array("q")  # hashes of each sample
        self._hashes = bytearray()
        self._plain = self._unhashed = 0

    def add(self, split: str, row: dict[str, Any]) -> None:
        """Add a sample by its row of a shard's marker."""
        text = row.get("frame_hashes")
        if not text:
            self._unhashed += text is None
            self._plain += text == ""
            return
        hashes = read_hashes(text)[:FRAMES]
        self._names.append(f"{split}/{row['key']}")
        self._group.append(self._groups.setdefault((row["source"], split), len(self._groups)))
        self._counts.append(len(hashes))
        self._hashes += hashes.tobytes()

    def write(self, out: Path) -> Found:
        """Search, and write near_duplicates.jsonl: leaks first, then the nearest."""
        pairs, complete = self.find()
        write(out / NAME, b"".join(json_line(asdict(pair)) for pair in pairs))
        leaks = sum(pair.leak for pair in pairs)
        return Found(len(pairs), leaks, len(self._names), self._plain, self._unhashed, complete)

    def find(self) -> tuple[list[NearDuplicate], bool]:
        """The pairs, and whether all candidates were compared."""
        counts, group = np.array(self._counts, np.int64), np.array(self._group, np.int64)
        hashes, sample = np.frombuffer(bytes(self._hashes), np.uint64), np.repeat(np.arange(len(counts)), counts)
        names = list(self._groups)
        videos: dict[str, int] = {}
        source = np.array([videos.setdefault(name, len(videos)) for name, _ in names], np.int64)
        first, second, complete = candidates(hashes, sample, group, source)
        table = np.zeros((len(counts), FRAMES), np.uint64)
        table[np.arange(FRAMES) < counts[:, None]] = hashes
        nearest: dict[tuple[int, int], tuple[int, int, int]] = {}
        for at in range(0, len(first), CHUNK):
            one, other = first[at : at + CHUNK], second[at : at + CHUNK]
            distance = distances(table[one], counts[one], table[other], counts[other])
            for i in np.flatnonzero(distance <= ALIKE):
                a, b = int(one[i]), int(other[i])
                key = (min(group[a], group[b]), max(group[a], group[b]))
                value = (int(distance[i]), a, b)
                nearest[key] = min(nearest.get(key, value), value)
        pairs = [self._pair(names, group, *found) for found in nearest.values()]
        return sorted(pairs, key=lambda pair: (not pair.leak, pair.distance, pair.samples)), complete

    def _pair(self, names: list[tuple[str, str]], group: np.ndarray, distance: int, a: int, b: int) -> NearDuplicate:
        (one, here), (other, there) = names[group[a]], names[group[b]]
        leak = (here == "train") != (there == "train")
        return NearDuplicate((self._names[a], self._names[b]), (one, other), distance, leak)


def candidates(
    hashes: np.ndarray, sample: np.ndarray, group: np.ndarray, source: np.ndarray
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Pairs of samples of different sources with two frames that agree in a band and differ in at most ALIKE bits.

    hashes: uint64 [H]. sample: int [H], whose they are, rising. group: int [samples]. source: int [groups].

    Returns:
        int64 [C] the lesser sample, int64 [C] the other, and whether these are all
    """
    owner = group[sample]
    order = np.lexsort((owner, hashes))
    # Spans of one video with the same frame count once, or they would fill the neighbourhood of the others.
    again = (np.diff(hashes[order]) == 0) & (np.diff(owner[order]) == 0)
    order = order[~np.concatenate([np.zeros(min(len(order), 1), bool), again])]
    hashes, sample = hashes[order], sample[order]
    total = int(sample.max(initial=0)) + 1
    found, waiting = [np.empty(0, np.int64)], 0
    for band in range(BANDS):
        # Bit 0, of the brightness, is always 0.
        first = np.uint64(1 + band * BAND_BITS)
        turned = (hashes >> first) | (hashes << (np.uint64(64) - first))  # the band has the lowest bits
        turned = (turned << np.uint64(64 - BAND_BITS)) | (turned >> np.uint64(BAND_BITS))  # … the highest
        places = np.argsort(turned, kind="stable")
        for one, other in _neighbours((turned >> np.uint64(64 - BAND_BITS))[places]):
            one, other = places[one], places[other]
            near = bits(hashes[one] ^ hashes[other]) <= ALIKE
            a, b = sample[one[near]], sample[other[near]]
            different = source[group[a]] != source[group[b]]
            a, b = a[different], b[different]
            found.append(np.minimum(a, b) * total + np.maximum(a, b))
            waiting += len(a)
            if waiting > MOST_CANDIDATES:
                found, waiting = [np.unique(np.concatenate(found))], 0
                if len(found[0]) > MOST_CANDIDATES:
                    return found[0] // total, found[0] % total, False
    codes = np.unique(np.concatenate(found))
    return codes // total, codes % total, True


def distances(one: np.ndarray, counts: np.ndarray, other: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each pair of samples, the distance that more than half of the frames of one of them have at most from some
    frame of the other: uint8 [C].

    one, other: uint64 [C, FRAMES], of which the first `counts` and `others` (int [C], at least 1) are hashes.
    """
    apart = frame_distance(one[:, :, None], other[:, None, :])
    apart[np.arange(FRAMES) >= counts[:, None]] = 255
    apart.transpose(0, 2, 1)[np.arange(FRAMES) >= others[:, None]] = 255
    rows = np.arange(len(one))
    return np.minimum(
        np.sort(apart.min(2), axis=1)[rows, counts // 2], np.sort(apart.min(1), axis=1)[rows, others // 2]
    )


def _neighbours(key: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places of pairs in the sorted `key` [H] that have the same, at most NEIGHBOURS apart; at most SLICE at once."""
    for begin in range(0, len(key), SLICE):
        one = np.arange(begin, min(begin + SLICE, len(key)))
        for step in range(1, NEIGHBOURS + 1):
            one = one[one + step < len(key)]
            one = one[key[one] == key[one + step]]
            if not len(one):
                break
            yield one, one + step


def near_duplicate_lines(out: Path, *, korean: bool = False) -> list[str]:
    """Lines about the pairs of a packed dataset, of which the first SHOWN are named; none if there are none.

    Raises InputError if `out` contains no readable dataset.
    """
    index = ShardIndex.open(out)
    found = index.meta.get("near_duplicates")
    if found is None:  # of an earlier version
        return []
    lines = []
    if found["pairs"]:
        lines.append(_summary(found, korean))
        lines += [_pair_text(pair, korean) for pair in _first_pairs(index.root / NAME)]
    if found["leaks"]:
        lines.append(_warning(found["leaks"], korean))
    if found["unhashed"] and index.store != "features":
        lines.append(_unsearched(found["unhashed"], korean))
    return lines


def _first_pairs(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():  # training needs no such file: it may have been left behind
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, SHOWN)]


def _summary(found: dict[str, Any], korean: bool) -> str:
    pairs, leaks = found["pairs"], found["leaks"]
    if korean:
        least = "" if found["complete"] else " 이상"
        return f"유사 중복: 서로 다른 원본 영상 {pairs:,}쌍{least}의 프레임이 거의 같으며, 그중 {leaks:,}쌍은 train과 다른 분할에 걸쳐 있습니다. 전체 목록: {NAME}"
    least = "" if found["complete"] else "at least "
    return f"near-duplicates: {least}{counted(pairs, 'pair')} of source videos with nearly the same frames, {leaks:,} of them in train and another split; all are in {NAME}"


def _pair_text(pair: dict[str, Any], korean: bool) -> str:
    one, other = pair["samples"]
    differ = f"63비트 중 {pair['distance']}비트 다름" if korean else f"{pair['distance']} of 63 bits differ"
    leak = (", 분할 간 누출" if korean else ", leak") if pair["leak"] else ""
    return f"  {one} ~ {other} ({differ}{leak})"


def _warning(leaks: int, korean: bool) -> str:
    if korean:
        return f"경고: 유사 중복 {leaks:,}쌍이 train과 다른 분할에 걸쳐 있어 그 분할의 점수가 실제보다 높게 나옵니다. 매니페스트의 split 열에서 두 행을 같은 분할로 지정하거나 한 행을 뺀 뒤 새 폴더에 다시 패킹하십시오."
    return f"WARNING: {counted(leaks, 'pair')} of near-duplicates in train and another split: scores on that split will be too high. In the manifest, give both rows the same split (column split) or leave one out, and pack into a new folder"


def _unsearched(count: int, korean: bool) -> str:
    if korean:
        return f"유사 중복 검사를 하지 않은 샘플: {count:,}개(--no-verify로 패킹했거나 이전 버전에서 패킹한 샘플)"
    return f"near-duplicates were not searched among {counted(count, 'sample')} packed with --no-verify or by an earlier version"
