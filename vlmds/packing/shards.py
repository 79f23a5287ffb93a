"""One shard: its content, how it is written, and the marker of a finished one.

A shard's bytes depend only on its rows and the options. Its marker `{split}/{shard:06d}.json` is
written after the tar and contains all that the index needs: the tar need not be read again, and a
stopped run continues after its last finished shard.
"""

import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from vlmds.errors import InputError
from vlmds.files import replacing, write
from vlmds.packing.manifest import ManifestRow, Reject
from vlmds.packing.options import PackOptions
from vlmds.video.decode_work import VideoReply
from vlmds.video.sampling import SAMPLER, is_still

HASHED_VERSION = 2
"""A part of each shard's hash. Another number would keep packings that an older vlmds began from going on."""
MARKERS = "*/[0-9][0-9][0-9][0-9][0-9][0-9].json"


@dataclass(frozen=True)
class Shard:
    """A shard to write. options_hash: of all that its bytes depend on."""

    split: str
    number: int
    rows: list[ManifestRow] = field(repr=False)
    options_hash: str

    @property
    def name(self) -> str:
        return f"{self.split}/{self.number:06d}"


def options_hash(rows: list[ManifestRow], options: PackOptions) -> str:
    """Hash of all that the bytes of a shard of these rows depend on."""
    described = [asdict(row) for row in rows]
    for row in described:
        del row["video"]  # depends on where this machine mounts the manifest
        if row["kept"] is None:
            del row["kept"]
    effective = asdict(options)
    del effective["shard_size"], effective["shard_bytes"]  # the rows say it
    del effective["fit"]  # the resizer says it
    for name in ("image_size", "quality") if options.store == "video" else ("verify",):
        del effective[name]
    return hashlib.sha256(
        json_line(
            {
                "version": HASHED_VERSION,
                "sampler": SAMPLER,
                "resizer": options.resizer,
                "options": effective,
                "rows": described,
            }
        )
    ).hexdigest()


def unfinished(out: Path, shards: Iterable[Shard], base: dict[str, int], retry: bool = False) -> list[Shard]:
    """The shards without a valid marker.

    base: for each split, how many shards at its start belong to an earlier packing. retry: also
    those with rejected rows.
    Raises InputError if `out` contains other shards.
    """
    found = {f"{path.parent.name}/{path.stem}": path for path in out.glob(MARKERS)}
    todo, known = [], set()
    for shard in shards:
        marker = read_marker(found[shard.name]) if shard.name in found else None
        if marker is None or marker["options_hash"] == shard.options_hash:
            known.add(shard.name)
        tar = out / f"{shard.name}.tar"
        if not marker or marker["count"] and not _has_size(tar, marker["bytes"]) or retry and marker["rejects"]:
            todo.append(shard)
    for name in sorted(found.keys() - known):
        split, number = name.split("/")
        if int(number) >= base.get(split, 0):
            raise InputError(
                f"{out}: {name} was packed from another manifest or with other options; choose "
                "another folder, delete this one, or pack new rows with --append"
            )
    return todo


def read_marker(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        raise InputError(f"{path}: damaged; delete it to pack its shard again") from None


def write_shard(out: Path, shard: Shard, replies: Iterator[VideoReply]) -> None:
    """Write the shard's tar, unless it has no sample, and then its marker. Takes a reply for each
    of its rows.

    The marker's `inputs` are the rows' [id, key, source, start, end], also of rejected ones, for
    --append. Rows of a conversion (number 0) are not among them."""
    rejects, index_rows = [], []
    inputs = [[row.id, row.key, row.source, row.start, row.end] for row in shard.rows if row.row]
    tar, marker = out / f"{shard.name}.tar", out / f"{shard.name}.json"
    with replacing(tar) as file:
        writer = TarWriter(file)
        for row in shard.rows:
            reply = next(replies)
            if reply.reason is None:
                index_rows.append(_write_sample(writer, shard, row, reply))
            else:
                rejects.append(asdict(Reject(row.row, row.id, row.source, reply.reason, shard.split, shard.number)))
        writer.close()
        described = json_line(
            {
                "count": len(index_rows),
                "bytes": writer.offset if index_rows else 0,
                "sha256": writer.sha256.hexdigest() if index_rows else None,
                "options_hash": shard.options_hash,
                "rejects": rejects,
                "rows": index_rows,
                "inputs": inputs,
            }
        )
        # A marker with other bytes must be gone before the old tar is, wherever we are killed. One
        # with these bytes is of another process that has written the same shard.
        if marker.exists() and marker.read_bytes() != described:
            marker.unlink(missing_ok=True)
    if not index_rows:
        tar.unlink(missing_ok=True)  # another process may be at the same shard
    write(marker, described)


def json_line(value: Any) -> bytes:
    """One line of UTF-8 JSON with sorted keys."""
    return (json.dumps(value, ensure_ascii=False, sort_keys=True) + "\n").encode()


class TarWriter:
    """Writes a ustar archive whose bytes depend on names and contents alone."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.offset = 0
        self.sha256 = hashlib.sha256()

    def add(self, name: str, ext: str, data: bytes | memoryview) -> dict[str, Any]:
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

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.sha256.update(data)
        self.offset += len(data)


def _write_sample(writer: "TarWriter", shard: Shard, row: ManifestRow, reply: VideoReply) -> dict[str, Any]:
    """Append a sample's members and return its row of the index."""
    facts = dict(reply.facts)
    content = facts.pop("content", None)
    decoder = facts.pop("decoder")  # this machine's choice, not a property of the video
    timestamps, timing = facts.pop("timestamps", None), facts.pop("timing", None)
    facts.pop("still", None)  # of the store that is converted
    hashes = facts.pop("frame_hashes", None)
    # A file that was cut has a span of its own.
    start, end = facts.pop("start", row.start), facts.pop("end", row.end)
    optional: dict[str, Any] = {
        "prompt": row.prompt,
        "start": start,
        "end": end,
        "timestamps": timestamps,
        "timing": timing,
        "still": True if is_still(facts["frames"]) else None,  # shown as one frame
    }
    optional["columns"] = row.kept
    described = {
        "id": row.id,
        "captions": row.captions,
        "source": row.source,
        **facts,
        **{name: value for name, value in optional.items() if value is not None},
    }
    contents = {**reply.members, "json": json_line(described)}
    members = [writer.add(f"{row.key}.{ext}", ext, contents[ext]) for ext in sorted(contents)]
    return {
        "split": shard.split,
        "shard": shard.number,
        "key": row.key,
        "members": members,
        "num_captions": len(row.captions),
        **facts,
        "decoder": decoder,
        "start": start,
        "end": end,
        "status": "ok",
        "content": content and [content, row.start, row.end],
        **({} if hashes is None else {"source": row.source, "frame_hashes": hashes}),
    }


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
