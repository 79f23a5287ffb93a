"""`vlmds pack`."""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING, Any

from vlmds.console.progress import phase
from vlmds.console.text import counted, size_text
from vlmds.errors import InputError
from vlmds.experiments.defaults import DECODE_SECONDS
from vlmds.files import as_path

if TYPE_CHECKING:
    from vlmds.packing.pack import PackSummary


def pack(args: argparse.Namespace) -> int:
    try:
        return _pack(args)
    except KeyboardInterrupt:
        print("vlmds: stopped; finished shards are kept, the same command continues", file=sys.stderr)
        return 3


def _pack(args: argparse.Namespace) -> int:
    converting = (as_path(args.manifest) / "dataset.json").is_file()
    if args.check:
        if converting:
            raise InputError(f"--check: {args.manifest} is a packed dataset; give a manifest")
        return _check(args)
    if args.out is None:
        raise InputError("OUT: give the folder, or URL, for the shards")
    args.out = as_path(args.out)
    summary = _convert(args) if converting else _pack_manifest(args)
    if not summary.finished:
        print(
            f"packed the {counted(summary.shards, 'shard')} of task {args.task_index} of "
            f"{args.num_tasks}; when all tasks are done, join them: vlmds pack "
            f"{args.manifest} {args.out} with the same options, but without --task-index and "
            "--num-tasks (--finish makes sure that nothing is left to pack)"
        )
    else:
        _report(args, summary)
    return 0


def _check(args: argparse.Namespace) -> int:
    from vlmds.packing.manifest_check import check_manifest

    for line in check_manifest(args.manifest, **_reading(args)):
        print(line)
    return 0


def _reading(args: argparse.Namespace) -> dict[str, Any]:
    """The options about the manifest's columns and captions."""
    columns = {}
    for pair in (args.columns or "").split(","):
        name, equals, column = pair.partition("=")
        if args.columns and not (name and equals and column):
            raise InputError(f"--columns {args.columns}: write video=PATH,caption=TEXT with the file's column names")
        if args.columns:
            columns[name.strip()] = column.strip()
    return {
        "columns": columns,
        "keep_columns": tuple(args.keep_columns),
        "tokenizer": args.tokenizer,
        "max_caption_tokens": args.max_caption_tokens,
    }


def _common(args: argparse.Namespace) -> dict[str, Any]:
    common = dict(workers=args.workers, deadline=args.deadline, finish=args.finish, task=_task(args))
    return common if args.quality is None else common | dict(quality=args.quality)


def _convert(args: argparse.Namespace) -> PackSummary:
    with phase("loading PyTorch"):
        from vlmds.packing.convert import convert_from_options

    _refuse(
        args,
        "a conversion keeps shards, splits and samples as they are",
        shard_size=256,
        shard_bytes=None,
        val_fraction=0.0,
        no_verify=False,
        dedup=False,
        append=False,
        retry=False,
        engine="local",
        columns=None,
        keep_columns=[],
        tokenizer=None,
        max_caption_tokens=None,
    )
    return convert_from_options(
        args.manifest,
        args.out,
        args.store or "frames",
        vision=args.vision,
        feature_layer=args.feature_layer,
        pool=args.pool,
        num_frames=args.num_frames,
        image_size=args.image_size,
        fit=args.fit,
        **_common(args),
    )


def _pack_manifest(args: argparse.Namespace) -> PackSummary:
    from vlmds.packing.options import PackOptions
    from vlmds.packing.pack import pack

    _refuse(
        args,
        "features are made from a packed dataset: pack the videos first, then vlmds pack OUT OUT2 --store features",
        vision=None,
        feature_layer=-1,
        pool=1,
    )
    return pack(
        args.manifest,
        args.out,
        store=args.store or PackOptions.store,
        num_frames=PackOptions.num_frames if args.num_frames is None else args.num_frames,
        image_size=PackOptions.image_size if args.image_size is None else args.image_size,
        fit=args.fit or PackOptions.fit,
        shard_size=args.shard_size,
        shard_bytes=_bytes(args.shard_bytes),
        val_fraction=args.val_fraction,
        verify=not args.no_verify,
        dedup=args.dedup,
        append=args.append,
        retry=args.retry,
        engine=args.engine,
        **_reading(args),
        **_common(args),
    )


def _report(args: argparse.Namespace, summary: PackSummary) -> None:
    """Print the dataset's size, the rejected rows with their reasons, and the notes."""
    from vlmds.data.coverage import coverage_lines
    from vlmds.data.index import ShardIndex
    from vlmds.packing.near_duplicates import near_duplicate_lines

    counts = ", ".join(f"{split} {count:,}" for split, count in summary.counts.items())
    print(
        f"packed {counted(summary.packed, 'sample')} ({counts}) into "
        f"{counted(summary.shards, 'shard')}, "
        f"{size_text(summary.bytes)}, in {summary.seconds:.1f} s: {args.out}"
    )
    for line in [*coverage_lines([ShardIndex.open(args.out)]), *near_duplicate_lines(args.out)]:
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
            "--retry packs their shards again, once the files are repaired or with a longer --deadline; "
            "--append adds rows that are corrected in the manifest"
        )
    if summary.known:
        were = "was" if summary.known == 1 else "were"
        print(f"{counted(summary.known, 'row')} {were} packed or rejected before, and {were} not packed again")
    if summary.duplicates:
        print(
            f"groups of samples with the same content: {summary.duplicates:,}, see "
            f"{args.out / 'duplicates.jsonl'}; --dedup leaves all but the first out"
        )
    if summary.ignored_columns:
        print(f"ignored columns: {', '.join(summary.ignored_columns)}")
    for note in summary.notes:
        print(note)
    if "train" not in summary.counts:
        print("WARNING: no sample is in split train, which training needs")
    if args.val_fraction and not summary.counts.get("val"):
        print(
            f"WARNING: split val is empty: of so few videos none falls into --val-fraction "
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
    if args.finish:
        raise InputError("--finish: joins the tasks' parts; leave --task-index and --num-tasks out")
    return index, tasks


def _bytes(text: str | None) -> int | None:
    """ "500MB" -> 500000000."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)B?", text)
    if not found:
        raise InputError(f"--shard-bytes {text}: write a size such as 500MB or 1GB")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))


def _refuse(args: argparse.Namespace, why: str, **defaults: Any) -> None:
    """Raise InputError if one of these options was given another value than its default."""
    for name, default in defaults.items():
        if getattr(args, name) != default:
            raise InputError(f"--{name.replace('_', '-')}: {why}")


def add_pack(commands) -> None:
    command = commands.add_parser("pack", help="videos and captions -> shards with an index; or one store -> another")
    add = command.add_argument
    add(
        "manifest",
        help="CSV, TSV, JSON, JSONL or Parquet with columns video and caption (or conversations, or messages); "
        "a folder with metadata.jsonl; or a packed dataset, to convert it to another store",
    )
    add("out", nargs="?", help="folder, or URL, for the shards")
    add("--check", action="store_true", help="pack nothing; read the manifest and report what packing would find")
    add("--columns", metavar="NAME=COLUMN,…", help="columns of the manifest, such as video=path,caption=text")
    add(
        "--keep-columns",
        nargs="+",
        action="extend",
        default=[],
        metavar="COLUMN",
        help="columns to copy into each sample, such as category",
    )
    add("--tokenizer", metavar="MODEL", help="count captions that training would cut: folder, or hub name, of the LLM")
    add("--max-caption-tokens", type=int, metavar="N", help="data.max_caption_tokens of the experiment (default: 256)")
    add(
        "--store",
        choices=("video", "frames", "features"),
        help="keep the videos' bytes, decoded frames as JPEGs, or (of a packed dataset) the vision "
        "model's features (default: video; of a packed dataset: frames)",
    )
    add("--num-frames", type=int, help="frames of a clip in a frames or features store (default: 8)")
    add("--image-size", type=int, help="side of the frames in a frames store, in pixels (default: 336)")
    add(
        "--fit",
        choices=("crop", "pad", "stretch"),
        help="how frames of the frames or features store become squares: data.fit of the experiment (default: pad)",
    )
    add(
        "--vision",
        metavar="MODEL",
        help="the CLIP of a features store: a folder, or a name on the hub (or NAME@REVISION)",
    )
    add(
        "--feature-layer",
        type=int,
        default=-1,
        choices=(-1, -2),
        help="vision.feature_layer of a features store (default: -1)",
    )
    add("--pool", type=int, default=1, help="vision.pool of a features store (default: 1)")
    add("--quality", type=int, help="JPEG quality of the frames store (default: 95)")
    add("--shard-size", type=int, default=256, help="maximum number of rows in a shard (default: 256)")
    add("--shard-bytes", metavar="SIZE", help="maximum size of the videos in a shard, such as 1GB")
    add(
        "--val-fraction",
        type=float,
        default=0.0,
        help="share of the videos whose rows without a split go to split val (default: 0)",
    )
    add("--no-verify", action="store_true", help="do not decode the videos of a video store")
    add("--dedup", action="store_true", help="leave out rows whose video and span an earlier row has")
    add("--append", action="store_true", help="add the manifest's new rows to what is packed in OUT, as new shards")
    add(
        "--retry",
        action="store_true",
        help="pack the shards with rejected rows again, after files were repaired or with a longer --deadline",
    )
    add("--task-index", type=int, metavar="I", help="pack only part I (from 0) …")
    add("--num-tasks", type=int, metavar="N", help="… of N parts; join them with --finish")
    add("--finish", action="store_true", help="pack nothing; join the parts of the tasks into the dataset")
    add("--merge", dest="finish", action="store_true", help=argparse.SUPPRESS)  # its former name
    add(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="pack on this machine, or on the Ray cluster that RAY_ADDRESS names",
    )
    add("--no-report", action="store_true", help="do not write pack_report.html")
    add("--workers", type=int, help="decoding processes (default: one per core)")
    add(
        "--deadline",
        type=float,
        default=DECODE_SECONDS,
        help=f"time limit for one video, in seconds (default: {DECODE_SECONDS:g})",
    )
    command.set_defaults(call=pack)
