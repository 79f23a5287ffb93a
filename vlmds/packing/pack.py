"""Pack a manifest's videos into WebDataset shards with an index (`vlmds pack`).

Which rows a shard has, and with which bytes, follows from the manifest and the options alone: so any
number of processes and machines can share the work, stop and start again at any time, and the
result is the same to the byte. `shard_plan.py` says which rows make a shard, `shards.py` writes it,
`finish.py` makes a dataset of them.
"""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmds.console.progress import phase, silenced
from vlmds.console.text import counted
from vlmds.errors import InputError
from vlmds.files import as_path, check_writable, driver_advice, is_url
from vlmds.packing.finish import Base, Finished, finish
from vlmds.packing.local import pack_here
from vlmds.packing.manifest import ManifestRow, Reject, read_manifest
from vlmds.packing.on_ray import pack_on_ray
from vlmds.packing.shard_plan import facts_of, shards_of, without_duplicates
from vlmds.packing.shards import PackOptions, Shard, unfinished


@dataclass(frozen=True)
class PackSummary:
    """What `pack` did. rejected: rows by the fixed phrase their reason starts with. duplicates:
    groups of samples with the same content. known: rows that --append found packed or rejected
    already. finished: false for one task of several."""

    counts: dict[str, int]
    rejected: dict[str, int]
    ignored_columns: list[str]
    shards: int
    kept_shards: int
    bytes: int
    seconds: float
    duplicates: int = 0
    known: int = 0
    finished: bool = True

    @property
    def packed(self) -> int:
        return sum(self.counts.values())


@dataclass(frozen=True)
class Work:
    """What there is to do. shards: all that the manifest makes; todo: those not finished yet.
    unusable: rows that are in no shard. base: what is there already, to append to; known: rows
    that it has."""

    shards: list[Shard]
    todo: list[Shard]
    unusable: list[Reject]
    ignored_columns: list[str]
    base: Base | None
    known: int


def pack(
    manifest: str | Path,
    out: str | Path,
    *,
    val_fraction: float = 0.0,
    dedup: bool = False,
    append: bool = False,
    merge: bool = False,
    retry: bool = False,
    task: tuple[int, int] | None = None,
    engine: str = "local",
    workers: int | None = None,
    deadline: float = 60.0,
    progress: bool = True,
    **options: Any,
) -> PackSummary:
    """Pack the manifest's videos into `out`, and go on where an earlier run was stopped.

    manifest, out: paths or URLs. val_fraction: share of the rows without a split that go to "val".
    dedup: leave out rows whose video and span an earlier row has. append: add the rows that are new
    (their source or span, as written), or were corrected in the manifest, as shards after those
    there. retry: pack the shards again that had to reject rows (not those that `append` finds
    there), as their files are repaired or `deadline` is longer. task: (i, n) packs only the ith of
    n parts and leaves it to `merge`, which packs nothing, to make the dataset. engine: "ray" packs
    on a Ray cluster. workers: decoding processes, or Ray tasks at once (default: one per core). deadline:
    seconds a video may take. progress: say on stderr how far it is. options: fields of
    :class:`PackOptions`.

    Rows that cannot be packed go to ledger.jsonl. Raises InputError if nothing was packed, if the
    manifest cannot be read, or if `out` holds a dataset of another manifest or other options.
    """
    with silenced(not progress):
        return _pack(
            as_path(manifest),
            as_path(out),
            PackOptions(**options),
            val_fraction,
            dedup,
            append,
            merge,
            retry,
            task,
            engine,
            workers,
            deadline,
        )


def _pack(
    manifest: Path,
    out: Path,
    options: PackOptions,
    val_fraction: float,
    dedup: bool,
    append: bool,
    merge: bool,
    retry: bool,
    task: tuple[int, int] | None,
    engine: str,
    workers: int | None,
    deadline: float,
) -> PackSummary:
    begin = time.monotonic()
    if not is_url(out):
        check_writable(out, "OUT")
    with phase("reading the manifest"):
        work = _plan(manifest, out, options, val_fraction, dedup, append, retry)
    if merge and work.todo:
        names = ", ".join(shard.name for shard in work.todo[:3])
        more = " …" if len(work.todo) > 3 else ""
        raise InputError(
            f"{out}: not packed yet: {len(work.todo)} of "
            f"{counted(len(work.shards), 'shard')} ({names}{more}); run the tasks "
            "that make them, or vlmds pack without --merge"
        )
    todo = work.todo
    if task is not None:
        index, tasks = task
        mine = {shard.name for shard in work.shards[index::tasks]}
        todo = [shard for shard in todo if shard.name in mine]
    packers = {"local": pack_here, "ray": pack_on_ray}
    packers[engine](out, todo, options, workers, deadline)
    if task is not None:
        return PackSummary(
            {}, {}, work.ignored_columns, len(mine), len(mine) - len(todo), 0, time.monotonic() - begin, finished=False
        )
    with phase("writing the index"):
        done = _finish(out, work, options)
    reasons = Counter(reject.reason.split(":")[0] for reject in done.rejects)
    return PackSummary(
        done.counts,
        dict(reasons.most_common()),
        work.ignored_columns,
        len(work.shards),
        len(work.shards) - len(todo),
        done.bytes,
        time.monotonic() - begin,
        len(done.duplicates),
        work.known,
    )


def _plan(
    manifest: Path, out: Path, options: PackOptions, val_fraction: float, dedup: bool, append: bool, retry: bool
) -> Work:
    base = Base.read(out) if append else None
    if base is not None:
        _check_same_options(out, base, options)
    table = read_manifest(manifest, val_fraction, known=base.known if base else None)
    rows, unusable = table.rows, list(table.rejects)
    if base is not None:
        rows = [row for row in rows if not base.has(row)]
        unusable += base.still_unusable(table)
    known = len(table.rows) - len(rows)
    _check_drivers(rows)
    packed = base.contents if base else {}
    facts = facts_of(out, rows, options, dedup, packed)
    if dedup:
        rows, dropped = without_duplicates(rows, facts, packed)
        unusable += dropped
    shards = shards_of(rows, options, facts, base.planned if base else {})
    todo = unfinished(out, shards, base.planned if base else {}, retry)
    return Work(shards, todo, unusable, table.ignored_columns, base, known)


def _check_drivers(rows: list[ManifestRow]) -> None:
    """Raise InputError if a driver for the rows' URLs is not installed: no row is to be rejected
    for that. (A protocol that nobody knows is a mistake in the row.)"""
    for url in {row.video.partition("://")[0]: row.video for row in rows if is_url(row.video)}.values():
        if advice := driver_advice(url):
            raise InputError(f"{url}: {advice}")


def _finish(out: Path, work: Work, options: PackOptions) -> Finished:
    before = work.base.shards(out) if work.base else []
    return finish(out, before + work.shards, work.unusable, options.described())


def _check_same_options(out: Path, base: Base, options: PackOptions) -> None:
    for name, value in options.described().items():
        if base.described.get(name) != value:
            raise InputError(
                f"{out}: was packed with {name} {base.described.get(name)!r}, not "
                f"{value!r}; append with the same options, or pack into another folder"
            )
