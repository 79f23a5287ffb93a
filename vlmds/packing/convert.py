"""Conversion of one store to another: video -> frames, video -> features, frames -> features.

A conversion keeps splits, shard numbers, keys, order and captions: training and validation read the
same samples in the same order. A shard of the result is a pure function of the source's shard and
the options, and has the marker that `vlmds pack` writes: a stopped conversion continues after its
last finished shard. Frames made here are byte for byte those of packing the videos with
`--store frames`.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vlmds.console.progress import phase, silenced
from vlmds.console.text import counted
from vlmds.data.alike import CONVERSIONS, sampling_of
from vlmds.data.features import EXTENSION, describe_tower, encode_features
from vlmds.data.index import SampleRow, ShardIndex
from vlmds.data.shard_reader import ShardInfo
from vlmds.data.stored import decode_stored, pixels_of, read_jpegs
from vlmds.errors import InputError, SampleError
from vlmds.experiments.defaults import DECODE_SECONDS
from vlmds.files import as_path, is_url
from vlmds.packing.finish import finish_dataset
from vlmds.packing.local import counting
from vlmds.packing.manifest import ManifestRow, Reject
from vlmds.packing.options import PackOptions
from vlmds.packing.pack import PackSummary
from vlmds.packing.shards import HASHED_VERSION, Shard, json_line, unfinished, write_shard
from vlmds.permissions import check_writable
from vlmds.video.decode_work import VideoReply
from vlmds.video.fit import FIT, fit_of
from vlmds.video.pool import DecodePool
from vlmds.video.sampling import is_still, kept_frames

if TYPE_CHECKING:
    from vlmds.models.vision import VisionTower

FACTS = ("frames", "fps", "duration", "width", "height", "codec", "rotation", "decoder")
# Of a description: the manifest's values, and what is true of the video store's file alone.
ROW = ("id", "captions", "source", "prompt", "start", "end", "timing", "columns")


@dataclass(frozen=True)
class Conversion:
    """The store to make. vision: dataset.json's record of the tower, for a features store."""

    store: str
    num_frames: int
    image_size: int
    quality: int | None = None
    vision: dict[str, Any] | None = None
    fit: str = FIT

    def described(self) -> dict[str, Any]:
        """The values by name; the fit has another name in a dataset (`sampling_of`)."""
        described = asdict(self)
        del described["fit"]
        return described


@dataclass(frozen=True)
class _OldShard:
    """A shard to convert, at `position` in its split's list."""

    position: int
    info: ShardInfo

    def rows(self, index: ShardIndex) -> Iterator[SampleRow]:
        return (index.row(self.info.split, self.position, i) for i in range(self.info.count))


