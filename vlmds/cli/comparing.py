"""`vlmds compare` and `vlmds power`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vlmds.cli.options import share
from vlmds.errors import InputError


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
    from vlmds.evaluation.outside_only import compare_outside
    from vlmds.evaluation.people_report import add_people, closing_line, people_text
    from vlmds.evaluation.report import to_csv, to_json, to_latex, write_report
    from vlmds.evaluation.verdict import MARGIN
    from vlmds.files import write

    if by == "people" and reviews is None:
        raise InputError("--by people: give the folder of reviews with --reviews DIR (made by vlmds review)")
    kinds = read_word_list(word_list) if errors or word_list else None
    loaded, outside = load_evaluated(runs, evaluation)
    of_metric = MARGIN if margin is None or by == "people" else margin
    looked_for = [chosen.split() for chosen in words]
    if loaded:
        found = compare(loaded, metric, looked_for, of_metric, outside, columns, kinds)
    elif reviews:
        raise InputError("--reviews: none of the folders is a run of vlmds; name at least one that people compared")
    else:
        found = compare_outside(outside, metric, looked_for, of_metric, columns, kinds)
    if reviews:
        add_people(found, loaded, reviews, by, margin if by == "people" else None, outside)
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


def add_compare(commands) -> None:
    command = commands.add_parser(
        "compare",
        help="compare evaluated runs: which one is best, and is the difference significant",
        description="Compares evaluated runs with significance tests and writes one offline HTML page in "
        "English and Korean.",
    )
    add = command.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folders that were evaluated, and outside evaluations")
    add(
        "-o",
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the report to write (default: report.html)",
    )
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
        help="YAML file with a team's own words of each kind and their synonyms; implies --errors",
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
        type=share,
        metavar="SHARE",
        help="how much worse than the best a cheaper experiment may be, as a share of its value (default: 0.03); with --by "
        "people, how far its probability of being preferred may be below one half (default: 0.05)",
    )
    add("--reviews", type=Path, metavar="DIR", help="folder of vlmds review: what people and judges answered")
    add(
        "--by",
        choices=("metrics", "people"),
        default="metrics",
        help="decide the verdict by metrics (default), or by people's preference in --reviews",
    )
    add("--csv", type=Path, metavar="FILE", help="also write the table as CSV")
    add("--json", type=Path, metavar="FILE", help="also write all figures as JSON")
    add("--latex", type=Path, metavar="FILE", help="also write the table as LaTeX")
    command.set_defaults(call=compare)


def add_power(commands) -> None:
    command = commands.add_parser(
        "power",
        help="how many clips and seeds a comparison needs",
        description="Prints how many clips and seeds are needed to find a difference of a given size between "
        "experiments, from the spread of existing evaluations or from stated assumptions. All shares are of the "
        "metric's value.",
    )
    add = command.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="evaluated runs of two experiments or more")
    add("--difference", type=share, default=0.03, metavar="SHARE", help="difference to find, such as 3%% (default)")
    add("--power", type=share, default=0.8, metavar="SHARE", help="probability of finding it (default: 0.8)")
    add(
        "--seeds",
        type=_seed_range,
        default=[*range(1, 6)],
        metavar="FIRST..LAST",
        help="numbers of seeds to list (default: 1..5)",
    )
    add(
        "--experiments",
        type=int,
        metavar="N",
        help="number of experiments in the comparison (default: as many as the runs have, or 8)",
    )
    add(
        "--clip-sd",
        type=share,
        metavar="SHARE",
        help="assumed standard deviation of the difference between two experiments on one clip, such as 60%%",
    )
    add(
        "--seed-sd",
        type=share,
        metavar="SHARE",
        help="assumed standard deviation of an experiment over its seeds, such as 2%%",
    )
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
