"""The dataset's ledger, index and dataset.json, made from the markers of its finished shards."""

import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from vlmds.data.index import FORMAT, SCHEMA, VERSIONS, footer_sha256
from vlmds.errors import InputError
from vlmds.files import is_url, replacing, sha256_of, temporary_owner, write
from vlmds.packing.manifest import Known, Manifest, ManifestRow, Reject
from vlmds.packing.near_duplicates import Found, Hashed
from vlmds.packing.shards import MARKERS, Shard, json_line, read_marker
from vlmds.packing.video_facts import PLANS

DAY = 86400.0


@dataclass(frozen=True)
class Base:
    """The result of an earlier packing, which --append adds to.

    planned: for each split, how many shard numbers are taken. known: its rows. keys, ids: of samples
    and rejected rows of which the markers record nothing more. unusable: the ledger's rows that are
    in no shard. contents: (sha256, start, end) of a sample's video -> its key. described:
    dataset.json. splits: source -> split.
    """

    planned: dict[str, int]
    known: Known
    keys: set[str]
    ids: set[str]
    unusable: list[Reject]
    contents: dict[tuple, str]
    described: dict[str, Any]
    splits: dict[str, str]

    @classmethod
    def read(cls, out: Path) -> "Base":
        """Raises InputError if there is no finished dataset.

        Of the files that `finish_dataset` replaces, only dataset.json, the last of them, is relied
        on: the others may be those of an --append that was killed.
        """
        path = out / "dataset.json"
        try:
            meta = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise InputError(f"{path}: not there; --append adds to a finished packing") from None
        with (out / "ledger.jsonl").open(encoding="utf-8") as file:
            rejects = [Reject(**json.loads(line)) for line in file]
        base = cls(meta["planned"], Known(), set(), set(), [r for r in rejects if r.shard is None], {}, meta, {})
        for shard in base.shards(out):
            marker = read_marker(out / f"{shard.name}.json")
            base._learn(marker, shard.split)
            for row in marker["rows"]:
                if row.get("content"):
                    base.contents.setdefault(tuple(row["content"]), row["key"])
        return base

    def _learn(self, marker: dict[str, Any], split: str) -> None:
        """Note the rows of a shard."""
        packed = {row["key"] for row in marker["rows"]}
        rejected = {reject["id"] for reject in marker["rejects"]}
        for sample_id, key, *named in marker.get("inputs", ()):
            self.known.inputs.setdefault(tuple(named), []).append(sample_id)
            self.splits.setdefault(named[0], split)
            if key in packed:
                self.known.ids.add(sample_id)
                self.known.keys.add(key)
            packed.discard(key)
            rejected.discard(sample_id)
        self.keys.update(packed)
        self.ids.update(rejected)

    @cached_property
    def left_out(self) -> set[tuple]:
        """(id, source) of the rows that were fit to be packed, but are copies."""
        return {(reject.id, reject.video) for reject in self.unusable if reject.split is not None}

    def has(self, row: ManifestRow) -> bool:
        """Whether the row is packed, or was rejected when that was tried, or left out as a copy."""
        return (
            self.known.has(row) or row.key in self.keys or row.id in self.ids or (row.id, row.source) in self.left_out
        )

    def still_unusable(self, manifest: Manifest) -> list[Reject]:
        """The rows in no shard whose rejection stays: copies that were left out, and rows that this
        manifest no longer has."""
        names = (
            {row.source for row in manifest.rows}
            | {row.id for row in manifest.rows}
            | {reject.video or reject.id for reject in manifest.rejects}
        )
        return [
            reject for reject in self.unusable if reject.split is not None or (reject.video or reject.id) not in names
        ]

    def shards(self, out: Path) -> list[Shard]:
        """Its shards, by name only."""
        names = sorted((path.parent.name, int(path.stem)) for path in out.glob(MARKERS))
        return [Shard(split, number, [], "") for split, number in names if number < self.planned.get(split, 0)]


@dataclass(frozen=True)
class Finished:
    """The files that `finish_dataset` wrote. rejects: the whole ledger. counts: samples per split.
    bytes: of all shards. duplicates: groups of keys whose content is the same. near: near-duplicates."""

    rejects: list[Reject]
    counts: dict[str, int]
    bytes: int
    duplicates: list[list[str]]
    near: Found


