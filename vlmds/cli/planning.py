"""`vlmds plan`, `vlmds doctor`, `vlmds fetch`, `vlmds schema` and `vlmds demo`: before the first run."""

from __future__ import annotations

import argparse
from pathlib import Path


def plan(args: argparse.Namespace) -> int:
    from vlmds.experiments.reading import load_experiment
    from vlmds.planning.plan import plan_experiment

    overrides = [*args.set, *([f"data.path={args.data}"] if args.data else [])]
    print(
        plan_experiment(
            load_experiment(args.exp, overrides), args.gpus, args.samples_per_second, args.cores_per_gpu, args.gpu
        )
    )
    return 0


def doctor(args: argparse.Namespace) -> int:
    from vlmds.doctor.cluster import examine
    from vlmds.experiments.reading import load_experiment

    overrides = [*args.set, *([f"data.path={args.data}"] if args.data else [])]
    return examine(
        load_experiment(args.exp, overrides),
        args.output,
        seconds=args.seconds,
        samples=args.samples,
        wanted=args.samples_per_second,
    )


def fetch(args: argparse.Namespace) -> int:
    from vlmds.experiments.reading import load_experiment
    from vlmds.models.artifact import artifact_experiment, resolve_artifact
    from vlmds.models.fetch import fetch_newest
    from vlmds.runs.folder import final_artifact

    if args.run is None:
        experiment = load_experiment(args.exp, args.set)
    elif (Path(args.run) / "run.json").is_file():  # which may have finished nothing yet
        experiment = load_experiment(Path(args.run) / "experiment.yaml", args.set)
    else:
        experiment = artifact_experiment(final_artifact(resolve_artifact(args.run)), args.set)
    for line in fetch_newest(experiment):
        print(line, flush=True)
    return 0


def schema(args: argparse.Namespace) -> int:
    from vlmds.experiments.json_schema import configuration_page, schema_text

    print(configuration_page() if args.markdown else schema_text(), end="")
    return 0


def demo(args: argparse.Namespace) -> int:
    from vlmds.demo.run import run_demo

    run_demo(args.output, args.exp)
    return 0


def add_plan(commands) -> None:
    command = commands.add_parser("plan", help="what an experiment will be; needs no weights")
    command.add_argument("--exp", required=True, help="YAML file, or name of a packaged experiment")
    command.add_argument("--data", help="packed dataset, to know the steps")
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    command.add_argument("--gpus", type=int, default=1, help="ranks (default: 1)")
    command.add_argument(
        "--gpu",
        metavar="NAME",
        help="propose micro-batch, accumulation and activation checkpointing for "
        "a card, such as h200, a100-40 or rtx4090",
    )
    command.add_argument(
        "--samples-per-second", type=float, help="training speed of one GPU, to price the stores (default: estimated)"
    )
    command.add_argument(
        "--cores-per-gpu", type=float, default=8.0, help="CPU cores that may decode for one GPU (default: 8)"
    )
    command.set_defaults(call=plan, module="vlmds.planning.plan")


def add_doctor(commands) -> None:
    command = commands.add_parser(
        "doctor", help="check whether this machine, or under a launcher this cluster, is ready to train"
    )
    add = command.add_argument
    add("--exp", default="e8", help="experiment to check for (default: e8, the largest)")
    add("--data", help="packed dataset to check")
    add("--output", type=Path, default=Path("runs"), help="where runs will be (default: ./runs)")
    add(
        "--samples-per-second",
        type=float,
        metavar="X",
        help="training speed over all ranks that decoding must reach (default: predicted for the GPUs)",
    )
    add("--samples", type=int, default=64, help="samples to read on each node (default: 64)")
    add("--seconds", type=float, default=30.0, help="time limit of one check (default: 30)")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    command.set_defaults(call=doctor, module="vlmds.doctor.cluster")


def add_fetch(commands) -> None:
    command = commands.add_parser(
        "fetch",
        help="download the pretrained models ahead of a start",
        description="Downloads what a start would, into the cache of the Hugging Face hub (HF_HOME), "
        "for machines without a network; where the models are there already, a newer commit.",
    )
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--exp", help="YAML file, or name of a packaged experiment")
    which.add_argument("--run", metavar="RUN", help="run folder or artifact: the commits it was trained from")
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    command.set_defaults(call=fetch, module="vlmds.models.fetch")


def add_schema(commands) -> None:
    command = commands.add_parser(
        "schema",
        help="the JSON Schema of experiment files, for editors",
        description="Prints the JSON Schema of experiment files. An editor with the YAML language "
        "server then completes and checks the keys of a file that begins with "
        "'# yaml-language-server: $schema=PATH'.",
    )
    command.add_argument(
        "--markdown",
        action="store_true",
        help="print the page docs/configuration.md instead: every key with its type, default and meaning",
    )
    command.set_defaults(call=schema)


def add_demo(commands) -> None:
    command = commands.add_parser("demo", help="everything on tiny models and videos made here, on a CPU")
    command.add_argument("--exp", default="demo", help="a packaged experiment, in tiny form (default: demo)")
    command.add_argument("--output", type=Path, default=Path("demo"), help="default: ./demo")
    command.set_defaults(call=demo, module="vlmds.demo.run")
