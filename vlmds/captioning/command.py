"""The command `vlmds caption`: its arguments, its output and its exit code."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from typing import Any

from vlmds.captioning.job import CaptionJob, caption_to_file, caption_to_stdout, stream_to_stdout, title
from vlmds.captioning.windows import parse_seconds
from vlmds.console.text import counted
from vlmds.distributed.ranks import is_main
from vlmds.errors import InputError
from vlmds.inference.options import GenerationOptions

SHOWN_FAILURES = 10


def caption(args: argparse.Namespace, generation: GenerationOptions) -> int:
    """Returns the exit code: 0 if every video has a caption, 2 otherwise; 3 if a signal stopped it.

    Raises:
        InputError: see :func:`caption_to_file`; or options that do not go together.
    """
    if args.stream and (args.out or args.json):
        raise InputError("--stream: prints text; leave out --out and --json")
    for name in ("again", "format"):
        if getattr(args, name) and not args.out:
            raise InputError(f"--{name}: needs --out")
    options = {
        "videos": args.videos,
        "data": args.data,
        "split": args.split,
        "window": None if args.window is None else parse_seconds(args.window, "--window"),
        "generation": generation,
        "prompt": args.prompt,
        "batch_size": args.batch_size,
        "workers": args.workers,
        "deadline": args.deadline,
        "device": args.device,
        "overrides": args.set,
    }
    # As Ctrl-C: finished captions are kept, and no file is left half written.
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        return _to_file(args, options) if args.out else _to_stdout(args, options)
    except KeyboardInterrupt:
        goes_on = "; the same command goes on" if args.out else ""
        print(f"vlmds: stopped{goes_on}", file=sys.stderr)
        return 3
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _to_stdout(args: argparse.Namespace, options: dict[str, Any]) -> int:
    job = CaptionJob(args.run, **options)

    def show(record: dict[str, Any]) -> None:
        if args.json:
            print(json.dumps(record, ensure_ascii=False), flush=True)
        else:
            print(f"{title(record, job.window)}\t{record['caption']}", flush=True)

    failed = stream_to_stdout(job) if args.stream else caption_to_stdout(job, show)
    for line in failed:
        print(f"vlmds: {line}", file=sys.stderr)
    return 2 if failed else 0


def _to_file(args: argparse.Namespace, options: dict[str, Any]) -> int:
    summary = caption_to_file(args.run, args.out, format=args.format, again=args.again, **options)
    if is_main():
        for line in summary.failed[:SHOWN_FAILURES]:
            print(f"vlmds: {line}", file=sys.stderr)
        paths = summary.paths[0] if len(summary.paths) == 1 else counted(len(summary.paths), "file")
        also = f" ({summary.before:,} there before)" if summary.before else ""
        also += f", {len(summary.failed):,} failed" if summary.failed else ""
        if summary.skipped:
            also += f", {counted(summary.skipped, 'other file')} skipped"
        print(f"{counted(summary.captions, 'caption')}{also}\nsaved: {paths}")
    return 2 if summary.failed else 0