def finish_dataset(out: Path, shards: list[Shard], unusable: list[Reject], described: dict[str, Any]) -> Finished:
    """Write ledger, index, both lists of duplicates and dataset.json from the shards' markers.

    shards: all of the dataset, each finished. unusable: rejects of rows that are in no shard.
    described: dataset.json's record of the store, besides counts and hashes.
    Raises InputError if no shard has a sample.
    """
    rejects, entries = list(unusable), []
    content: dict[tuple, list[str]] = defaultdict(list)
    hashed = Hashed()
    planned: Counter[str] = Counter()
    shards = sorted(shards, key=lambda shard: (shard.split, shard.number))

    def groups() -> Iterator[list[dict[str, Any]]]:
        for shard in shards:
            marker = read_marker(out / f"{shard.name}.json")
            planned[shard.split] = max(planned[shard.split], shard.number + 1)
            rejects.extend(Reject(**reject) for reject in marker["rejects"])
            if not marker["count"]:
                continue
            facts = {name: marker[name] for name in ("count", "bytes", "sha256")}
            entries.append({"split": shard.split, "shard": shard.number, "path": f"{shard.name}.tar", **facts})
            for row in marker["rows"]:
                if row.get("content"):
                    content[tuple(row["content"])].append(row["key"])
                hashed.add(shard.split, row)
            yield marker["rows"]

    index = out / "index.parquet"
    # Everything is prepared before the first file is replaced, and dataset.json is written right
    # after the index that it describes.
    with replacing(index) as file:
        _write_index(file, groups())
        file.flush()
        made = Path(file.name)
        if not entries:
            raise _nothing_packed(out, shards, rejects)
        described = {
            **described,
            "planned": dict(planned),
            "index_sha256": sha256_of(made),
            "index_footer_sha256": footer_sha256(made),
        }
        rejects.sort(key=lambda r: (r.row, r.video or "", r.reason))
        write(out / "ledger.jsonl", b"".join(json_line(asdict(reject)) for reject in rejects))
        duplicates = [keys for keys in content.values() if len(keys) > 1]
        write(out / "duplicates.jsonl", b"".join(json_line(keys) for keys in duplicates))
        near = hashed.write(out)
    counts: Counter[str] = Counter()
    for entry in entries:
        counts[entry["split"]] += entry["count"]
    described |= {"counts": dict(counts), "rejected": len(rejects), "near_duplicates": asdict(near), "shards": entries}
    write(out / "dataset.json", json_line({"format": FORMAT, "version": VERSIONS[described["store"]], **described}))
    remove_leftovers(out)
    return Finished(rejects, dict(counts), sum(entry["bytes"] for entry in entries), duplicates, near)


def remove_leftovers(out: Path) -> None:
    """Remove temporary files of processes that have ended: of this machine those whose process is
    gone, of others those a day old."""
    if is_url(out):
        return  # `replacing` leaves none at a URL
    for path in out.rglob(".*.tmp"):
        ours, pid = temporary_owner(path)
        try:
            dead = not Path(f"/proc/{pid}").exists() if ours else time.time() - path.stat().st_mtime > DAY
            if dead:
                os.unlink(path)
        except FileNotFoundError:
            pass


def _nothing_packed(out: Path, shards: list[Shard], rejects: list[Reject]) -> InputError:
    """Keep the ledger, but no marker and no plan: the next run tries again."""
    rejects.sort(key=lambda reject: reject.row)
    write(out / "ledger.jsonl", b"".join(json_line(asdict(reject)) for reject in rejects))
    for shard in shards:
        (out / f"{shard.name}.json").unlink(missing_ok=True)
    for plan in out.glob(PLANS):
        plan.unlink(missing_ok=True)
    reasons = Counter(reject.reason for reject in rejects).most_common(1)
    cause = f"most common reason: {reasons[0][0]}" if reasons else "the manifest is empty"
    return InputError(f"{out}: nothing was packed; {cause}; see {out / 'ledger.jsonl'}")


def _write_index(file: BinaryIO, shards: Iterable[list[dict[str, Any]]]) -> None:
    """Write one row group per shard."""
    # Nothing searches by value, and statistics would swell a footer that every start reads.
    with pq.ParquetWriter(file, SCHEMA, compression="zstd", write_statistics=False, write_page_checksum=True) as writer:
        for rows in shards:
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA), len(rows))
