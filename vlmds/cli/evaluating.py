"""`vlmds evaluate`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from vlmds.cli.options import add_data, add_generation, add_loading, generation_options, load
from vlmds.errors import InputError
from vlmds.inference.options import BATCH_SIZE, GenerationOptions


def evaluate(args: argparse.Namespace) -> int:
    if args.predictions is not None or args.model is not None:
        return _evaluate_outside(args)
    if args.run is None:
        raise InputError("--run: give a run folder; or another model with --model, or captions with --predictions FILE")
    for name, option in OUTSIDE_ONLY.items():
        if getattr(args, name) is not None:
            raise InputError(f"{option}: is for --model and --predictions; a run has its own")
    load("vlmds.evaluation.evaluate")
    from vlmds.distributed.failures import run_on_ranks
    from vlmds.distributed.ranks import is_main
    from vlmds.evaluation.evaluate import evaluate_run
    from vlmds.evaluation.results import evaluation_table
    from vlmds.evaluation.saved import read_evaluation

    def run() -> int:
        folder = evaluate_run(
            args.run,
            data=args.data,
            split=args.split,
            output=args.output,
            name=args.name,
            clips=args.clips,
            batch_size=args.batch_size,
            generation=generation_options(args),
            device=args.device,
            overrides=args.set,
            again=args.again,
        )
        if is_main():
            print(f"{evaluation_table(read_evaluation(folder)[0])}\nsaved: {folder}")
        return 0

    return run_on_ranks(run)


OUTSIDE_ONLY = {"label": "--name", "num_frames": "--num-frames", "prompt": "--prompt", "dtype": "--dtype"}
"""Options of captions that no run made; None is not given."""


def _evaluate_outside(args: argparse.Namespace) -> int:
    """`vlmds evaluate --predictions FILE` and `--model MODEL`."""
    by_file = args.predictions is not None
    what = "--predictions" if by_file else "--model"
    if by_file and args.model is not None:
        raise InputError("--predictions: does not go with --model; leave one of them out")
    for given, option in ((args.run, "--run"), (args.name, "--as"), (args.set or None, "--set")):
        if given is not None:
            raise InputError(f"{option}: does not go with {what}, whose captions no run made")
    needed = [(args.data, "--data DIR"), *([(args.label, "--name NAME")] if by_file else [])]
    for given, option in needed:
        if given is None:
            raise InputError(f"{what}: give {option} as well")
    if by_file:
        _refuse_options_of_models(args)
    common = dict(data=args.data, split=args.split, output=args.output, clips=args.clips, again=args.again)
    if not by_file:
        _load_zero_shot()
    from vlmds.distributed.failures import run_on_ranks
    from vlmds.distributed.ranks import is_main
    from vlmds.evaluation.outside import evaluate_predictions
    from vlmds.evaluation.results import evaluation_table
    from vlmds.evaluation.saved import evaluation_folder, read_evaluation

    def run() -> int:
        if by_file:
            folder = evaluate_predictions(args.predictions, name=args.label, **common)
        else:
            from vlmds.evaluation.zero_shot import evaluate_model

            chosen = {name: value for name in ("num_frames", "prompt", "dtype") if (value := getattr(args, name))}
            folder = evaluate_model(
                args.model,
                name=args.label,
                batch_size=args.batch_size,
                generation=generation_options(args),
                device=args.device,
                **chosen,
                **common,
            )
        if is_main():
            metrics, _ = read_evaluation(evaluation_folder(folder, args.split))
            print(evaluation_table(metrics))
            print(f"saved: {folder}; compare it: vlmds compare RUN … {shlex.quote(str(folder))}")
        return 0

    return run_on_ranks(run)


def _refuse_options_of_models(args: argparse.Namespace) -> None:
    """Raises InputError: options of captioning beside --predictions, which would change nothing."""
    generation = {name: default for name, _, default, _ in GenerationOptions.command_line().values()}
    defaults = dict.fromkeys(("num_frames", "prompt", "dtype", "device")) | generation | {"batch_size": BATCH_SIZE}
    given = [f"--{name.replace('_', '-')}" for name, default in defaults.items() if getattr(args, name) != default]
    if given:
        raise InputError(f"{given[0]}: does not go with --predictions, whose captions are there already")


def _load_zero_shot() -> None:
    """Import what --model needs. Raises InputError: a torchvision of another torch, with which transformers cannot
    import its processors."""
    try:
        load("vlmds.evaluation.zero_shot")
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--model: transformers cannot be imported whole ({reason}); if torchvision is installed, install the build "
            "for this torch (0.28 for torch 2.13), or remove it"
        ) from None


def add_evaluate(commands) -> None:
    command = commands.add_parser(
        "evaluate",
        help="score a trained run's captions of a packed dataset",
        description="Captions a split of a packed dataset and scores the captions. On several GPUs: "
        "torchrun --nproc-per-node 8 -m -- vlmds.cli evaluate … After a stop, the same command resumes.",
    )
    add = command.add_argument
    add("--run", type=Path, metavar="RUN", help="run folder, or one of its artifacts")
    add(
        "--predictions",
        type=Path,
        metavar="FILE",
        help="score captions from elsewhere (another model, an API, a person): a table with the columns id and caption",
    )
    add(
        "--model",
        metavar="MODEL",
        help="caption with another model, without training: a folder, or a name on the hub (owner/name, or "
        "owner/name@revision), of transformers' image-text-to-text models",
    )
    add(
        "--name",
        dest="label",
        metavar="NAME",
        help="name of the model or person that wrote the captions; results go to runs/NAME",
    )
    add("--num-frames", type=int, metavar="N", help="frames of each clip for --model (default: 8)")
    add("--prompt", metavar="TEXT", help="prompt for --model (default: data.prompt of an experiment)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="dtype of --model's weights (default: bfloat16)")
    add_data(add, "packed dataset (default: the run's own)")
    add("--split", help="split to evaluate (default: val, or the only one)")
    add("--output", type=Path, metavar="DIR", help="folder of the results (default: RUN/evaluation/SPLIT)")
    add("--as", dest="name", metavar="NAME", help="write to RUN/evaluation/NAME, and keep other evaluations")
    add("--clips", type=int, metavar="N", help="evaluate only N clips, evenly spaced (default: all)")
    add_generation(add)
    add("--batch-size", type=int, default=BATCH_SIZE, metavar="N", help=f"clips per batch (default: {BATCH_SIZE})")
    add("--again", action="store_true", help="repeat a finished evaluation, or replace one that has other settings")
    add_loading(add)
    command.set_defaults(call=evaluate)
