"""`vlmds bench`: benchmarks of speed and memory."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlmds.cli.options import add_set


def data(args: argparse.Namespace) -> int:
    from vlmds.bench.data import bench_data

    bench_data(args.output, args.manifest, args.clips, video2dataset=args.video2dataset)
    return 0


def scale(args: argparse.Namespace) -> int:
    from vlmds.bench.large_index import bench_scale

    bench_scale(args.output)
    return 0


def checkpoint(args: argparse.Namespace) -> int:
    from vlmds.bench.checkpoint import bench_checkpoint

    bench_checkpoint(args.output)
    return 0


def generate(args: argparse.Namespace) -> int:
    from vlmds.bench.generate import bench_generate

    bench_generate(args.output, args.exp, tiny=args.tiny, overrides=args.set)
    return 0


def train(args: argparse.Namespace) -> int:
    from vlmds.bench.train import bench_train

    bench_train(
        args.output,
        args.exp,
        tiny=args.tiny,
        baselines=args.baseline,
        steps=args.steps,
        ranks=args.ranks,
        overrides=args.set,
    )
    return 0


def scaling(args: argparse.Namespace) -> int:
    from vlmds.bench.many_gpus import bench_scaling

    bench_scaling(args.output, args.gpu, args.set)
    return 0


def add_bench(commands) -> None:
    command = commands.add_parser("bench", help="measure speed and memory, compared with named baselines")
    whats = command.add_subparsers(required=True, metavar="BENCHMARK")

    def what(name: str, call, text: str):
        parser = whats.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        parser.add_argument(
            "--output",
            type=Path,
            default=Path("bench"),
            metavar="DIR",
            help="for results and working files (default: ./bench)",
        )
        parser.set_defaults(call=call)
        return parser.add_argument

    add = what("data", data, "speed of packing and of loading samples")
    add("--manifest", type=Path, metavar="FILE", help="videos to use (default: generated ones)")
    add("--clips", type=int, default=16, help="number of generated videos (default: 16)")
    add(
        "--video2dataset",
        metavar="PYTHON",
        help="also pack with video2dataset: path of the Python of an environment that has it",
    )
    what("scale", scale, "cost of opening and reading an index, for growing datasets")
    what("checkpoint", checkpoint, "cost of saving checkpoints during training")
    add = what("generate", generate, "captions per second")
    add("--exp", default="e7", help="packaged name or YAML file (default: e7)")
    _add_models(add)
    add = what("train", train, "time and memory of a training step, part by part")
    add("--exp", nargs="+", default=["e3"], help="packaged names or YAML files (default: e3)")
    add(
        "--baseline",
        action="append",
        default=[],
        choices=("reference", "hf", "lora"),
        help="also measure a baseline: reference (a plain implementation), hf (Hugging Face's Trainer on "
        "LLaVA; linear and mlp only), lora (the same experiment with LoRA). May be given several times",
    )
    add("--steps", type=int, default=4, help="timed steps per process (default: 4)")
    add("--ranks", type=int, default=1, help="also measure with this number of ranks (default: 1)")
    _add_models(add)
    add = what("scaling", scaling, "predicted efficiency on many GPUs, as a plot")
    add("--gpu", default="h200", metavar="NAME", help="type of GPU (default: h200)")
    add_set(add)


def _add_models(add) -> None:
    add("--tiny", action="store_true", help="use tiny random models, for a CPU")
    add_set(add)
