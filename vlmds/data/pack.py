"""Pack a manifest's videos into WebDataset shards with an index (`vlmds pack`).

A shard's bytes depend only on the manifest, the options and the shard's number. Its marker
`{split}/{shard:06d}.json` is written after the tar and carries all that the index needs, so that
a stopped run goes on from its last finished shard.
"""

import hashlib
import json
import os
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from vlmds.data.decode_child import DecodePool, Reply, Request
from vlmds.data.index import FORMAT, SCHEMA, VERSION, footer_sha256
from vlmds.data.manifest import ManifestRow, Reject, read_manifest
from vlmds.data.video import RESIZER, SAMPLER
from vlmds.errors import InputError
from vlmds.files import replacing, sha256_of, write

STORES = ("video", "frames")


@dataclass(frozen=True)
class PackOptions:
    """All that, with the manifest, decides the bytes of a dataset."""

    store: str = "video"
    num_frames: int = 8
    image_size: int = 336
    quality: int = 95
    shard_size: int = 256
    verify: bool = True

    def __post_init__(self) -> None:
        if self.store not in STORES:
            raise InputError(f"store: {self.store!r} is not one of {', '.join(STORES)}")
        for name in ("num_frames", "image_size", "shard_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is less than 1")
        if not 1 <= self.quality <= 100:
            raise InputError(f"quality: {self.quality} is not in 1 … 100")


@dataclass(frozen=True)
class PackSummary:
    """What `pack` did. rejected: rows by the fixed phrase their reason starts with."""

    counts: dict[str, int]
    rejected: dict[str, int]
    ignored_columns: list[str]
    shards: int
    kept_shards: int
    bytes: int
    seconds: float

    @property
    def packed(self) -> int:
        return sum(self.counts.values())


@dataclass(frozen=True)
class _Shard:
    split: str
    number: int
    rows: list[ManifestRow] = field(repr=False)
    options_hash: str

    @property
    def name(self) -> str:
        return f"{self.split}/{self.number:06d}"


def pack(
    manifest: str | Path,
    out: str | Path,
    *,
    store: str = "video",
    num_frames: int = 8,
    image_size: int = 336,
    quality: int = 95,
    shard_size: int = 256,
    val_fraction: float = 0.0,
    verify: bool = True,
    workers: int | None = None,
    deadline: float = 60.0,
    progress: bool = True,
) -> PackSummary:
    """Pack the manifest's videos into `out`, and go on where an earlier run was stopped.

    store: "video" keeps the files' bytes; "frames" keeps `num_frames` JPEGs of `image_size`
    pixels squared at `quality`. shard_size: manifest rows per shard. verify: decode the sampled
    frames of a video store too, so that damage is found now and not in training.
    workers: decoding processes (default: one per core). deadline: seconds a video may take.

    Rows that cannot be packed go to ledger.jsonl. Raises InputError if nothing was packed, if the
    manifest cannot be read, or if `out` holds a dataset of another manifest or other options.
    """
    begin = time.monotonic()
    options = PackOptions(store, num_frames, image_size, quality, shard_size, verify)
    table = read_manifest(manifest, val_fraction)
    shards = _plan(table.rows, options)
    out = Path(out)
    todo = _unfinished(out, shards)

    rows = sum(len(shard.rows) for shard in todo)
    lanes = min(workers or len(os.sched_getaffinity(0)), max(rows, 1))
    requests = (_request(row, options) for shard in todo for row in shard.rows)
    with (
        DecodePool(lanes, deadline) as pool,
        tqdm(total=rows, desc="pack", unit="video", disable=not progress) as bar,
    ):
        replies = _shown(pool.map(requests), bar)
        for shard in todo:
            _write_shard(out, shard, replies)

    rejects, counts, size = _finish(out, shards, table.rejects, _described(options))
    return PackSummary(
        counts, dict(Counter(r.reason.split(":")[0] for r in rejects).most_common()),
        table.ignored_columns, len(shards), len(shards) - len(todo), size,
        time.monotonic() - begin)


