"""`vlmds sweep`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from vlmds.cli.comparing import write_comparison
from vlmds.cli.options import add_data, add_set, load, share
from vlmds.console.progress import log_line
from vlmds.errors import InputError


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
    others |= {"--rates": args.rates, "--tune-share": args.tune_share}
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
        type=share,
        metavar="SHARE",
        help="share of a stage's steps that each pilot of --tune lr trains (default: 10%%)",
    )
    add(
        "--launcher",
        metavar="'COMMAND'",
        help="launcher of the trainings (default: deepspeed), such as 'torchrun --nproc-per-node 8'",
    )
    add("--evaluate", default="", metavar="'OPTIONS'", help="options of vlmds evaluate, such as '--beams 3'")
    add("--emit", choices=("slurm",), help="print a Slurm array script instead of running")
    add("--demo", action="store_true", help="use tiny models and the generated clips of vlmds demo")
    add(
        "--known",
        action="store_true",
        help="with --demo: a harder set of clips whose comparison has a known result; exit code 1 if the result "
        "differs (default folder: known)",
    )
    add("--quick", action="store_true", help="with --known: fewer experiments and clips (default folder: known-quick)")
    add_set(add)
    command.set_defaults(call=sweep)
