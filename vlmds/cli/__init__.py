"""The command `vlmds`. Each subcommand imports what it needs, so that --help stays quick."""

from __future__ import annotations

import argparse
import errno
import sys
from pathlib import Path

from vlmds.cli import bench, evaluating, packing, planning, training, using
from vlmds.cuda import use_expandable_segments
from vlmds.errors import InputError
from vlmds.files import denied
from vlmds.quiet import quiet_libraries


# What is wrong with a disk or a path that the user named, and not with the program.
UNUSABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR,
            errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ESTALE}


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad input, 3 stopped by a signal. Other failures raise."""
    args = _parser().parse_args(arguments)
    quiet_libraries()  # before the command imports them
    use_expandable_segments()
    try:
        return args.call(args)
    except InputError as error:
        print(f"vlmds: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in UNUSABLE or error.filename is None:
            raise
        if (error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
                and "://" not in str(error.filename)):
            print(f"vlmds: {denied(Path(error.filename))}", file=sys.stderr)
        else:
            print(f"vlmds: {error.filename}: {error.strerror}; make room there, or name another "
                  "place", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlmds", description="Train and compare video-captioning models. On many GPUs: "
        "deepspeed launch/train.py --exp e7.yaml --data DIR")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # of deepspeed's launcher
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (packing.add_pack, training.add_new, planning.add_plan, planning.add_doctor,
                planning.add_fetch, planning.add_schema, training.add_train, using.add_caption,
                using.add_serve, using.add_export, evaluating.add_evaluate, evaluating.add_compare,
                evaluating.add_sweep, bench.add_bench, planning.add_demo):
        add(commands)
    return parser