def convert(
    source: str | Path,
    out: str | Path,
    *,
    store: str,
    num_frames: int | None = None,
    image_size: int | None = None,
    quality: int = PackOptions.quality,
    fit: str | None = None,
    tower: VisionTower | None = None,
    tower_name: str | None = None,
    workers: int | None = None,
    deadline: float = DECODE_SECONDS,
    task: tuple[int, int] | None = None,
    finish: bool = False,
    merge: bool = False,
    progress: bool = True,
) -> PackSummary:
    """Convert the packed dataset `source` to another store in `out`, continuing a conversion that
    was stopped.

    num_frames, image_size, quality, fit: of frames made from videos (default: 8, the tower's size or
    336, 95, pad); a frames store already has its own. tower, tower_name: what makes the features.
    workers, deadline: as for packing. task: (i, n) makes only the ith of n parts; when all are
    done, a last call without it finds the shards and writes the index. finish: convert nothing; a
    missing shard is an InputError. merge: the former name of finish.

    Samples that cannot be converted go to ledger.jsonl, with row 0, as a shard does not record the
    manifest's row numbers; the source's own ledger is copied there too. Raises InputError for a
    conversion that is not possible, a damaged source, or an `out` that contains something else.
    """
    begin = time.monotonic()
    index, out = ShardIndex.open(source), as_path(out)
    if not is_url(out):
        check_writable(out, "OUT")
    target = _conversion(index, store, num_frames, image_size, quality, fit, tower, tower_name)
    old = [_OldShard(position, info) for split in index.splits for position, info in enumerate(index.shards(split))]
    shards = [_shard(index, each.info, target) for each in old]
    todo = {shard.name for shard in unfinished(out, shards, {})}
    if (finish or merge) and todo:
        raise InputError(
            f"--finish: {out}: not converted yet: {len(todo)} of "
            f"{counted(len(shards), 'shard')}, {min(todo)} among them; run the tasks "
            "that make them"
        )
    pending = [pair for pair in list(zip(shards, old))[_part(task)] if pair[0].name in todo]
    with silenced(not progress):
        _write_shards(out, index, pending, target, tower, workers, deadline)
    if task is not None:
        mine = shards[_part(task)]
        seconds = time.monotonic() - begin
        return PackSummary({}, {}, [], len(mine), len(mine) - len(pending), 0, seconds, finished=False)
    before = _ledger(index.root)
    with silenced(not progress), phase("writing the index"):
        done = finish_dataset(out, shards, before, _described(index, target))
    new = Counter(r.reason.split(":")[0] for r in set(done.rejects) - set(before))
    kept = len(shards) - len(todo)
    return PackSummary(
        done.counts, dict(new.most_common()), [], len(shards), kept, done.bytes, time.monotonic() - begin
    )


def _write_shards(
    out: Path,
    index: ShardIndex,
    pending: list[tuple[Shard, _OldShard]],
    target: Conversion,
    tower: VisionTower | None,
    workers: int | None,
    deadline: float,
) -> None:
    """Convert and write these shards, each checked against its sha256 first."""
    total = sum(old.info.count for _, old in pending)
    workers = max(1, min(workers or len(os.sched_getaffinity(0)), total))
    with (
        DecodePool(workers, deadline) as pool,
        phase(f"converting to {target.store}", total, "samples", left=True) as shown,
    ):
        made = _made(index, [old for _, old in pending], target, tower, pool, workers)
        for shard, old in pending:
            index.verify([old.info], "sha256")
            described = [(row, _description(index, row)) for row in old.rows(index)]
            replies = _with_facts(islice(made, old.info.count), [found for _, found in described])
            shard = replace(shard, rows=[_manifest_row(row, found) for row, found in described])
            write_shard(out, shard, counting(replies, shown))


def _part(task: tuple[int, int] | None) -> slice:
    """A task's share of the shards."""
    return slice(None) if task is None else slice(task[0], None, task[1])


def convert_from_options(
    source: str | Path,
    out: str | Path,
    store: str,
    *,
    vision: str | None,
    feature_layer: int,
    pool: int,
    **options: Any,
) -> PackSummary:
    """:func:`convert` with the tower that the options name: in bfloat16 on a GPU, as in training,
    in float32 on a CPU. options: as for :func:`convert`."""
    from vlmds.experiments.schema import VisionConfig
    from vlmds.models.hub import is_local
    from vlmds.models.vision import load_vision_tower

    if store != "features":
        for name, value, default in (("vision", vision, None), ("pool", pool, 1), ("feature-layer", feature_layer, -1)):
            if value != default:
                raise InputError(f"--{name}: only --store features has a vision model")
        return convert(source, out, store=store, **options)
    tower = None
    if vision is not None:
        if pool < 1:
            raise InputError(f"--pool: {pool} is less than 1")
        name, _, revision = (vision, "", "") if is_local(vision) else vision.partition("@")
        config = VisionConfig.model_validate(
            {"model": name, "revision": revision or None, "feature_layer": feature_layer, "pool": pool}
        )
        cuda = torch.cuda.is_available()
        tower = load_vision_tower(
            config, torch.bfloat16 if cuda else torch.float32, torch.device("cuda:0" if cuda else "cpu")
        )
    return convert(source, out, store=store, tower=tower, tower_name=vision, **options)