def _plan(rows: list[ManifestRow], options: PackOptions) -> list[_Shard]:
    """All shards in order of (split, number); which rows a shard has never depends on rejects."""
    splits: dict[str, list[ManifestRow]] = {}
    for row in rows:
        splits.setdefault(row.split, []).append(row)
    shards = []
    for split, members in sorted(splits.items()):
        for begin in range(0, len(members), options.shard_size):
            part = members[begin:begin + options.shard_size]
            shards.append(_Shard(split, begin // options.shard_size, part, _hash(part, options)))
    return shards


def _hash(rows: list[ManifestRow], options: PackOptions) -> str:
    described = [asdict(row) for row in rows]
    for row in described:
        del row["video"]  # depends on where this machine mounts the manifest
    effective = asdict(options)
    for name in ("image_size", "quality") if options.store == "video" else ("verify",):
        del effective[name]
    return hashlib.sha256(_json({
        "version": VERSION, "sampler": SAMPLER, "resizer": RESIZER, "options": effective,
        "rows": described})).hexdigest()


def _unfinished(out: Path, shards: list[_Shard]) -> list[_Shard]:
    """The shards without a valid marker. Raises InputError if `out` is another dataset's."""
    markers = {p.relative_to(out).with_suffix("").as_posix(): p
               for p in out.glob("*/[0-9][0-9][0-9][0-9][0-9][0-9].json")}
    planned = {shard.name for shard in shards}
    todo = []
    for shard in shards:
        marker = _read_marker(markers[shard.name]) if shard.name in markers else None
        if marker and marker["options_hash"] != shard.options_hash:
            planned.discard(shard.name)
        tar = out / f"{shard.name}.tar"
        if not marker or marker["count"] and not _has_size(tar, marker["bytes"]):
            todo.append(shard)
    if foreign := sorted(markers.keys() - planned):
        raise InputError(
            f"{out}: {foreign[0]} was packed from another manifest or with other options; "
            "choose another folder or delete this one")
    return todo


def _read_marker(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        raise InputError(f"{path}: damaged; delete it to pack its shard again") from None


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _request(row: ManifestRow, options: PackOptions) -> Request:
    return Request(row.video, row.start, row.end, options.store, options.num_frames,
                   options.image_size, options.quality, options.verify)


def _shown(replies: Iterable[Reply], bar: tqdm) -> Iterator[Reply]:
    """The same replies, with the progress bar moved along."""
    rejected = 0
    for reply in replies:
        rejected += reply.reason is not None
        bar.set_postfix(rejects=rejected, refresh=False)
        bar.update()
        yield reply


def _write_shard(out: Path, shard: _Shard, replies: Iterator[Reply]) -> None:
    """Write the shard's tar, unless it has no sample, and then its marker."""
    rejects, index_rows = [], []
    tar = out / f"{shard.name}.tar"
    with replacing(tar) as file:
        writer = _TarWriter(file)
        for row in shard.rows:
            reply = next(replies)
            if reply.reason is None:
                index_rows.append(_write_sample(writer, shard, row, reply))
            else:
                rejects.append(asdict(Reject(
                    row.row, row.id, row.source, reply.reason, shard.split, shard.number)))
        writer.close()
    if not index_rows:
        tar.unlink()
    marker = {
        "count": len(index_rows), "bytes": writer.offset if index_rows else 0,
        "sha256": writer.sha256.hexdigest() if index_rows else None,
        "options_hash": shard.options_hash, "rejects": rejects, "rows": index_rows,
    }
    write(out / f"{shard.name}.json", _json(marker))


def _write_sample(
    writer: "_TarWriter", shard: _Shard, row: ManifestRow, reply: Reply
) -> dict[str, Any]:
    """Append a sample's members and return its row of the index."""
    facts = dict(reply.facts)
    decoder = facts.pop("decoder")  # this machine's choice, not a property of the video
    timestamps = facts.pop("timestamps", None)
    # In a video store the span is that of the file as stored.
    span = {"start": facts.pop("start", row.start), "end": facts.pop("end", row.end)}
    optional = {"prompt": row.prompt, **span, "timestamps": timestamps}
    described = {"id": row.id, "captions": row.captions, "source": row.source, **facts,
                 **{name: value for name, value in optional.items() if value is not None}}
    contents = {**reply.members, "json": _json(described)}
    members = [writer.add(f"{row.key}.{ext}", ext, contents[ext]) for ext in sorted(contents)]
    return {"split": shard.split, "shard": shard.number, "key": row.key, "members": members,
            "num_captions": len(row.captions), **facts, "decoder": decoder,
            **span, "status": "ok"}


class _TarWriter:
    """Writes a ustar archive whose bytes depend on names and contents alone."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.offset = 0
        self.sha256 = hashlib.sha256()

    def add(self, name: str, ext: str, data: bytes) -> dict[str, Any]:
        """Append a file; returns {ext, offset, size, crc32} with the offset of its data."""
        info = tarfile.TarInfo(name)  # mode 0644, mtime, uid and gid 0
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self.offset
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return {"ext": ext, "offset": offset, "size": len(data), "crc32": zlib.crc32(data)}

    def close(self) -> None:
        """Append the end of the archive."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self.offset % tarfile.RECORDSIZE))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.sha256.update(data)
        self.offset += len(data)


def _finish(
    out: Path, shards: list[_Shard], unusable: list[Reject], described: dict[str, Any]
) -> tuple[list[Reject], dict[str, int], int]:
    """Write ledger, index and dataset.json from the markers.

    described: what dataset.json says of the store, beside counts and hashes.
    Returns all rejects, samples per split, and bytes of all shards.
    """
    markers = [_read_marker(out / f"{shard.name}.json") for shard in shards]
    rejects = unusable + [Reject(**r) for marker in markers for r in marker["rejects"]]
    rejects.sort(key=lambda reject: reject.row)
    write(out / "ledger.jsonl", b"".join(_json(asdict(reject)) for reject in rejects))
    entries = [
        {"split": shard.split, "shard": shard.number, "path": f"{shard.name}.tar",
         "count": marker["count"], "bytes": marker["bytes"], "sha256": marker["sha256"]}
        for shard, marker in zip(shards, markers) if marker["count"]]
    if not entries:
        for shard in shards:  # so that the next run tries again
            (out / f"{shard.name}.json").unlink()
        reasons = Counter(reject.reason for reject in rejects).most_common(1)
        cause = f"most common reason: {reasons[0][0]}" if reasons else "the manifest is empty"
        raise InputError(f"{out}: nothing was packed; {cause}; see {out / 'ledger.jsonl'}")

    index_sha256 = _write_index(out / "index.parquet", [m["rows"] for m in markers if m["rows"]])
    counts: Counter[str] = Counter()
    for entry in entries:
        counts[entry["split"]] += entry["count"]
    write(out / "dataset.json", _json({
        "format": FORMAT, "version": VERSION, **described, "counts": dict(counts),
        "rejected": len(rejects), "index_sha256": index_sha256,
        "index_footer_sha256": footer_sha256(out / "index.parquet"),
        "shards": entries}))
    for leftover in out.rglob(".*.tmp"):  # of runs that were killed
        leftover.unlink()
    return rejects, dict(counts), sum(entry["bytes"] for entry in entries)


def _described(options: PackOptions) -> dict[str, Any]:
    """What dataset.json says of the store."""
    frames = options.store == "frames"
    return {
        "store": options.store, "sampler": SAMPLER, "resizer": RESIZER,
        "num_frames": options.num_frames if frames else None,
        "image_size": options.image_size if frames else None,
        "quality": options.quality if frames else None, "shard_size": options.shard_size}


def _write_index(path: Path, shards: list[list[dict[str, Any]]]) -> str:
    """Write one row group per shard and return the file's sha256."""
    # Nothing searches by value, and statistics would swell a footer that every start reads.
    with (
        replacing(path) as file,
        pq.ParquetWriter(file, SCHEMA, compression="zstd", write_statistics=False,
                         write_page_checksum=True) as writer,
    ):
        for rows in shards:
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA), len(rows))
    return sha256_of(path)


def _json(value: Any) -> bytes:
    """One line of UTF-8 JSON with sorted keys."""
    return (json.dumps(value, ensure_ascii=False, sort_keys=True) + "\n").encode()
