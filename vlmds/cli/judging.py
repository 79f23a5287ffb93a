"""`vlmds judge`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlmds.cli.options import add_data, load
from vlmds.errors import InputError

REVIEWS = Path("reviews")


def judge(args: argparse.Namespace) -> int:
    """Returns 0, or 3 if it was interrupted."""
    from vlmds.evaluation.judged import position_bias
    from vlmds.evaluation.reviews import PLAN, read_answers
    from vlmds.judge.endpoint import Endpoint
    from vlmds.judge.job import JudgeJob, Prices
    from vlmds.judge.pairs import pairs_to_judge
    from vlmds.judge.store import JudgeFiles, Settings
    from vlmds.permissions import check_writable

    _check(args)
    folder = args.reviews or args.output or REVIEWS
    if args.reviews and not (folder / PLAN).is_file():
        raise InputError(
            f"--reviews {folder}: has no reviews; make them with vlmds review, or give --pairs N and -o DIR"
        )
    check_writable(folder, "--output")
    endpoint = Endpoint(args.endpoint, args.model, args.timeout)
    plan, evaluations, pairs = pairs_to_judge(
        folder, args.runs, number=args.pairs, evaluation=args.evaluation, data=args.data
    )
    for warning in evaluations.warnings:
        print(f"note: {warning}", file=sys.stderr)
    data = args.data or plan.dataset or evaluations.data
    if args.frames and not data:
        raise InputError("--data: give the packed dataset of the clips; the evaluations name none")
    frames = None
    if args.frames and data:
        load("vlmds.judge.frames")
        from vlmds.judge.frames import ClipFrames

        frames = ClipFrames(data, plan.split, {pair.clip for pair in pairs}, args.frames)
    files = JudgeFiles(folder, args.name or args.model, Settings(args.model, args.rubric, args.frames))
    job, prices = JudgeJob(files, endpoint, evaluations, plan, pairs, frames), Prices(args.price_in, args.price_out)
    print(job.cost_line(prices), file=sys.stderr)
    if job.tasks:
        job.check_cost(prices, args.yes)
        endpoint.check()
        try:
            job.run(args.parallel)
        except KeyboardInterrupt:
            print("vlmds: stopped; the same command continues", file=sys.stderr)
            return 3
    for line in job.result_lines(prices):
        print(line)
    bias = position_bias(read_answers(files.answers, plan)[0])
    print(
        f"same answer in both orders: {bias.same:,} of {bias.pairs:,} pairs; twice the first place {bias.first:,}, twice the "
        f"second {bias.second:,}"
    )
    if bias.biased:
        print(
            f"WARNING: judge {files.name} prefers a position, not a caption: vlmds compare does not use its answers",
            file=sys.stderr,
        )
    print(f"saved: {files.answers}\nnext: vlmds compare RUN… --reviews {folder}")
    return 0


def _check(args: argparse.Namespace) -> None:
    for name, least in (
        ("pairs", 1),
        ("frames", 0),
        ("parallel", 1),
        ("timeout", 1),
        ("price_in", 0),
        ("price_out", 0),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} {value:g}: must be at least {least}")


def add_judge(commands) -> None:
    command = commands.add_parser(
        "judge",
        help="ask a model which of two captions is better",
        description="Asks a model on any OpenAI-compatible server about pairs of captions of evaluated runs, each in both "
        "orders. It prints the expected cost before it starts; the same command resumes. The API key is "
        "read from OPENAI_API_KEY. vlmds compare --reviews shows the answers, corrected with people's answers.",
    )
    add = command.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="evaluated runs (default: the runs of the reviews)")
    add("--endpoint", required=True, metavar="URL", help="address of the server, such as http://localhost:8000/v1")
    add("--model", required=True, metavar="NAME", help="the model, as the server names it")
    which = command.add_mutually_exclusive_group()
    which.add_argument(
        "--pairs",
        type=int,
        metavar="N",
        help="total number of pairs (default: the pairs of the reviews in -o, or 200 at random)",
    )
    which.add_argument("--reviews", type=Path, metavar="DIR", help="judge the pairs of these reviews, and write there")
    add("-o", "--output", type=Path, metavar="DIR", help="folder of the answers (default: reviews)")
    add("--frames", type=int, default=0, metavar="N", help="send N frames of each clip (default: 0, text only)")
    add_data(command.add_argument, "packed dataset of the clips, for --frames (default: the evaluations')")
    add("--rubric", choices=("ko", "en"), default="ko", help="language of the rubric (default: ko)")
    add("--as", dest="name", metavar="NAME", help="name of the judge (default: the model's)")
    add("--parallel", type=int, default=4, metavar="N", help="simultaneous requests (default: 4)")
    add("--timeout", type=float, default=120.0, metavar="SECONDS", help="time limit of a request (default: 120)")
    add("--price-in", type=float, metavar="PRICE", help="price of a million input tokens, to show the cost")
    add("--price-out", type=float, metavar="PRICE", help="price of a million output tokens")
    add("--yes", action="store_true", help="start without limits of cost and number of requests")
    add("--evaluation", metavar="NAME", help="folder under RUN/evaluation (default: val)")
    command.set_defaults(call=judge)
