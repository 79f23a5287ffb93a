"""Options that several commands share, and the announced import of what they need."""

from __future__ import annotations

import argparse
from importlib import import_module

from vlmds.console.progress import phase
from vlmds.inference.options import GenerationOptions


def add_exp(add, default: str | None = None, **more) -> None:
    shown = f" (default: {default})" if default else ", such as e7"
    add("--exp", default=default, help=f"YAML file, or name of a packaged experiment{shown}", **more)


def add_data(add, help: str) -> None:
    add("--data", metavar="DIR", help=help)


def add_set(
    add, help: str = "override keys of the experiment, such as training.micro_batch=4 or llm.model=/models/Qwen3-8B"
) -> None:
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=help)


def add_loading(add) -> None:
    """Options of the commands that load a trained run."""
    add("--device", help="cpu, cuda:0, … (default: the first GPU, else the CPU)")
    add_set(add, "override the paths of the models, such as llm.model=/models/Qwen3-8B")


def add_generation(add) -> None:
    for name, type, default, help in GenerationOptions.command_line().values():
        add(f"--{name.replace('_', '-')}", type=type, default=default, help=help)


def generation_options(args: argparse.Namespace) -> GenerationOptions:
    return GenerationOptions(
        **{field: getattr(args, name) for field, (name, *_) in GenerationOptions.command_line().items()}
    )


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """The deepspeed launcher passes it; ranks take theirs from the environment."""
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def overrides(args: argparse.Namespace) -> list[str]:
    """``--set``, and ``--data`` as the key that it stands for."""
    return [*args.set, *([f"data.path={args.data}"] if args.data else [])]


def load(module: str) -> None:
    """Import a module that takes seconds, and say so."""
    with phase("loading PyTorch and transformers"):
        import_module(module)


def share(text: str) -> float:
    """ "3%" and "0.03" alike. Raises ValueError, or an error for argparse if it is a number of 1 or more without %."""
    number = float(text.removesuffix("%"))
    if text.endswith("%"):
        return number / 100
    if number >= 1:
        raise argparse.ArgumentTypeError(f"{text} is {number:.0%}; write {number:g}% or {number / 100:g}")
    return number
