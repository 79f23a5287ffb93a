"""`vlmds plan`, `vlmds doctor`, `vlmds fetch`, `vlmds schema` and `vlmds demo`: before a training."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from vlmds.cli.options import add_data, add_exp, add_local_rank, add_set, load, overrides


def plan(args: argparse.Namespace) -> int:
    load("vlmds.planning.plan")
    from vlmds.experiments.reading import load_experiment
    from vlmds.planning.plan import plan_experiment

    experiment = load_experiment(args.exp, overrides(args))
    print(plan_experiment(experiment, args.gpus, args.samples_per_second, args.cores_per_gpu, args.gpu))
    return 0


def doctor(args: argparse.Namespace) -> int:
    load("vlmds.doctor.cluster")
    from vlmds.distributed.deadline import work_is_left
    from vlmds.doctor.cluster import examine
    from vlmds.experiments.reading import load_experiment

    code = examine(
        load_experiment(args.exp, overrides(args)),
        args.output,
        seconds=args.seconds,
        samples=args.samples,
        wanted=args.samples_per_second,
    )
    if work_is_left():  # Python's normal exit may abort while a check still runs in a thread
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def fetch(args: argparse.Namespace) -> int:
    load("vlmds.models.fetch")
    from vlmds.experiments.reading import load_experiment
    from vlmds.models.artifact import artifact_experiment, resolve_artifact
    from vlmds.models.fetch import fetch_newest
    from vlmds.runs.folder import final_artifact
    from vlmds.runs.initial import initial_projector

    if args.run is None:
        experiment = load_experiment(args.exp, args.set)
    elif (Path(args.run) / "run.json").is_file():  # perhaps without a finished stage
        experiment = load_experiment(Path(args.run) / "experiment.yaml", args.set)
    else:
        experiment = artifact_experiment(final_artifact(resolve_artifact(args.run)), args.set)
    if args.run is None and (initial := initial_projector(experiment)):
        print(initial, flush=True)
    for line in fetch_newest(experiment):
        print(line, flush=True)
    return 0


def schema(args: argparse.Namespace) -> int:
    from vlmds.experiments.json_schema import configuration_page, schema_text

    print(configuration_page() if args.markdown else schema_text(), end="")
    return 0


def demo(args: argparse.Namespace) -> int:
    load("vlmds.demo.run")
    from vlmds.demo.run import run_demo

    run_demo(args.output, args.exp)
    return 0


def add_plan(commands) -> None:
    command = commands.add_parser(
        "plan",
        help="predict memory, steps and hours of an experiment; needs no weights",
        description="Prints parameters, visual tokens, memory per GPU, steps and hours of an experiment, and "
        "checks what training would check. Needs neither weights nor a GPU.",
    )
    add = command.add_argument
    add_exp(add, required=True)
    add_data(add, "packed dataset: gives the number of steps and the cost of each store")
    add_set(add)
    add("--gpus", type=int, default=1, metavar="N", help="number of GPUs (default: 1)")
    add(
        "--gpu",
        metavar="NAME",
        help="type of GPU, such as h200, a100-40 or rtx4090: proposes micro-batch, accumulation and activation "
        "checkpointing for it",
    )
    add(
        "--samples-per-second",
        type=float,
        metavar="X",
        help="training speed of one GPU, for the cost of the stores (default: estimated)",
    )
    add("--cores-per-gpu", type=float, default=8.0, metavar="X", help="CPU cores for decoding per GPU (default: 8)")
    command.set_defaults(call=plan)


def add_doctor(commands) -> None:
    command = commands.add_parser(
        "doctor",
        help="check that this machine, or under a launcher this cluster, is ready to train",
        description="Checks GPUs, versions, limits, disks, models, data and decoding speed, and prints a fix for "
        "each problem. Under a launcher it checks all nodes and the links between them.",
    )
    add = command.add_argument
    add_exp(add, default="e8")
    add_data(add, "packed dataset to check")
    add("--output", type=Path, default=Path("runs"), metavar="DIR", help="folder of future runs (default: ./runs)")
    add(
        "--samples-per-second",
        type=float,
        metavar="X",
        help="speed that decoding must reach, of all ranks together (default: predicted for the GPUs)",
    )
    add("--samples", type=int, default=64, metavar="N", help="samples to read on each node (default: 64)")
    add("--seconds", type=float, default=30.0, metavar="X", help="time limit of each check (default: 30)")
    add_set(add)
    add_local_rank(command)
    command.set_defaults(call=doctor)


def add_fetch(commands) -> None:
    command = commands.add_parser(
        "fetch",
        help="download the pretrained models before a training",
        description="Downloads the pretrained models and the projector.init of an experiment into the cache of the "
        "Hugging Face hub (HF_HOME), for machines without a network. Models that are already there are updated to "
        "the newest commit.",
    )
    which = command.add_mutually_exclusive_group(required=True)
    add_exp(which.add_argument)
    which.add_argument(
        "--run", metavar="RUN", help="run folder or artifact: download the commits that it was trained from"
    )
    add_set(command.add_argument)
    command.set_defaults(call=fetch)


def add_schema(commands) -> None:
    command = commands.add_parser(
        "schema",
        help="print the JSON Schema of experiment files, for editors",
        description="Prints the JSON Schema of experiment files. An editor with the YAML language server completes "
        "and checks the keys of files that begin with '# yaml-language-server: $schema=PATH'.",
    )
    command.add_argument(
        "--markdown",
        action="store_true",
        help="print docs/configuration.md instead: every key with its type, default and meaning",
    )
    command.set_defaults(call=schema)


def add_demo(commands) -> None:
    command = commands.add_parser(
        "demo",
        help="run everything on tiny generated models and videos, on a CPU",
        description="Generates videos and tiny models, packs, trains both stages and captions held-out clips: five "
        "to seven minutes on two CPU cores, without a network.",
    )
    command.add_argument("--exp", default="demo", help="packaged experiment, run in tiny form (default: demo)")
    command.add_argument("--output", type=Path, default=Path("demo"), metavar="DIR", help="default: ./demo")
    command.set_defaults(call=demo)
