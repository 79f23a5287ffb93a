"""The command `vlmds`. Each subcommand imports what it needs, so that --help stays quick."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vlmds.errors import InputError, SampleError


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad input. Other failures raise."""
    args = _parser().parse_args(arguments)
    try:
        if args.call is not pack:  # which loads no model, and so neither of these libraries
            from vlmds.models.pretrained import quiet_libraries

            quiet_libraries()
        return args.call(args)
    except InputError as error:
        print(f"vlmds: {error}", file=sys.stderr)
        return 2


def pack(args: argparse.Namespace) -> int:
    from vlmds.data.pack import pack

    summary = pack(
        args.manifest, args.out, store=args.store, num_frames=args.num_frames,
        image_size=args.image_size, quality=args.quality, shard_size=args.shard_size,
        val_fraction=args.val_fraction, verify=not args.no_verify, workers=args.workers,
        deadline=args.deadline, progress=sys.stderr.isatty())
    counts = ", ".join(f"{split} {count:,}" for split, count in summary.counts.items())
    print(f"packed {summary.packed:,} samples ({counts}) into {summary.shards} shards, "
          f"{summary.bytes / 1e6:,.1f} MB, in {summary.seconds:.1f} s: {args.out}")
    if summary.kept_shards:
        print(f"{summary.kept_shards} of the shards were there already")
    if summary.rejected:
        print(f"rejected {sum(summary.rejected.values()):,} rows; each stands in "
              f"{args.out / 'ledger.jsonl'} with its reason:")
        for reason, count in summary.rejected.items():
            print(f"  {count:>6,}  {reason}")
    if summary.ignored_columns:
        print(f"ignored columns: {', '.join(summary.ignored_columns)}")
    return 0


def plan(args: argparse.Namespace) -> int:
    from vlmds.config import load_experiment
    from vlmds.plan import plan

    overrides = [*args.set, *([f"data.path={args.data}"] if args.data else [])]
    print(plan(load_experiment(args.exp, overrides)))
    return 0


def caption(args: argparse.Namespace) -> int:
    """0 if every video has a caption, 2 otherwise."""
    from vlmds.inference import VideoCaptioner
    from vlmds.training.run import final_artifact

    captioner = VideoCaptioner.from_pretrained(
        final_artifact(args.run), device=args.device, overrides=args.set)
    results = captioner.caption(
        args.videos, prompt=args.prompt, batch_size=args.batch_size, num_beams=args.beams,
        max_new_tokens=args.max_new_tokens)
    failed = False
    for video, result in zip(args.videos, results):
        if isinstance(result, SampleError):
            failed = True
            print(f"vlmds: {video}: {result}", file=sys.stderr)
        elif args.json:
            print(json.dumps({"video": video, "caption": result}, ensure_ascii=False))
        else:
            print(f"{video}\t{result}")
    return 2 if failed else 0


def evaluate(args: argparse.Namespace) -> int:
    import torch.distributed as dist

    from vlmds.evaluation.evaluate import evaluate_run, evaluation_table, read_evaluation
    from vlmds.training.ranks import is_main

    try:
        folder = evaluate_run(
            args.run, data=args.data, split=args.split, output=args.output, clips=args.clips,
            batch_size=args.batch_size, num_beams=args.beams, max_new_tokens=args.max_new_tokens,
            device=args.device, overrides=args.set, again=args.again)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if is_main():
        print(f"{evaluation_table(read_evaluation(folder)[0])}\nsaved: {folder}")
    return 0