def _conversion(
    index: ShardIndex,
    store: str,
    num_frames: int | None,
    image_size: int | None,
    quality: int,
    fit: str | None,
    tower: VisionTower | None,
    tower_name: str | None,
) -> Conversion:
    """Raises InputError if the source cannot become this."""
    if (index.store, store) not in CONVERSIONS:
        why = {
            "features": "features cannot be turned back; convert the store they came from",
            store: "it is one already",
        }.get(index.store, "pack the manifest with --store video")
        raise InputError(f"{index.root}: a {index.store} store cannot become a {store} store; {why}")
    if store == "features":
        if tower is None or tower_name is None:
            raise InputError("--vision: --store features needs the model that makes them")
        if image_size not in (None, tower.image_size):
            raise InputError(f"--image-size: {image_size}, but {tower_name} takes {tower.image_size}")
        image_size = tower.image_size
    if index.store == "frames":
        recorded = fit_of(index.meta["resizer"])
        if fit not in (None, recorded):
            raise InputError(
                f"{index.root}: packed with --fit {recorded or index.meta['resizer']}, not {fit}; convert the video store, or leave --fit out"
            )
        fit = recorded
        for name, value in (("num_frames", num_frames), ("image_size", image_size)):
            if value not in (None, index.meta[name]):
                raise InputError(
                    f"{index.root}: packed with {name} {index.meta[name]}, not {value}; "
                    "convert the video store, or leave the frames as they are"
                )
        num_frames, image_size = index.meta["num_frames"], index.meta["image_size"]
    fit = fit or FIT
    num_frames, image_size = num_frames or PackOptions.num_frames, image_size or PackOptions.image_size
    if tower is not None and tower_name is not None and store == "features":
        return Conversion(store, num_frames, image_size, vision=describe_tower(tower, tower_name), fit=fit)
    PackOptions(store, num_frames, image_size, quality, fit=fit)  # which checks them
    return Conversion(store, num_frames, image_size, quality, fit=fit)


def _shard(index: ShardIndex, info: ShardInfo, target: Conversion) -> Shard:
    """The new shard made from one of the source's, without rows: they are read when it is written.

    The model's name and folder may differ between machines; its fingerprint does not.
    """
    described = target.described()
    if target.vision is not None:
        described["vision"] = {k: v for k, v in target.vision.items() if k != "model"}
    digest = hashlib.sha256(
        json_line(
            {
                "version": HASHED_VERSION,
                **sampling_of(index.meta, target.fit),
                "target": described,
                "source": info.sha256,
            }
        )
    ).hexdigest()
    return Shard(info.split, info.shard, [], digest)


def _made(
    index: ShardIndex,
    old: list[_OldShard],
    target: Conversion,
    tower: VisionTower | None,
    pool: DecodePool,
    workers: int,
) -> Iterator[VideoReply]:
    """The new members of all samples of these shards, in order, read and decoded ahead."""

    def rows() -> Iterator[SampleRow]:
        for shard in old:
            yield from shard.rows(index)

    options: dict[str, Any] = {"num_frames": target.num_frames, "image_size": target.image_size, "fit": target.fit}
    if target.store == "frames":
        yield from decode_stored(index, rows(), pool, store="frames", quality=target.quality, **options)
        return
    assert tower is not None
    frames: Iterator[np.ndarray | SampleError]
    if index.store == "frames":
        frames = _read_jpegs(index, rows(), workers)
    else:
        frames = (
            pixels_of(reply, target.image_size)
            for reply in decode_stored(index, rows(), pool, store="pixels", **options)
        )
    for shard in old:
        yield from _encoded(tower, islice(frames, shard.info.count), shard.rows(index), target)


