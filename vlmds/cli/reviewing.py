"""`vlmds review`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from vlmds.cli.options import add_data
from vlmds.errors import InputError

EXPORT = "export"


def review(args: argparse.Namespace) -> int:
    if args.runs[:1] == [EXPORT]:
        return _export(args)
    for option in ("manifest", "preferences", "split", "picked"):
        if getattr(args, option):
            raise InputError(f"--{option}: only with vlmds review export REVIEWS")
    from vlmds.serve.listening import check_installed

    check_installed("starlette", "reviewing")
    check_installed("uvicorn", "reviewing")
    from vlmds.review.app import serve_reviews
    from vlmds.review.folder import open_reviews

    folder = args.output or Path("reviews")
    opened = open_reviews(
        folder, [Path(run) for run in args.runs], data=args.data, evaluation=args.evaluation, choice=_choice(args)
    )
    for note in opened.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{folder}: {len(opened.plan.pairs):,} pairs of {len(opened.plan.runs)} runs")
    serve_reviews(opened, host=args.host, port=args.port)
    return 0


def _choice(args: argparse.Namespace) -> Any:
    """The options that choose the pairs; None if none is given."""
    from vlmds.review.choose import OVERLAP, PAIRS, Choice, read_shares

    given = (args.pairs, args.choose, args.overlap, args.stratify, args.seed)
    if all(value is None for value in given):
        return None
    for name, least in (("pairs", 1), ("overlap", 0), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name} {value}: must be at least {least}")
    return Choice(
        pairs=PAIRS if args.pairs is None else args.pairs,
        shares=None if args.choose is None else read_shares(args.choose),
        overlap=OVERLAP if args.overlap is None else args.overlap,
        stratify=args.stratify,
        seed=args.seed or 0,
    )


def _export(args: argparse.Namespace) -> int:
    from vlmds.review.corrections import write_manifest, write_preferences

    if len(args.runs) != 2:
        raise InputError(
            "review export: give one folder of reviews, such as vlmds review export reviews/ --manifest FILE"
        )
    if not (args.manifest or args.preferences):
        raise InputError("review export: give --manifest FILE, --preferences FILE, or both")
    folder = Path(args.runs[1])
    lines = []
    if args.manifest:
        lines += write_manifest(folder, args.manifest, data=args.data, split=args.split, picked=args.picked)
    if args.preferences:
        lines += write_preferences(folder, args.preferences, data=args.data)
    print("\n".join(lines))
    return 0


def add_review(commands) -> None:
    command = commands.add_parser(
        "review",
        help="a web page on which people compare captions of evaluated runs, blind; export of the answers as data",
        description="Serves a page in English and Korean that plays a clip and shows two runs' captions of it, "
        "without their names. Answers go to REVIEWER.jsonl in the folder of the reviews, which vlmds compare "
        "--reviews reads. The same command continues. `vlmds review export REVIEWS --manifest FILE` writes corrected "
        "and approved captions as a manifest for vlmds pack --append, `--preferences FILE` chosen and rejected pairs.",
    )
    add = command.add_argument
    add(
        "runs",
        nargs="*",
        metavar="RUN",
        help="run folders that were evaluated, two or more (none: continue the reviews in --output); "
        "or: export REVIEWS",
    )
    add_data(add, "packed dataset of the clips, best of the store video (default: the evaluations')")
    add("-o", "--output", type=Path, metavar="DIR", help="folder of the reviews (default: reviews)")
    add("--evaluation", metavar="NAME", help="folder under RUN/evaluation (default: val)")
    add("--pairs", type=int, metavar="N", help="pairs of captions to compare (default: 200)")
    add(
        "--choose",
        metavar="SHARES",
        help="how pairs are chosen (default: random=70%%,disagreement=20%%,blind=10%%): at random; where captions "
        "differ most; where a run may not use the video. Only random ones enter the estimate of which run is better",
    )
    add("--stratify", metavar="COLUMN", help="spread the clips over the values of this column (pack --keep-columns)")
    add("--overlap", type=int, metavar="N", help="pairs that every reviewer gets, to measure agreement (default: 30)")
    add("--seed", type=int, metavar="N", help="seed of the choice of pairs, and of left and right (default: 0)")
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1, only reachable from this machine); another one, such as "
        "0.0.0.0, makes a secret address for the reviewers",
    )
    add("--port", type=int, default=7861, help="port to listen on (default: 7861; 0: a free one)")
    export = command.add_argument_group("export REVIEWS")
    export.add_argument("--manifest", type=Path, metavar="FILE", help="write corrected and approved captions (JSONL)")
    export.add_argument("--split", metavar="NAME", help="split of the manifest's rows (default: the clips' own)")
    export.add_argument(
        "--picked", action="store_true", help="also write captions that were preferred and have no mark"
    )
    export.add_argument("--preferences", type=Path, metavar="FILE", help="write chosen and rejected captions (JSONL)")
    command.set_defaults(call=review)
