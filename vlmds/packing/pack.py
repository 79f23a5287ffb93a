"""Packing of a manifest's videos into WebDataset shards with an index (`vlmds pack`).

The rows of a shard, and its bytes, follow from the manifest and the options alone: any number of
processes and machines can share the work, stop and continue at any time, and the result is the same
to the byte. `shard_plan.py` decides which rows make a shard, `shards.py` writes it, `finish.py`
makes the dataset.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmds.console.progress import phase, silenced
from vlmds.console.text import counted
from vlmds.errors import InputError
from vlmds.experiments.defaults import DECODE_SECONDS
from vlmds.files import as_path, driver_advice, is_url
from vlmds.packing.finish import Base, Finished, finish_dataset
from vlmds.packing.local import pack_here
from vlmds.packing.long_captions import CutCaptions
from vlmds.packing.manifest import Manifest, ManifestRow, Reject, read_manifest
from vlmds.packing.on_ray import pack_on_ray
from vlmds.packing.options import PackOptions
from vlmds.packing.shard_plan import shards_of, without_duplicates
from vlmds.packing.shards import Shard, unfinished
from vlmds.packing.split import with_val
from vlmds.packing.video_facts import facts_of
from vlmds.permissions import check_writable
from vlmds.video.fit import fit_of


@dataclass(frozen=True)
class PackSummary:
    """The result of `pack`. rejected: rows by the fixed phrase their reason starts with. duplicates:
    groups of samples with the same content. near_duplicates: pairs of source videos that look the
    same; leaks: those of them in train and another split. known: rows that --append found packed or rejected
    already. finished: false for one task of several. notes: lines for the user."""

    counts: dict[str, int]
    rejected: dict[str, int]
    ignored_columns: list[str]
    shards: int
    kept_shards: int
    bytes: int
    seconds: float
    duplicates: int = 0
    near_duplicates: int = 0
    leaks: int = 0
    known: int = 0
    finished: bool = True
    notes: tuple[str, ...] = ()

    @property
    def packed(self) -> int:
        return sum(self.counts.values())


@dataclass(frozen=True)
class PackPlan:
    """The work of a packing. shards: all that the manifest makes; todo: those not finished yet.
    unusable: rows that are in no shard. base: the dataset to append to; known: rows that it has.
    notes: lines for the user."""

    shards: list[Shard]
    todo: list[Shard]
    unusable: list[Reject]
    ignored_columns: list[str]
    base: Base | None
    known: int
    notes: list[str]


def pack(
    manifest: str | Path,
    out: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    keep_columns: Sequence[str] = (),
    val_fraction: float = 0.0,
    dedup: bool = False,
    tokenizer: str | None = None,
    max_caption_tokens: int | None = None,
    append: bool = False,
    finish: bool = False,
    merge: bool = False,
    retry: bool = False,
    task: tuple[int, int] | None = None,
    engine: str = "local",
    workers: int | None = None,
    deadline: float = DECODE_SECONDS,
    progress: bool = True,
    **options: Any,
) -> PackSummary:
    """Pack the manifest's videos into `out`, continuing an earlier run that was stopped.

    manifest, out: paths or URLs. columns: manifest column -> the file's, where they differ.
    keep_columns: columns of the file that travel in each sample's JSON, under "columns".
    val_fraction: share of the source videos whose rows without a split go to "val". dedup: leave out
    rows whose video and span an earlier row has. tokenizer, max_caption_tokens: count the captions
    that training would cut (see :class:`CutCaptions`). append: add the rows that are new (by source
    and span, as written), or were corrected in the manifest, as further shards. retry: pack the
    shards with rejected rows again (not those that `append` found), once their files are repaired or
    `deadline` is longer. task: (i, n) packs only the ith of n parts; `finish`, which packs nothing,
    then makes the dataset (`merge` is its former name). engine: "ray" packs on a Ray cluster.
    workers: decoding processes, or Ray tasks at once (default: one per core). deadline: seconds a
    video may take. progress: report it on stderr. options: fields of :class:`PackOptions`.

    Rows that cannot be packed go to ledger.jsonl. Raises InputError if nothing was packed, if the
    manifest cannot be read, or if `out` contains a dataset of another manifest or other options.
    """
    begin = time.monotonic()
    out, settings = as_path(out), PackOptions(**options)
    if not is_url(out):
        check_writable(out, "OUT")
    with silenced(not progress):
        with phase("reading the manifest"):
            base = Base.read(out) if append else None
            table = read_manifest(manifest, known=base.known if base else None, columns=columns, keep=keep_columns)
            cut = CutCaptions(tokenizer, max_caption_tokens)
            for row in table.rows:
                cut.add(row.captions, row.row)
            plan = _plan(table, out, settings, base, val_fraction, dedup, retry)
        if (finish or merge) and plan.todo:
            raise _not_packed(out, plan)
        todo = plan.todo
        if task is not None:
            index, tasks = task
            mine = {shard.name for shard in plan.shards[index::tasks]}
            todo = [shard for shard in todo if shard.name in mine]
        packers = {"local": pack_here, "ray": pack_on_ray}
        packers[engine](out, todo, settings, workers, deadline)
        if task is not None:
            seconds = time.monotonic() - begin
            return PackSummary(
                {}, {}, plan.ignored_columns, len(mine), len(mine) - len(todo), 0, seconds, finished=False
            )
        with phase("writing the index"):
            done = _finish(out, plan, settings)
    return _summary(plan, done, len(plan.shards) - len(todo), time.monotonic() - begin, cut)


def _summary(plan: PackPlan, done: Finished, kept: int, seconds: float, cut: CutCaptions) -> PackSummary:
    reasons = Counter(reject.reason.split(":")[0] for reject in done.rejects)
    return PackSummary(
        done.counts,
        dict(reasons.most_common()),
        plan.ignored_columns,
        len(plan.shards),
        kept,
        done.bytes,
        seconds,
        len(done.duplicates),
        done.near.pairs,
        done.near.leaks,
        plan.known,
        notes=(*plan.notes, *cut.notes()),
    )


def _not_packed(out: Path, plan: PackPlan) -> InputError:
    names = ", ".join(shard.name for shard in plan.todo[:3])
    more = " …" if len(plan.todo) > 3 else ""
    return InputError(
        f"--finish: {out}: not packed yet: {len(plan.todo)} of "
        f"{counted(len(plan.shards), 'shard')} ({names}{more}); run the tasks "
        "that make them, or vlmds pack without --finish"
    )


def _plan(
    table: Manifest, out: Path, options: PackOptions, base: Base | None, val_fraction: float, dedup: bool, retry: bool
) -> PackPlan:
    if base is not None:
        _check_same_options(out, base, options)
    rows, unusable = table.rows, list(table.rejects)
    if base is not None:
        rows = [row for row in rows if not base.has(row)]
        unusable += base.still_unusable(table)
    known = len(table.rows) - len(rows)
    _check_drivers(rows)
    rows, notes = with_val(out, rows, table.undecided, val_fraction, base.splits if base else {})
    packed = base.contents if base else {}
    facts = facts_of(out, rows, options, dedup, packed)
    if dedup:
        rows, dropped = without_duplicates(rows, facts, packed)
        unusable += dropped
    shards = shards_of(rows, options, facts, base.planned if base else {})
    todo = unfinished(out, shards, base.planned if base else {}, retry)
    return PackPlan(shards, todo, unusable, table.ignored_columns, base, known, [*table.notes, *notes])


def _check_drivers(rows: list[ManifestRow]) -> None:
    """Raise InputError if the driver of a row's URL is not installed: that is no reason to reject
    rows. (An unknown protocol is a mistake in the row.)"""
    for url in {row.video.partition("://")[0]: row.video for row in rows if is_url(row.video)}.values():
        if advice := driver_advice(url):
            raise InputError(f"{url}: {advice}")


def _finish(out: Path, plan: PackPlan, options: PackOptions) -> Finished:
    before = plan.base.shards(out) if plan.base else []
    return finish_dataset(out, before + plan.shards, plan.unusable, options.described())


def _check_same_options(out: Path, base: Base, options: PackOptions) -> None:
    for name, value in options.described().items():
        recorded = base.described.get(name)
        if recorded != value:
            if name == "resizer":
                name, recorded, value = "fit", fit_of(recorded) or recorded, options.fit
            raise InputError(
                f"{out}: was packed with {name} {recorded!r}, not {value!r}; append with the same "
                "options, or pack into another folder"
            )
