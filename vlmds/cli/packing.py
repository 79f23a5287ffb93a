"""`vlmds pack`."""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING

from vlmds.console.progress import phase
from vlmds.console.text import counted, size_text
from vlmds.errors import InputError
from vlmds.files import as_path

if TYPE_CHECKING:
    from vlmds.packing.pack import PackSummary


def pack(args: argparse.Namespace) -> int:
    try:
        return _pack(args)
    except KeyboardInterrupt:
        print("vlmds: stopped; finished shards are kept, the same command goes on from there", file=sys.stderr)
        return 3


def _pack(args: argparse.Namespace) -> int:
    args.out = as_path(args.out)
    common = dict(workers=args.workers, deadline=args.deadline)
    if args.quality is not None:
        common["quality"] = args.quality
    if (as_path(args.manifest) / "dataset.json").is_file():
        with phase("loading PyTorch"):
            from vlmds.packing.convert import convert_from_options

        _refuse(
            args,
            "a conversion keeps shards and splits as they are",
            shard_size=256,
            shard_bytes=None,
            val_fraction=0.0,
            no_verify=False,
            dedup=False,
            append=False,
            retry=False,
            engine="local",
        )
        summary = convert_from_options(
            args.manifest,
            args.out,
            args.store or "frames",
            vision=args.vision,
            feature_layer=args.feature_layer,
            pool=args.pool,
            num_frames=args.num_frames,
            image_size=args.image_size,
            task=_task(args),
            merge=args.merge,
            **common,
        )
    else:
        from vlmds.packing.pack import pack

        _refuse(
            args,
            "features are made from a packed dataset: pack the videos first, then vlmds pack OUT OUT2 --store features",
            vision=None,
            feature_layer=-1,
            pool=1,
        )
        summary = pack(
            args.manifest,
            args.out,
            store=args.store or "video",
            num_frames=8 if args.num_frames is None else args.num_frames,
            image_size=336 if args.image_size is None else args.image_size,
            shard_size=args.shard_size,
            shard_bytes=_bytes(args.shard_bytes),
            val_fraction=args.val_fraction,
            verify=not args.no_verify,
            dedup=args.dedup,
            append=args.append,
            merge=args.merge,
            retry=args.retry,
            task=_task(args),
            engine=args.engine,
            **common,
        )
    if not summary.finished:
        print(
            f"packed the {counted(summary.shards, 'shard')} of task {args.task_index} of "
            f"{args.num_tasks}; when all tasks are done, join them: vlmds pack "
            f"{args.manifest} {args.out} with the same options, but without --task-index and "
            "--num-tasks (--merge makes sure that nothing is left to pack)"
        )
    else:
        _report(args, summary)
    return 0


def _report(args: argparse.Namespace, summary: PackSummary) -> None:
    """What is in the dataset now, and what is not, and why."""
    from vlmds.data.coverage import coverage_lines
    from vlmds.data.index import ShardIndex

    counts = ", ".join(f"{split} {count:,}" for split, count in summary.counts.items())
    print(
        f"packed {counted(summary.packed, 'sample')} ({counts}) into "
        f"{counted(summary.shards, 'shard')}, "
        f"{size_text(summary.bytes)}, in {summary.seconds:.1f} s: {args.out}"
    )
    for line in coverage_lines([ShardIndex.open(args.out)]):
        print(line)
    if not args.no_report:
        from vlmds.packing.report import write_report

        with phase("making the report"):
            report = write_report(args.out)
        print(f"report: {report}")
    if summary.kept_shards:
        print(f"{counted(summary.kept_shards, 'shard')} kept from an earlier start")
    if summary.rejected:
        print(
            f"rejected {counted(sum(summary.rejected.values()), 'row')}, listed with reasons in "
            f"{args.out / 'ledger.jsonl'}:"
        )
        for reason, count in summary.rejected.items():
            print(f"  {count:>6,}  {reason}")
        print(
            "once the files are repaired, or with a longer --deadline, --retry packs their shards "
            "again; rows that are corrected in the manifest are added by --append"
        )
    if summary.known:
        were = "was" if summary.known == 1 else "were"
        print(f"{counted(summary.known, 'row')} {were} packed or rejected before, and {were} left")
    if summary.duplicates:
        print(
            f"groups of samples with the same content: {summary.duplicates:,}, see "
            f"{args.out / 'duplicates.jsonl'}; --dedup leaves all but the first out"
        )
    if summary.ignored_columns:
        print(f"ignored columns: {', '.join(summary.ignored_columns)}")
    if args.val_fraction and not summary.counts.get("val"):
        print(
            f"WARNING: split val is empty: none of so few rows falls into --val-fraction "
            f"{args.val_fraction:g}; give a larger one, or a column split in the manifest"
        )


