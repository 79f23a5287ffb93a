"""`vlmds bench`: a benchmark for each claim."""

from __future__ import annotations

import argparse
from pathlib import Path


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
    command = commands.add_parser("bench", help="throughput and memory, against named baselines")
    whats = command.add_subparsers(required=True, metavar="WHAT")

    def what(name: str, call, text: str):
        parser = whats.add_parser(name, help=text)
        parser.add_argument("--output", type=Path, default=Path("bench"), help="default: ./bench")
        parser.set_defaults(call=call)
        return parser.add_argument

    add = what("data", data, "packing and loading")
    add("--manifest", type=Path, help="these videos instead of made ones")
    add("--clips", type=int, default=16, help="how many to make (default: 16)")
    add("--video2dataset", metavar="PYTHON", help="pack with it, too: the Python of an environment that has it")
    what("scale", scale, "a dataset that grows")
    what("checkpoint", checkpoint, "what saving costs")
    add = what("generate", generate, "captions a second")
    add("--exp", default="e7", help="experiment (default: e7)")
    _add_models(add)
    add = what("train", train, "a training step: its time and memory, part by part")
    add("--exp", nargs="+", default=["e3"], help="experiments (default: e3)")
    add(
        "--baseline",
        action="append",
        default=[],
        choices=("reference", "hf", "lora"),
        help="the textbook form; Hugging Face's Trainer on LLaVA (linear, mlp); the same experiment "
        "with LoRA. May be given several times",
    )
    add("--steps", type=int, default=4, help="timed steps of each process (default: 4)")
    add("--ranks", type=int, default=1, help="measure so many ranks, too (default: 1)")
    _add_models(add)
    add = what("scaling", scaling, "efficiency on many GPUs, predicted: a plot")
    add("--gpu", default="h200", help="card (default: h200)")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")


def _add_models(add) -> None:
    add("--tiny", action="store_true", help="tiny random models, for a CPU")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="such as llm.model=/models/Qwen3-8B")
