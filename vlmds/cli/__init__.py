"""The command `vlmds`. Each subcommand imports what it needs, so that --help stays quick."""

from __future__ import annotations

import argparse
import io
import os
import select
import signal
import sys
from contextlib import suppress
from importlib import import_module

from vlmds.cli import bench, evaluating, inference, packing, planning, training
from vlmds.console.progress import phase
from vlmds.console.quiet import quiet_libraries
from vlmds.distributed.cuda import use_expandable_segments
from vlmds.errors import InputError
from vlmds.files import unusable_place


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad input, 3 stopped by a signal, 141 if nobody reads any more
    what is printed (as after ``| head -1``). Other failures raise."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name may be no UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    args = _parser().parse_args(arguments)
    quiet_libraries()  # before the command imports them
    use_expandable_segments()
    try:
        code = _run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _reader_gone():
            raise
        # Or the interpreter would try again when it ends, and complain.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        return 128 + signal.SIGPIPE


def _run(args: argparse.Namespace) -> int:
    try:
        _load(args)
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


def _load(args: argparse.Namespace) -> None:
    """Import what takes seconds, and say so: ``module`` of the command."""
    if getattr(args, "module", None) and getattr(args, "record", None) is None:
        with phase("loading PyTorch and transformers"):
            import_module(args.module)


def _reader_gone() -> bool:
    """Whether standard output or error is a pipe that nobody reads any more; another pipe may be the
    broken one."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # one that is no file, as in a notebook
            poll.register(stream.fileno(), 0)  # errors are reported in any case
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlmds",
        description="Train and compare video-captioning models. On many GPUs: "
        "deepspeed launch/train.py --exp e7.yaml --data DIR",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # of deepspeed's launcher
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
        evaluating.add_compare,
        evaluating.add_sweep,
        bench.add_bench,
        planning.add_demo,
    ):
        add(commands)
    return parser
