"""`vlmds caption`, `vlmds serve` and `vlmds export`: what a trained run is for."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlmds.cli.generation import add_generation, add_loading, generation_options
from vlmds.console.text import counted
from vlmds.errors import InputError

# What `caption --from` looks at.
OF_FROM = ("record", "out", "format", "again", "call", "parser", "module")


def caption(args: argparse.Namespace) -> int:
    """0 if every video has a caption, 2 otherwise; 3 if a signal stopped it."""
    if args.record is not None:
        return _write_from(args)
    from vlmds.captioning.command import caption

    return caption(args, generation_options(args))


def _write_from(args: argparse.Namespace) -> int:
    from vlmds.captioning.outputs import write_from

    if args.out is None:
        raise InputError(
            "--from: needs --out with a name that ends in .json, .csv or .srt, or a folder and --format srt"
        )
    unused = vars(args.parser.parse_args(["--from", "", "--out", ""]))
    for name, default in unused.items():
        if name not in OF_FROM and getattr(args, name) != default:
            option = "VIDEO" if name == "videos" else f"--{name.replace('_', '-')}"
            raise InputError(f"{option}: with --from nothing is captioned; leave it out")
    paths = write_from(args.record, args.out, args.format, args.again)
    print(f"saved: {paths[0] if len(paths) == 1 else counted(len(paths), 'file')}")
    return 0


def serve(args: argparse.Namespace) -> int:
    from vlmds.serve.app import serve
    from vlmds.serve.loaded import Limits

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
    from vlmds.export.folder import export_run
    from vlmds.export.publish import push_to_hub

    parity = export_run(
        args.run, args.output, format=args.format, merge=args.merge, device=args.device, overrides=args.set
    )
    if parity:
        print(f"before and after folding the adapter in: {parity}")
    print(f"saved: {args.output}")
    if args.push_to_hub:
        print(f"pushed: {push_to_hub(args.output, args.push_to_hub)}")
    return 0


def add_caption(commands) -> None:
    command = commands.add_parser(
        "caption",
        help="captions from a trained run",
        description="Over many GPUs, with --out: torchrun --nproc-per-node 8 -m -- vlmds.cli "
        "caption … Start it again after a stop, or when there are more videos: it goes on.",
    )
    add = command.add_argument
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, help="run folder, or one of its artifacts")
    which.add_argument(
        "--from",
        dest="record",
        metavar="JSONL",
        help="captions nothing: writes what was collected here before in another "
        "format, such as --from captions.jsonl --out subs --format srt",
    )
    add("videos", nargs="*", metavar="VIDEO", help="path or URL")
    add(
        "--data",
        metavar="DIR",
        help="a folder of videos, a manifest (CSV, TSV, JSONL, Parquet; "
        "no captions needed) or a packed dataset, instead of VIDEO",
    )
    add("--split", help="of a packed dataset (default: val, or the only one)")
    add(
        "--out",
        metavar="FILE",
        help="write the captions here: .jsonl, .json, .csv or .srt; of "
        "several videos, a folder with --format srt (default: print them)",
    )
    add("--format", choices=("jsonl", "json", "csv", "srt"), help="default: as --out ends")
    add("--again", action="store_true", help="caption anew what is in --out already")
    add("--window", metavar="LENGTH", help="a caption for each such stretch: 30s, 1m, 1m30s")
    add("--stream", action="store_true", help="print each caption while it is written")
    add("--json", action="store_true", help="print one JSON object a line")
    add("--prompt", help="instead of the experiment's")
    add_generation(command)
    add("--batch-size", type=int, default=4, help="videos at once (default: 4)")
    add("--workers", type=int, help="decoding processes (default: one per core)")
    add(
        "--deadline",
        type=float,
        default=60.0,
        help="seconds that decoding may take, for a video or some windows (default: 60)",
    )
    add_loading(command)
    command.set_defaults(call=caption, parser=command, module="vlmds.captioning.command")


def add_serve(commands) -> None:
    command = commands.add_parser("serve", help="a page to try runs on a video, and the same as JSON")
    add = command.add_argument
    add(
        "--run",
        type=Path,
        required=True,
        nargs="+",
        action="extend",
        metavar="RUN",
        help="run folder, or one of its artifacts; several are compared side by side",
    )
    add(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, which only this machine reaches)"
    )
    add("--port", type=int, default=7860, help="default: 7860; 0 is a free one")
    add("--max-mb", type=float, default=200.0, help="of a video's file (default: 200)")
    add("--max-seconds", type=float, default=600.0, help="of a video (default: 600)")
    add(
        "--allow-urls",
        action="store_true",
        help="also fetch videos from http(s) URLs that a request names, whatever this machine can reach",
    )
    add_loading(command)
    command.set_defaults(call=serve, module="vlmds.serve.app")


def add_export(commands) -> None:
    command = commands.add_parser(
        "export",
        help="a folder that others can load",
        description="vlmds: for vlmds itself. peft: the adapter alone. hf-llava: for plain "
        "transformers, the adapter folded in. Folded weights are loaded back and compared.",
    )
    add = command.add_argument
    add("--run", type=Path, required=True, help="run folder, or one of its artifacts")
    add("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    add("--format", choices=("vlmds", "peft", "hf-llava"), default="vlmds")
    add("--merge", action="store_true", help="fold the adapter into the language model, in llm.dtype, never in 4 bit")
    add("--push-to-hub", metavar="OWNER/NAME", help="upload it, to a private repository if new")
    add_loading(command)
    command.set_defaults(call=export, module="vlmds.export.folder")