def _task(args: argparse.Namespace) -> tuple[int, int] | None:
    index, tasks = args.task_index, args.num_tasks
    if index is None and tasks is None:
        return None
    if index is None or tasks is None or not 0 <= index < tasks:
        raise InputError(
            f"--task-index {index} --num-tasks {tasks}: give both, the index from 0 to the number less one"
        )
    if args.merge:
        raise InputError("--merge: joins the tasks' parts; leave --task-index and --num-tasks out")
    return index, tasks


def _bytes(text: str | None) -> int | None:
    """ "500MB" -> 500000000."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)B?", text)
    if not found:
        raise InputError(f"--shard-bytes {text}: write a size such as 500MB or 1GB")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))


def _refuse(args: argparse.Namespace, why: str, **defaults) -> None:
    """Raise InputError if one of these options was given another value than its default."""
    for name, default in defaults.items():
        if getattr(args, name) != default:
            raise InputError(f"--{name.replace('_', '-')}: {why}")


def add_pack(commands) -> None:
    command = commands.add_parser("pack", help="videos and captions -> shards with an index; or one store -> another")
    add = command.add_argument
    add(
        "manifest",
        help="CSV, TSV, JSONL or Parquet with columns video and caption; or a packed "
        "dataset, to convert it to another store",
    )
    add("out", help="folder, or URL, for the shards")
    add(
        "--store",
        choices=("video", "frames", "features"),
        help="keep the videos' bytes, decoded frames as JPEGs, or (of a packed dataset) the vision "
        "model's features (default: video; of a packed dataset: frames)",
    )
    add("--num-frames", type=int, help="of the frames or features store (default: 8)")
    add("--image-size", type=int, help="of the frames store (default: 336)")
    add("--vision", metavar="MODEL", help="of the features store: folder of a CLIP, or its hub name (or NAME@REVISION)")
    add(
        "--feature-layer",
        type=int,
        default=-1,
        choices=(-1, -2),
        help="of the features store: vision.feature_layer (default: -1)",
    )
    add("--pool", type=int, default=1, help="of the features store: vision.pool (default: 1)")
    add("--quality", type=int, help="JPEG quality of the frames store (default: 95)")
    add("--shard-size", type=int, default=256, help="most rows per shard (default: 256)")
    add("--shard-bytes", metavar="SIZE", help="most bytes of videos per shard, such as 1GB")
    add(
        "--val-fraction",
        type=float,
        default=0.0,
        help="share of the rows without a split that go to split val (default: 0)",
    )
    add("--no-verify", action="store_true", help="do not decode the videos of a video store")
    add("--dedup", action="store_true", help="leave out rows whose video and span an earlier row has")
    add("--append", action="store_true", help="add the manifest's new rows to what is packed in OUT, as new shards")
    add(
        "--retry",
        action="store_true",
        help="pack the shards again that had to reject rows: files are repaired, or --deadline is longer",
    )
    add("--task-index", type=int, metavar="I", help="pack only part I (from 0) …")
    add("--num-tasks", type=int, metavar="N", help="… of N parts; join them with --merge")
    add("--merge", action="store_true", help="pack nothing; make the dataset of the tasks' parts")
    add(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="pack on this machine, or on the Ray cluster that RAY_ADDRESS names",
    )
    add("--no-report", action="store_true", help="do not write pack_report.html")
    add("--workers", type=int, help="decoding processes (default: one per core)")
    add("--deadline", type=float, default=60.0, help="seconds a video may take (default: 60)")
    command.set_defaults(call=pack)