def compare(args: argparse.Namespace) -> int:
    from vlmds.evaluation.compare import compare, load_run
    from vlmds.evaluation.report import to_csv, to_latex, write_report
    from vlmds.files import write

    runs = [load_run(path, args.evaluation) for path in args.runs]
    found = compare(runs, args.metric)
    size = write_report(args.output, runs, found)
    for path, text in ((args.csv, to_csv), (args.latex, to_latex)):
        if path:
            write(path, text(found))
    for warning in found["warnings"]:
        print(f"WARNING: {warning}", file=sys.stderr)
    verdict, other = found["verdict"], found["verdict"]["runner_up"]
    line = f"best: {verdict['best']}, {found['metric']} {verdict['value']:.2f}"
    if other:
        line += (f"; {other['gap']:.2f} more than {other['name']}, Holm-corrected p "
                 f"{other['p_holm']:.4f}; not told apart: {', '.join(verdict['tied'])}")
    print(f"{line}\nsaved: {args.output} ({size / 1e6:.1f} MB)")
    return 0


def sweep(args: argparse.Namespace, size=None) -> int:
    """0 if all are done, 2 if one refused its input, 3 if a signal stopped one, else 1."""
    from vlmds import sweep as module
    from vlmds.errors import InputError

    exps = module.choose(args.exps, args.all or (args.demo and not args.exps), args.owner)
    data, output, options, environment = args.data, args.output, (), {}
    if args.demo:
        from vlmds.demo.run import RANKS, Size, prepare_demo, tiny_form

        root = (output or Path("demo")).absolute()
        root.mkdir(parents=True, exist_ok=True)
        prepare_demo(root, size or Size(), {})
        exps = [str(tiny_form(exp.lower(), root)) for exp in exps]
        data, output, options = str(root / "shards"), root / "runs", ("--max-new-tokens", "32")
        environment = module.cpu_environment(RANKS)
        args.launcher = args.launcher or f"deepspeed --num_gpus {RANKS}"
    if data is None:
        raise InputError("--data: no data given; pass a folder made by vlmds pack")
    output, launcher = output or Path("runs"), args.launcher or "deepspeed"
    jobs = module.plan_jobs(exps, output, seeds=args.seeds, share_stage1=args.share_stage1,
                            overrides=tuple(args.set))
    if args.emit:
        print(module.slurm_script(jobs, data, launcher), end="")
        return 0
    try:
        code = module.run_jobs(jobs, data, launcher, options, environment)
    finally:
        print(module.status_table(jobs), flush=True)
    evaluated = [str(job.run) for job in jobs if job.evaluated]
    if evaluated and code != module.STOPPED:
        main(["compare", *evaluated, "-o", str(output / "report.html")])
    return code


def demo(args: argparse.Namespace) -> int:
    from vlmds.demo.run import run_demo

    run_demo(args.output, args.exp)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlmds", description="Train and compare video-captioning models. "
        "Training itself: deepspeed launch/train.py --exp e7.yaml --data DIR")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # of deepspeed's launcher
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _pack_parser(commands)
    command = commands.add_parser("plan", help="what an experiment will be; needs no weights")
    command.add_argument("--exp", required=True, help="YAML file, or name of a packaged experiment")
    command.add_argument("--data", help="packed dataset, to know the steps")
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    command.set_defaults(call=plan)
    _caption_parser(commands)
    _evaluate_parser(commands)
    _sweep_parser(commands)
    command = commands.add_parser("compare", help="which experiment wins: one HTML page")
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    command.add_argument("-o", "--output", type=Path, default=Path("report.html"))
    command.add_argument("--evaluation", help="folder under RUN/evaluation (default: val)")
    command.add_argument("--metric", help="that decides (default: cider_d@morpheme)")
    command.add_argument("--csv", type=Path, help="also write the table here")
    command.add_argument("--latex", type=Path, help="also write the table here")
    command.set_defaults(call=compare)
    command = commands.add_parser(
        "demo", help="everything on tiny models and videos made here, on a CPU")
    command.add_argument("--exp", default="demo",
                         help="a packaged experiment, in tiny form (default: demo)")
    command.add_argument("--output", type=Path, default=Path("demo"), help="default: ./demo")
    command.set_defaults(call=demo)
    return parser


