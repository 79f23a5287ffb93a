"""`vlmds caption`, `vlmds serve` and `vlmds export`: uses of a trained run."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlmds.captioning.outputs import FORMATS as CAPTION_FORMATS
from vlmds.cli.options import add_data, add_generation, add_loading, generation_options, load
from vlmds.console.text import counted
from vlmds.errors import InputError
from vlmds.experiments.defaults import DECODE_SECONDS
from vlmds.export import FORMATS as EXPORT_FORMATS
from vlmds.inference.options import CAPTION_BATCH_SIZE
from vlmds.serve.limits import Limits

OF_FROM = ("record", "out", "format", "again", "call", "parser")
"""Arguments that `caption --from` uses; it refuses the others."""


def caption(args: argparse.Namespace) -> int:
    """0 if every video has a caption, 2 otherwise; 3 if a signal stopped it."""
    if args.record is not None:
        return _write_from(args)
    load("vlmds.captioning.command")
    from vlmds.captioning.command import caption
    from vlmds.distributed.failures import run_on_ranks

    return run_on_ranks(lambda: caption(args, generation_options(args)))


def _write_from(args: argparse.Namespace) -> int:
    from vlmds.captioning.outputs import write_from

    if args.out is None:
        raise InputError("--from: needs --out with a name ending in .json, .csv or .srt, or a folder and --format srt")
    unused = vars(args.parser.parse_args(["--from", "", "--out", ""]))
    for name, default in unused.items():
        if name not in OF_FROM and getattr(args, name) != default:
            option = "VIDEO" if name == "videos" else f"--{name.replace('_', '-')}"
            raise InputError(f"{option}: --from captions nothing; leave it out")
    paths = write_from(args.record, args.out, args.format, args.again)
    print(f"saved: {paths[0] if len(paths) == 1 else counted(len(paths), 'file')}")
    return 0


def serve(args: argparse.Namespace) -> int:
    load("vlmds.serve.app")
    from vlmds.serve.app import serve

    serve(
        args.run,
        host=args.host,
        port=args.port,
        device=args.device,
        overrides=args.set,
        limits=Limits(megabytes=args.max_mb, seconds=args.max_seconds, urls=args.allow_urls),
    )
    return 0


def export(args: argparse.Namespace) -> int:
    load("vlmds.export.folder")
    from vlmds.export.folder import export_run
    from vlmds.export.publish import push_to_hub

    parity = export_run(
        args.run, args.output, format=args.format, merge=args.merge, device=args.device, overrides=args.set
    )
    if parity:
        print(f"before against after folding: {parity}")
    print(f"saved: {args.output}")
    if args.push_to_hub:
        print(f"pushed: {push_to_hub(args.output, args.push_to_hub)}")
    return 0


def add_caption(commands) -> None:
    command = commands.add_parser(
        "caption",
        help="caption videos with a trained run",
        description="Captions videos. On several GPUs, with --out: torchrun --nproc-per-node 8 -m -- "
        "vlmds.cli caption … After a stop, or when videos were added, the same command resumes.",
    )
    add = command.add_argument
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, metavar="RUN", help="run folder, or one of its artifacts")
    which.add_argument(
        "--from",
        dest="record",
        metavar="JSONL",
        help="do not caption; write the captions of this file in another format, such as "
        "--from captions.jsonl --out subs --format srt",
    )
    add("videos", nargs="*", metavar="VIDEO", help="paths or URLs")
    add_data(
        add,
        "instead of VIDEO: a folder of videos, a manifest (CSV, TSV, JSONL or Parquet; no captions needed) "
        "or a packed dataset",
    )
    add("--split", help="split of a packed dataset (default: val, or the only one)")
    add(
        "--out",
        metavar="FILE",
        help="write the captions to this .jsonl, .json, .csv or .srt file; for subtitles of several "
        "videos, a folder with --format srt (default: print the captions)",
    )
    add("--format", choices=CAPTION_FORMATS, help="default: from the suffix of --out")
    add("--again", action="store_true", help="also repeat captions that are already in --out")
    add("--window", metavar="LENGTH", help="one caption per window of this length: 30s, 1m, 1m30s")
    add("--stream", action="store_true", help="print each caption while it is generated")
    add("--json", action="store_true", help="print one JSON object per line")
    add("--prompt", metavar="TEXT", help="prompt to use (default: the experiment's)")
    add_generation(add)
    add(
        "--batch-size",
        type=int,
        default=CAPTION_BATCH_SIZE,
        metavar="N",
        help=f"videos per batch (default: {CAPTION_BATCH_SIZE})",
    )
    add("--workers", type=int, metavar="N", help="decoding processes (default: one per core)")
    add(
        "--deadline",
        type=float,
        default=DECODE_SECONDS,
        metavar="SECONDS",
        help=f"time limit for decoding one video, or some of its windows (default: {DECODE_SECONDS:g})",
    )
    add_loading(add)
    command.set_defaults(call=caption, parser=command)


def add_serve(commands) -> None:
    command = commands.add_parser(
        "serve",
        help="open a web page and an OpenAI-style endpoint for trained runs",
        description="Serves a web page that captions uploaded videos, and the same as an OpenAI-style endpoint.",
    )
    add = command.add_argument
    add(
        "--run",
        type=Path,
        required=True,
        nargs="+",
        action="extend",
        metavar="RUN",
        help="run folder, or one of its artifacts; several are shown side by side",
    )
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1, only reachable from this machine)",
    )
    add("--port", type=int, default=7860, help="port to listen on (default: 7860; 0: a free one)")
    add(
        "--max-mb", type=float, default=Limits.megabytes, metavar="MB", help="largest video file (default: %(default)g)"
    )
    add(
        "--max-seconds",
        type=float,
        default=Limits.seconds,
        metavar="SECONDS",
        help="longest video (default: %(default)g)",
    )
    add(
        "--allow-urls",
        action="store_true",
        help="also download videos from http(s) URLs in requests, from anywhere this machine can reach",
    )
    add_loading(add)
    command.set_defaults(call=serve)


def add_export(commands) -> None:
    command = commands.add_parser(
        "export",
        help="write a trained run as a folder that others can load",
        description="Exports a trained run. Formats: vlmds (for vlmds itself), projector (only the projector, to "
        "start other trainings from), peft (only the adapter and the projector), hf-llava (for plain "
        "transformers, with the adapter folded in). Folders with folded "
        "weights are loaded back and their logits compared.",
    )
    add = command.add_argument
    add("--run", type=Path, required=True, metavar="RUN", help="run folder, or one of its artifacts")
    add("--output", type=Path, required=True, metavar="DIR", help="new folder to write")
    add("--format", choices=EXPORT_FORMATS, default="vlmds", help="default: vlmds")
    add(
        "--merge",
        action="store_true",
        help="fold the adapter into the language model's weights (in llm.dtype, not in 4 bits)",
    )
    add("--push-to-hub", metavar="OWNER/NAME", help="also upload the folder to this repository; a new one is private")
    add_loading(add)
    command.set_defaults(call=export)
