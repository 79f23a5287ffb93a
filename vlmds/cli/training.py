"""`vlmds train`, which is also launch/train.py, and `vlmds new`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from vlmds.cli.options import add_data, add_exp, add_local_rank, add_set, load
from vlmds.errors import InputError


def train(args: argparse.Namespace) -> int:
    if args.gpus is not None and "RANK" not in os.environ:
        _start_launcher(args.gpus, args.argv)
    load("vlmds.training.main")
    from vlmds.training.main import main

    return main(args)


def _start_launcher(gpus: int, argv: list[str]) -> None:
    """Replace this process by the deepspeed launcher, which runs the same command on every rank; the
    ranks ignore --gpus."""
    load("vlmds.distributed.ranks")
    import torch

    from vlmds.distributed.ranks import cpu_environment, free_port

    there = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
    if gpus < 1 or 0 < there < gpus:
        raise InputError(
            f"--gpus {gpus}: must be at least 1" + (f" and at most {there}, the GPUs here" if there else "")
        )
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]
    launcher += ["--num_gpus", str(gpus), "--master_port", str(free_port()), "--module", "vlmds.cli"]
    os.execve(sys.executable, [*launcher, *argv], {**os.environ, **cpu_environment(gpus)})


def new(args: argparse.Namespace) -> int:
    from vlmds.planning.new_experiment import write_experiment

    for line in write_experiment(args.path, args.projector, args.adapter, clips=args.clips, data=args.data):
        print(line)
    return 0


def add_train(commands) -> None:
    command = commands.add_parser(
        "train",
        help="train one experiment: all stages of its schedule",
        description="Trains all stages of an experiment. After a stop, the same command resumes. One process, "
        "or --gpus N; several nodes: deepspeed or torchrun with launch/train.py, or with the module vlmds.cli.",
    )
    add = command.add_argument
    add_exp(add, required=True)
    add_set(add)
    add_data(add, "folder written by vlmds pack (sets data.path)")
    add("--output", metavar="DIR", help="run folder (default: runs/NAME)")
    add("--gpus", type=int, metavar="N", help="start N ranks on this machine with the deepspeed launcher")
    add(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto (default): resume the run in --output, if there is one; never: refuse to resume; PATH: start "
        "from this checkpoint folder",
    )
    add(
        "--from",
        dest="from_run",
        type=Path,
        metavar="RUN",
        help="take all stages but the last from this run instead of training them",
    )
    add(
        "--tuned",
        type=Path,
        metavar="FILE",
        help="tune.json of vlmds sweep --tune lr, which chose these learning rates; recorded in run.json",
    )
    add(
        "--ds-config",
        metavar="JSON",
        help="DeepSpeed configuration: a path, or zero2 (default), zero2_cpu (default on a CPU) or zero2_offload",
    )
    add("--plan", action="store_true", help="print the plan and stop")
    add_local_rank(command)
    command.set_defaults(call=train)


def add_new(commands) -> None:
    command = commands.add_parser(
        "new",
        help="write a commented experiment file of your own",
        description="Writes an experiment file that extends the packaged experiment with this projector and "
        "adapter, with comments on what to change and why. Never overwrites a file.",
    )
    add = command.add_argument
    add("path", type=Path, metavar="FILE.yaml", help="file to write; its name becomes the name of the experiment")
    add("--projector", required=True, metavar="TYPE", help="type of the projector, such as mlp")
    add("--adapter", default="lora", metavar="TYPE", help="lora or dora (default: lora)")
    size = command.add_mutually_exclusive_group()
    size.add_argument("--clips", type=int, metavar="N", help="number of training clips, for the number of steps")
    add_data(size.add_argument, "packed dataset, for the number of steps")
    command.set_defaults(call=new)