def _pack_parser(commands) -> None:
    command = commands.add_parser("pack", help="videos and captions -> shards with an index")
    add = command.add_argument
    add("manifest", type=Path, help="CSV, TSV, JSONL or Parquet with columns video and caption")
    add("out", type=Path, help="folder for the shards")
    add("--store", default="video", choices=("video", "frames"),
        help="keep the videos' bytes, or decoded frames as JPEGs (default: video)")
    add("--num-frames", type=int, default=8, help="of the frames store (default: 8)")
    add("--image-size", type=int, default=336, help="of the frames store (default: 336)")
    add("--quality", type=int, default=95, help="JPEG quality of the frames store (default: 95)")
    add("--shard-size", type=int, default=256, help="rows per shard (default: 256)")
    add("--val-fraction", type=float, default=0.0,
        help="share of the rows without a split that go to split val (default: 0)")
    add("--no-verify", action="store_true", help="do not decode the videos of a video store")
    add("--workers", type=int, help="decoding processes (default: one per core)")
    add("--deadline", type=float, default=60.0, help="seconds a video may take (default: 60)")
    command.set_defaults(call=pack)


def _caption_parser(commands) -> None:
    command = commands.add_parser("caption", help="captions from a trained run")
    add = command.add_argument
    add("--run", type=Path, required=True, help="run folder, or one of its artifacts")
    add("videos", nargs="+", metavar="VIDEO")
    add("--json", action="store_true", help="one JSON object a line")
    add("--prompt", help="instead of the experiment's")
    add("--beams", type=int, default=1, help="beam search (default: 1, greedy)")
    add("--max-new-tokens", type=int, default=128)
    add("--batch-size", type=int, default=4, help="videos at once (default: 4)")
    add("--device", help="cpu, cuda:0, … (default: the first GPU, else the CPU)")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="override where the models lie, such as llm.model=/models/Qwen3-8B")
    command.set_defaults(call=caption)


def _evaluate_parser(commands) -> None:
    command = commands.add_parser(
        "evaluate", help="captions of a packed dataset, scored",
        description="Over many GPUs: torchrun --nproc-per-node 8 -m -- vlmds.cli evaluate … "
        "Start it again after a stop: it goes on.")
    add = command.add_argument
    add("--run", type=Path, required=True, help="run folder, or one of its artifacts")
    add("--data", help="packed dataset (default: the run's own)")
    add("--split", help="default: val, or the only one")
    add("--output", type=Path, help="default: RUN/evaluation/SPLIT")
    add("--clips", type=int, help="evaluate so many, evenly spaced (default: all)")
    add("--beams", type=int, default=1, help="beam search (default: 1, greedy)")
    add("--max-new-tokens", type=int, default=128)
    add("--batch-size", type=int, default=8, help="clips at once (default: 8)")
    add("--again", action="store_true", help="evaluate anew what is finished already")
    add("--device", help="cpu, cuda:0, … (default: the first GPU, else the CPU)")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="override where the models lie, such as llm.model=/models/Qwen3-8B")
    command.set_defaults(call=evaluate)


def _sweep_parser(commands) -> None:
    command = commands.add_parser("sweep", help="train, evaluate and compare several experiments")
    add = command.add_argument
    add("exps", nargs="*", metavar="EXP", help="names such as E1, or YAML files")
    add("--all", action="store_true", help="E1 to E8")
    add("--owner", help="the experiments of this owner")
    add("--data", help="packed dataset")
    add("--output", type=Path, help="folder of the runs (default: runs; with --demo: demo)")
    add("--seeds", type=int, default=1, help="runs of each experiment (default: 1)")
    add("--share-stage1", action="store_true",
        help="experiments with the same projector share its first stage: quicker, but their "
        "results are then not independent")
    add("--launcher", help="default: deepspeed; such as 'torchrun --nproc-per-node 8'")
    add("--emit", choices=("slurm",), help="print an array script instead of running")
    add("--demo", action="store_true", help="tiny forms on the demo's clips and models")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    command.set_defaults(call=sweep)


if __name__ == "__main__":
    sys.exit(main())
