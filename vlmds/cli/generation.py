"""Options of the commands that load a trained run and write captions."""

from __future__ import annotations

import argparse


def add_generation(command) -> None:
    add = command.add_argument
    add("--max-new-tokens", type=int, default=128, help="most tokens of a caption (default: 128)")
    add("--beams", type=int, default=1, help="beam search (default: 1, greedy)")
    add("--temperature", type=float, default=0.0, help="sampling (default: 0, none)")
    add("--top-p", type=float, default=1.0, help="of sampling: nucleus (default: 1, all tokens)")
    add("--repetition-penalty", type=float, default=1.0, help="default: 1, none")
    add("--seed", type=int, default=0, help="of sampling (default: 0)")


def add_loading(command) -> None:
    add = command.add_argument
    add("--device", help="cpu, cuda:0, … (default: the first GPU, else the CPU)")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override where the models lie, such as llm.model=/models/Qwen3-8B",
    )


def generation_options(args: argparse.Namespace):
    from vlmds.inference.generation import GenerationOptions

    return GenerationOptions(
        max_new_tokens=args.max_new_tokens,
        num_beams=args.beams,
        temperature=args.temperature,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )
