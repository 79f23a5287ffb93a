"""`vlmds evaluate`, `vlmds compare` and `vlmds sweep`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from vlmds.cli.options import add_data, add_generation, add_loading, add_set, generation_options, load
from vlmds.console.progress import log_line
from vlmds.errors import InputError


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
    if by_file and any(getattr(args, name) is not None for name in OUTSIDE_ONLY if name != "label"):
        raise InputError("--predictions: --num-frames, --prompt and --dtype are for --model")
    common = dict(data=args.data, split=args.split, output=args.output, clips=args.clips, again=args.again)
    load("vlmds.evaluation.zero_shot")
    from vlmds.distributed.failures import run_on_ranks
    from vlmds.distributed.ranks import is_main
    from vlmds.evaluation.outside import evaluate_predictions
    from vlmds.evaluation.results import evaluation_table
    from vlmds.evaluation.saved import evaluation_folder, read_evaluation
    from vlmds.evaluation.zero_shot import evaluate_model

    def run() -> int:
        if by_file:
            folder = evaluate_predictions(args.predictions, name=args.label, **common)
        else:
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


def compare(args: argparse.Namespace) -> int:
    write_comparison(
        args.runs,
        args.output,
        evaluation=args.evaluation,
        metric=args.metric,
        words=args.words,
        columns=args.breakdown,
        errors=args.errors,
        word_list=args.word_list,
        margin=args.margin,
        csv=args.csv,
        latex=args.latex,
        json=args.json,
        reviews=args.reviews,
        by=args.by,
    )
    return 0


def power(args: argparse.Namespace) -> int:
    from vlmds.evaluation.power import measured, power_table
    from vlmds.evaluation.statistics import Spread

    for name in ("difference", "power"):
        if not 0 < getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name):g}: not a share between 0 and 1, such as 3% or 0.03")
    if args.experiments is not None and args.experiments < 2:
        raise InputError(f"--experiments {args.experiments}: must be at least 2")
    if not args.runs and args.clip_sd is None:
        raise InputError("RUN: give evaluated runs, or assume --clip-sd (and --seed-sd)")
    parts, methods = Spread(0.0, None), 8
    if args.runs:
        from vlmds.evaluation.compare import estimates_of
        from vlmds.evaluation.evaluated_runs import load_run

        metric, found = estimates_of([load_run(path, args.evaluation) for path in args.runs], args.metric)
        if args.clip_sd is None or args.seed_sd is None:
            parts, methods = measured(found), len(found.values)
        print(f"{metric}, measured on {found.clips:,} clips of {found.sources:,} videos")
    clip_sd = parts.clip_sd if args.clip_sd is None else args.clip_sd
    parts = Spread(clip_sd, parts.seed_sd if args.seed_sd is None else args.seed_sd)
    print(power_table(parts, args.difference, args.seeds, args.experiments or methods, args.power))
    return 0


def write_comparison(
    runs: list[Path],
    output: Path,
    *,
    evaluation: str | None = None,
    metric: str | None = None,
    words: Sequence[str] = (),
    columns: Sequence[str] = (),
    errors: bool = False,
    word_list: Path | None = None,
    margin: float | None = None,
    csv: Path | None = None,
    latex: Path | None = None,
    json: Path | None = None,
    reviews: Path | None = None,
    by: str = "metrics",
) -> None:
    from vlmds.evaluation.adopt import adopt_sentence
    from vlmds.evaluation.compare import compare
    from vlmds.evaluation.error_kinds import read_word_list
    from vlmds.evaluation.evaluated_runs import load_evaluated
    from vlmds.evaluation.people_report import add_people, closing_line, people_text
    from vlmds.evaluation.report import to_csv, to_json, to_latex, write_report
    from vlmds.evaluation.verdict import MARGIN
    from vlmds.files import write

    if by == "people" and reviews is None:
        raise InputError("--by people: give the folder of reviews with --reviews DIR (made by vlmds review)")
    kinds = read_word_list(word_list) if errors or word_list else None
    loaded, outside = load_evaluated(runs, evaluation)
    of_metric = MARGIN if margin is None or by == "people" else margin
    found = compare(loaded, metric, [chosen.split() for chosen in words], of_metric, outside, columns, kinds)
    if reviews:
        add_people(found, loaded, reviews, by, margin if by == "people" else None)
    size = write_report(output, loaded, found, outside)
    for path, text in ((csv, to_csv), (latex, to_latex), (json, to_json)):
        if path:
            write(path, text(found))
    for warning in found["warnings"]:
        print(f"WARNING: {warning['en']}", file=sys.stderr)
    if reviews:
        print(people_text(found))
    print(closing_line(found))
    if answer := adopt_sentence(found):
        print(answer[0])
    print(f"saved: {output} ({size / 1e6:.1f} MB)")


def sweep(args: argparse.Namespace, size=None) -> int:
    """Returns 0 if all experiments are done, 2 if one refused its input, 3 if a signal stopped one, else 1."""
    from vlmds.training import sweep as module

    if args.known or args.quick:
        return _known_sweep(args)
    exps = module.choose(args.exps, args.all or (args.demo and not args.exps), args.owner)
    data, output, launcher, environment, words = args.data, args.output, args.launcher, {}, []
    options = tuple(shlex.split(args.evaluate))
    if args.demo:
        from vlmds.demo.run import RANKS, Size, direction_words, prepare_sweep
        from vlmds.distributed.ranks import cpu_environment, free_port

        root = (output or Path("demo")).absolute()
        exps = prepare_sweep(root, exps, size or Size())
        data, output, words = str(root / "shards"), root / "runs", [direction_words()]
        options = ("--max-new-tokens", "32", *options)
        environment = cpu_environment(RANKS)
        launcher = launcher or f"deepspeed --num_gpus {RANKS} --master_port {free_port()}"
    output, launcher = output or Path("runs"), launcher or "deepspeed"
    jobs = module.plan_jobs(exps, output, seeds=args.seeds, share_stage1=args.share_stage1, overrides=tuple(args.set))
    experiments = [job.experiment for job in jobs]
    if data is None and not all(e.for_stage(stage.name).data.given for e in experiments for stage in e.stages):
        raise InputError("--data: no data given; pass a folder made by vlmds pack")
    tune = _tuner(args, jobs, output, data, launcher, environment)
    if args.emit:
        print(module.slurm_script(jobs, data, launcher, options), end="")
        return 0
    try:
        code = module.run_jobs(jobs, data, launcher, options, environment, tune)
    finally:
        log_line(module.status_table(jobs))
    evaluated = [job.run for job in jobs if job.evaluated]
    if evaluated and code != module.STOPPED:
        write_comparison(evaluated, output / "report.html", words=words)
    return code


def _tuner(args: argparse.Namespace, jobs: list, output: Path, data: str | None, launcher: str, environment: dict):
    """What chooses the learning rates of a job, with --tune; else None."""
    given = [name for name, value in (("--rates", args.rates), ("--tune-share", args.tune_share)) if value is not None]
    if args.tune is None:
        if given:
            raise InputError(f"{given[0]}: goes with --tune lr")
        return None
    for option, value in (("--emit", args.emit), ("--share-stage1", args.share_stage1)):
        if value:
            why = "a Slurm array cannot choose" if option == "--emit" else "each experiment has rates of its own"
            raise InputError(f"{option}: not with --tune lr, {why}; run vlmds sweep --tune lr without it")
    from vlmds.training.tune import FACTORS, SHARE, Tuning, check_untuned, tune

    factors = FACTORS if args.rates is None else args.rates
    share = SHARE if args.tune_share is None else args.tune_share
    how = Tuning(output, data, launcher, environment, factors, share)
    check_untuned(jobs)
    return lambda job: tune(job, how)


def _known_sweep(args: argparse.Namespace) -> int:
    """Returns 0 if all exact rows pass, 3 if a signal stopped a run, else 1."""
    if not (args.demo and args.known):
        raise InputError("--known: goes with --demo, and --quick with both: vlmds sweep --demo --known --quick")
    others = {"EXP": args.exps, "--all": args.all, "--owner": args.owner, "--data": args.data, "--emit": args.emit}
    others |= {"--tune": args.tune, "--share-stage1": args.share_stage1, "--seeds": args.seeds > 1}
    if given := [name for name, value in others.items() if value]:
        raise InputError(f"{given[0]}: not with --known, which has experiments and data of its own")
    load("vlmds.demo.known")
    from vlmds.demo.known import FULL, QUICK, known_sweep
    from vlmds.demo.run import RANKS
    from vlmds.distributed.ranks import cpu_environment, free_port

    root = args.output or Path("known-quick" if args.quick else "known")
    launcher = args.launcher or f"deepspeed --num_gpus {RANKS} --master_port {free_port()}"
    options = ("--max-new-tokens", "32", "--batch-size", "32", *shlex.split(args.evaluate))
    size = QUICK if args.quick else FULL
    return known_sweep(root.absolute(), size, launcher, cpu_environment(RANKS), options, tuple(args.set))


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
    add("--name", dest="label", metavar="NAME", help="of what made these captions; results go to runs/NAME")
    add("--num-frames", type=int, metavar="N", help="frames of each clip for --model (default: 8)")
    add("--prompt", metavar="TEXT", help="for --model (default: data.prompt of an experiment)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="of --model's weights (default: bfloat16)")
    add_data(add, "packed dataset (default: the run's own)")
    add("--split", help="split to evaluate (default: val, or the only one)")
    add("--output", type=Path, metavar="DIR", help="for the results (default: RUN/evaluation/SPLIT)")
    add("--as", dest="name", metavar="NAME", help="write to RUN/evaluation/NAME, beside other evaluations")
    add("--clips", type=int, metavar="N", help="evaluate only N clips, evenly spaced (default: all)")
    add_generation(add)
    add("--batch-size", type=int, default=8, metavar="N", help="clips per batch (default: 8)")
    add("--again", action="store_true", help="repeat a finished evaluation, or replace one that has other settings")
    add_loading(add)
    command.set_defaults(call=evaluate)


def add_compare(commands) -> None:
    command = commands.add_parser(
        "compare",
        help="compare evaluated runs: which one is best, and is the difference significant",
        description="Compares evaluated runs with significance tests and writes one offline HTML page in "
        "English and Korean.",
    )
    add = command.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folders that were evaluated, and outside evaluations")
    add("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help="page (default: report.html)")
    add("--evaluation", metavar="NAME", help="folder under RUN/evaluation (default: val)")
    add("--metric", metavar="NAME", help="metric that decides (default: cider_d@morpheme, if the runs have it)")
    add(
        "--words",
        action="append",
        default=[],
        metavar="'WORD WORD …'",
        help="add the accuracy of these words in captions, such as '왼쪽 오른쪽'; may be given several times",
    )
    add(
        "--errors",
        action="store_true",
        help="add a table of errors by kind: object, attribute, action, number, direction",
    )
    add(
        "--word-list",
        type=Path,
        metavar="FILE",
        help="YAML with words of kinds and their synonyms for that table, before those of vlmds; switches it on",
    )
    add(
        "--breakdown",
        action="append",
        default=[],
        metavar="COLUMN",
        help="show the metric for each value of this column, which vlmds pack --keep-columns kept; may be given several "
        "times (default: all with two to twelve values)",
    )
    add(
        "--margin",
        type=_share,
        metavar="SHARE",
        help="how much worse than the best a cheaper experiment may be, as a share of its value (default: 0.03); with --by "
        "people, how far below one half the probability may be that it is preferred (default: 0.05)",
    )
    add("--reviews", type=Path, metavar="DIR", help="folder of vlmds review: what people and judges answered")
    add(
        "--by",
        choices=("metrics", "people"),
        default="metrics",
        help="what the verdict is by: metrics (default), or people's preference in --reviews",
    )
    add("--csv", type=Path, metavar="FILE", help="also write the table as CSV")
    add("--json", type=Path, metavar="FILE", help="also write all figures as JSON")
    add("--latex", type=Path, metavar="FILE", help="also write the table as LaTeX")
    command.set_defaults(call=compare)


def add_power(commands) -> None:
    command = commands.add_parser(
        "power",
        help="how many clips and seeds a comparison needs",
        description="How many clips and seeds find a difference between experiments of a given size: from the "
        "spread of existing evaluations, or from stated assumptions. All shares are of the metric's value.",
    )
    add = command.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="evaluated runs of two experiments or more")
    add("--difference", type=_share, default=0.03, metavar="SHARE", help="to be found, such as 3%% (default)")
    add("--power", type=_share, default=0.8, metavar="SHARE", help="probability to find it (default: 0.8)")
    add("--seeds", type=_seed_range, default=[*range(1, 6)], metavar="FIRST..LAST", help="default: 1..5")
    add("--experiments", type=int, metavar="N", help="compared with one another (default: those of the runs, or 8)")
    add(
        "--clip-sd",
        type=_share,
        metavar="SHARE",
        help="assumed standard deviation of the difference between two experiments on one clip, such as 60%%",
    )
    add("--seed-sd", type=_share, metavar="SHARE", help="assumed one of an experiment over its seeds, such as 2%%")
    add("--evaluation", metavar="NAME", help="folder under RUN/evaluation (default: val)")
    add("--metric", metavar="NAME", help="metric of the runs (default: cider_d@morpheme, if the runs have it)")
    command.set_defaults(call=power)


def _seed_range(text: str) -> list[int]:
    """ "1..5" or "3" as numbers. Raises ValueError."""
    first, _, last = text.partition("..")
    found = [*range(int(first), int(last or first) + 1)]
    if not found or found[0] < 1:
        raise ValueError(f"{text}: not a range such as 1..5")
    return found


def _share(text: str) -> float:
    """ "3%" and "0.03" alike. Raises ValueError, or an error for argparse if it is a number of 1 or more without %."""
    number = float(text.removesuffix("%"))
    if text.endswith("%"):
        return number / 100
    if number >= 1:
        raise argparse.ArgumentTypeError(f"{text} is {number:.0%}; write {number:g}% or {number / 100:g}")
    return number


def _factors(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def add_sweep(commands) -> None:
    command = commands.add_parser(
        "sweep",
        help="train, evaluate and compare several experiments",
        description="Trains and evaluates several experiments in order of priority, then compares them. "
        "Started again, it skips what is finished and resumes the rest.",
    )
    add = command.add_argument
    add("exps", nargs="*", metavar="EXP", help="packaged names such as e1, or YAML files")
    add("--all", action="store_true", help="all of e1 to e8")
    add("--owner", metavar="NAME", help="all packaged experiments of this owner")
    add_data(add, "packed dataset")
    add("--output", type=Path, metavar="DIR", help="folder of the runs (default: runs; with --demo: demo)")
    add(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="train each experiment with N seeds (default: 1, which compares these checkpoints only; with 3 the "
        "verdict is on the methods; vlmds power says how many are needed)",
    )
    add(
        "--share-stage1",
        action="store_true",
        help="train stage 1 once per projector: faster, but runs that share it are not independent",
    )
    add(
        "--tune",
        choices=("lr",),
        help="choose the learning rate of each stage of each experiment by short pilot runs first; the smallest "
        "validation loss decides",
    )
    add(
        "--rates",
        type=_factors,
        metavar="N,N,…",
        help="rates that --tune lr tries, as multiples of each stage's own (default: 0.1,0.3,1,3)",
    )
    add(
        "--tune-share",
        type=_share,
        metavar="SHARE",
        help="share of a stage's steps that each pilot of --tune lr trains (default: 10%%)",
    )
    add("--launcher", metavar="'COMMAND'", help="default: deepspeed; another is 'torchrun --nproc-per-node 8'")
    add("--evaluate", default="", metavar="'OPTIONS'", help="options of vlmds evaluate, such as '--beams 3'")
    add("--emit", choices=("slurm",), help="print a Slurm array script instead of running")
    add("--demo", action="store_true", help="use tiny models and the generated clips of vlmds demo")
    add(
        "--known",
        action="store_true",
        help="with --demo: a harder set of clips whose comparison has a known result; exit code 1 if it comes out "
        "otherwise (default folder: known)",
    )
    add("--quick", action="store_true", help="with --known: fewer experiments and clips (default folder: known-quick)")
    add_set(add)
    command.set_defaults(call=sweep)
