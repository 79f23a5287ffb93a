"""The command `vlmds`: its parser and exit codes. Subcommands import what they need when they run,
which keeps --help fast."""

from __future__ import annotations

import argparse
import io
import os
import select
import signal
import sys
from contextlib import suppress

from vlmds.cli import bench, comparing, evaluating, inference, judging, packing, planning, reviewing, sweeping, training
from vlmds.cli.options import add_local_rank
from vlmds.console.quiet import quiet_libraries
from vlmds.distributed.cuda import use_expandable_segments
from vlmds.errors import InputError
from vlmds.permissions import unusable_place


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad input, 3 stopped by a signal, 141 if nobody reads any more
    what is printed (as after ``| head -1``). Other failures raise."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name may be no UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    args = _parser().parse_args(arguments)
    args.argv = sys.argv[1:] if arguments is None else arguments
    quiet_libraries()  # before the command imports them
    use_expandable_segments()
    try:
        code = _run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _reader_gone():
            raise
        # Otherwise the interpreter flushes again at its end, and prints an error.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        return 128 + signal.SIGPIPE


def _run(args: argparse.Namespace) -> int:
    try:
        return args.call(args)
    except InputError as error:
        if not error.shared or os.environ.get("RANK", "0") == "0":
            print(f"vlmds: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        line = unusable_place(error)
        if line is None:
            raise
        print(f"vlmds: {line}", file=sys.stderr)
        return 2


def _reader_gone() -> bool:
    """Whether standard output or error is a pipe without a reader; the broken one may be another pipe."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # not a file, as in a notebook
            poll.register(stream.fileno(), 0)  # errors are always reported
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlmds",
        description="Train, evaluate and compare video-captioning models. "
        "'vlmds COMMAND --help' explains a command; 'vlmds demo' runs everything once on a CPU.",
    )
    add_local_rank(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        packing.add_pack,
        training.add_new,
        planning.add_plan,
        planning.add_doctor,
        planning.add_fetch,
        planning.add_schema,
        training.add_train,
        inference.add_caption,
        inference.add_serve,
        inference.add_export,
        evaluating.add_evaluate,
        comparing.add_compare,
        comparing.add_power,
        reviewing.add_review,
        judging.add_judge,
        sweeping.add_sweep,
        bench.add_bench,
        planning.add_demo,
    ):
        add(commands)
    return parser