def _read_jpegs(index: ShardIndex, rows: Iterable[SampleRow], threads: int) -> Iterator[np.ndarray | SampleError]:
    """For each sample of a frames store, in order, its frames, uint8 [F, 3, S, S] (F is 1 of a still picture), or why
    they cannot be read. Pillow decodes outside the interpreter lock, so threads do."""

    def load(members: dict[str, bytes] | SampleError, still: bool) -> np.ndarray | SampleError:
        try:
            return members if isinstance(members, SampleError) else read_jpegs(members, index.meta, still)
        except SampleError as error:
            return error

    with ThreadPoolExecutor(threads) as executor:
        ahead: deque[Future[np.ndarray | SampleError]] = deque()
        for row in rows:
            members: dict[str, bytes] | SampleError
            try:
                members = index.read(row)
            except SampleError as error:
                members = error
            ahead.append(executor.submit(load, members, is_still(row.frames)))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _encoded(
    tower: VisionTower, frames: Iterator[np.ndarray | SampleError], rows: Iterator[SampleRow], target: Conversion
) -> Iterator[VideoReply]:
    """One shard's samples through the tower. A batch never reaches into the next shard: a shard's
    features do not depend on the others made in the same process. The tower takes clips of one length: of a still
    picture it gets as many copies, and the features of one are kept."""
    size = max(1, tower.frames_per_call // target.num_frames)
    while batch := list(islice(frames, size)):
        good = [
            np.broadcast_to(item, (target.num_frames, *item.shape[1:]))
            for item in batch
            if not isinstance(item, SampleError)
        ]
        if good:
            pixels = torch.from_numpy(np.stack(good)).to(tower.clip.device)
            features = iter(tower(pixels).to("cpu", torch.bfloat16))
        for item, row in zip(batch, rows):
            if isinstance(item, SampleError):
                yield VideoReply(str(item))
            else:
                kept = next(features)[: kept_frames(row.frames, target.num_frames) * tower.patches]
                yield VideoReply(None, {name: getattr(row, name) for name in FACTS}, {EXTENSION: encode_features(kept)})


def _description(index: ShardIndex, row: SampleRow) -> dict[str, Any]:
    """The sample's member "json"."""
    only = tuple(member for member in row.members if member.ext == "json")
    return json.loads(index.read(replace(row, members=only))["json"])


def _manifest_row(row: SampleRow, found: dict[str, Any]) -> ManifestRow:
    """The manifest's row, as far as the sample's description keeps it."""
    return ManifestRow(
        0, row.key, found["id"], "", found["source"], found["captions"], row.start, row.end, row.split,
        found.get("prompt"),
        found.get("columns"),
    )  # fmt: skip


def _with_facts(replies: Iterator[VideoReply], described: list[dict[str, Any]]) -> Iterator[VideoReply]:
    """The replies with the facts in each sample's old description: they are about the original
    video, which may be another file than the one in a video store. The number of frames is that by which the reply was
    made: it says whether the new sample is a still picture."""
    for facts, reply in zip(described, replies):
        if reply.reason is not None:
            yield reply
            continue
        kept = {name: value for name, value in facts.items() if name not in (*ROW, "frames")}
        if "timestamps" in kept and is_still(reply.facts["frames"]):
            kept["timestamps"] = kept["timestamps"][:1]  # a source of version 2 has one of each copy
        yield replace(reply, facts={**reply.facts, **kept})


def _described(index: ShardIndex, target: Conversion) -> dict[str, Any]:
    """What dataset.json says of the new store."""
    described = {
        **target.described(),
        **sampling_of(index.meta, target.fit),
        "verify": None,
        "shard_size": index.meta["shard_size"],
        "shard_bytes": index.meta["shard_bytes"],
    }
    if target.vision is None:
        del described["vision"]
    return described


def _ledger(root: Path) -> list[Reject]:
    with (root / "ledger.jsonl").open(encoding="utf-8") as file:
        return [Reject(**json.loads(line)) for line in file]
