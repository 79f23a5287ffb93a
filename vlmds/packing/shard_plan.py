"""The plan of the shards: which rows each has. It follows from the manifest, the options, and the recorded
sizes and hashes of videos (`video_facts`)."""

from collections import defaultdict
from collections.abc import Iterator

from vlmds.packing.manifest import ManifestRow, Reject
from vlmds.packing.options import PackOptions
from vlmds.packing.shards import Shard, options_hash
from vlmds.packing.video_facts import Facts


def shards_of(rows: list[ManifestRow], options: PackOptions, facts: Facts, taken: dict[str, int]) -> list[Shard]:
    """All shards in order of (split, number); which rows a shard has never depends on rejects.

    taken: for each split, how many numbers belong to shards that are there already.
    """
    splits: dict[str, list[ManifestRow]] = defaultdict(list)
    for row in rows:
        splits[row.split].append(row)
    shards = []
    for split, members in sorted(splits.items()):
        number = taken.get(split, 0)
        for part in _cut(members, options, facts):
            shards.append(Shard(split, number, part, options_hash(part, options)))
            number += 1
    return shards


def _cut(rows: list[ManifestRow], options: PackOptions, facts: Facts) -> Iterator[list[ManifestRow]]:
    """The rows of a split in parts of at most shard_size rows and shard_bytes bytes of videos (but
    at least one row)."""
    part: list[ManifestRow] = []
    total = 0
    for row in rows:
        size = facts[row.row][0] if options.shard_bytes else 0
        full = len(part) == options.shard_size or (
            options.shard_bytes is not None and total + size > options.shard_bytes
        )
        if part and full:
            yield part
            part, total = [], 0
        part.append(row)
        total += size
    if part:
        yield part


def without_duplicates(
    rows: list[ManifestRow], facts: Facts, packed: dict[tuple, str]
) -> tuple[list[ManifestRow], list[Reject]]:
    """The rows but those whose video, byte for byte, and span an earlier row or one of the `packed`
    samples has, and the ledger's records of those.

    packed: (sha256, start, end) of a sample's video -> its key.
    """
    first = dict(packed)  # content and span -> who has it
    kept, dropped = [], []
    for row in rows:
        digest = facts[row.row][1]
        content = (digest, row.start, row.end)
        if digest is not None and content in first:
            dropped.append(
                Reject(row.row, row.id, row.source, f"duplicate content: the same as {first[content]!r}", row.split)
            )
        else:
            kept.append(row)
            if digest is not None:
                first[content] = row.id
    return kept, dropped
