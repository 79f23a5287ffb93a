"""`vlmds train`, which is also launch/train.py; and `vlmds new`, an experiment of one's own."""

from __future__ import annotations

import argparse
from pathlib import Path


def train(args: argparse.Namespace) -> int:
    from vlmds.training.main import main

    return main(args)


def new(args: argparse.Namespace) -> int:
    from vlmds.planning.new_experiment import write_experiment

    for line in write_experiment(args.path, args.projector, args.adapter, clips=args.clips, data=args.data):
        print(line)
    return 0


def add_train(commands) -> None:
    command = commands.add_parser(
        "train",
        help="train one experiment: all stages of its schedule",
        description="Train one experiment: all stages of its schedule. One process; or, on many "
        "GPUs, deepspeed launch/train.py …, deepspeed --module vlmds.cli train …, or torchrun -m -- "
        "vlmds.cli train …",
    )
    add = command.add_argument
    add("--exp", required=True, help="path of a YAML file, or the name of a packaged experiment")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override keys, such as training.micro_batch=4 stages.0.lr=5e-4",
    )
    add("--data", help="folder written by vlmds pack (sets data.path)")
    add("--output", help="run folder (default: runs/NAME)")
    add(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="go on with the run in --output (auto, the default), insist on a new one (never), or "
        "start from a checkpoint folder",
    )
    add(
        "--from",
        dest="from_run",
        type=Path,
        metavar="RUN",
        help="take all stages but the last from another run, instead of training them",
    )
    add(
        "--ds-config",
        metavar="JSON",
        help="DeepSpeed JSON: a path, or one that comes with vlmds (zero2, zero2_cpu, "
        "zero2_offload; default: zero2, on a CPU zero2_cpu)",
    )
    add("--plan", action="store_true", help="print the plan and stop")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    command.set_defaults(call=train, module="vlmds.training.main")


def add_new(commands) -> None:
    command = commands.add_parser(
        "new",
        help="write an experiment file of your own, with comments on what to change",
        description="Writes an experiment file that extends the packaged one with this projector "
        "and adapter, with comments on what to change and why. Overwrites nothing.",
    )
    add = command.add_argument
    add("path", type=Path, metavar="FILE.yaml", help="the file; its name becomes the experiment's")
    add("--projector", required=True, metavar="TYPE", help="the projector's type, such as mlp")
    add("--adapter", default="lora", metavar="TYPE", help="lora or dora (default: lora)")
    size = command.add_mutually_exclusive_group()
    size.add_argument("--clips", type=int, metavar="N", help="training clips, to count the steps")
    size.add_argument("--data", help="packed dataset, to count the steps")
    command.set_defaults(call=new)
