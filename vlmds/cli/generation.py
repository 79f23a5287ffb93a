"""Options of the commands that load a trained run and generate captions."""

from __future__ import annotations

import argparse

from vlmds.inference.options import GenerationOptions


def add_generation(command) -> None:
    for name, type, default, help in GenerationOptions.command_line().values():
        command.add_argument(f"--{name.replace('_', '-')}", type=type, default=default, help=help)


def add_loading(command) -> None:
    add = command.add_argument
    add("--device", help="cpu, cuda:0, … (default: the first GPU, else the CPU)")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override the paths of the models, such as llm.model=/models/Qwen3-8B",
    )


def generation_options(args: argparse.Namespace) -> GenerationOptions:
    return GenerationOptions(
        **{field: getattr(args, name) for field, (name, *_) in GenerationOptions.command_line().items()}
    )
