"""The command `vlmds`. Each subcommand imports what it needs, so that --help stays quick."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path

from vlmds.errors import InputError
from vlmds.files import as_path


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
    common = dict(quality=args.quality, workers=args.workers, deadline=args.deadline,
                  progress=sys.stderr.isatty())
    if (as_path(args.manifest) / "dataset.json").is_file():
        from vlmds.data.convert import convert_from_options  # which brings in PyTorch

        _refuse(args, "a conversion keeps shards and splits as they are", shard_size=256,
                shard_bytes=None, val_fraction=0.0, no_verify=False, dedup=False, append=False,
                engine="local")
        summary = convert_from_options(
            args.manifest, args.out, args.store or "frames", vision=args.vision,
            feature_layer=args.feature_layer, pool=args.pool, num_frames=args.num_frames,
            image_size=args.image_size, task=_task(args), merge=args.merge, **common)
    else:
        from vlmds.data.pack import pack

        _refuse(args, "features are made from a packed dataset: pack the videos first, then "
                "vlmds pack OUT OUT2 --store features", vision=None, feature_layer=-1, pool=1)
        summary = pack(
            args.manifest, args.out, store=args.store or "video",
            num_frames=8 if args.num_frames is None else args.num_frames,
            image_size=336 if args.image_size is None else args.image_size,
            shard_size=args.shard_size, shard_bytes=_bytes(args.shard_bytes),
            val_fraction=args.val_fraction, verify=not args.no_verify, dedup=args.dedup,
            append=args.append, merge=args.merge, task=_task(args), engine=args.engine, **common)
    if not summary.finished:
        print(f"packed the {summary.shards} shards of task {args.task_index} of {args.num_tasks}; "
              "when all tasks are done, join them: vlmds pack "
              f"{args.manifest} {args.out} with the same options, but without --task-index and "
              "--num-tasks (--merge makes sure that nothing is left to pack)")
        return 0
    counts = ", ".join(f"{split} {count:,}" for split, count in summary.counts.items())
    print(f"packed {summary.packed:,} samples ({counts}) into {summary.shards} shards, "
          f"{summary.bytes / 1e6:,.1f} MB, in {summary.seconds:.1f} s: {args.out}")
    if not args.no_report:
        from vlmds.data.pack_report import write_report

        print(f"what it looks like: {write_report(args.out)}")
    if summary.kept_shards:
        print(f"{summary.kept_shards} of the shards were there already")
    if summary.rejected:
        print(f"rejected {sum(summary.rejected.values()):,} rows; each stands in "
              f"{args.out / 'ledger.jsonl'} with its reason:")
        for reason, count in summary.rejected.items():
            print(f"  {count:>6,}  {reason}")
    if summary.known:
        print(f"{summary.known:,} rows have ids that were packed or rejected before, and were left")
    if summary.duplicates:
        print(f"{summary.duplicates:,} groups of samples have the same content, see "
              f"{args.out / 'duplicates.jsonl'}; --dedup leaves all but the first out")
    if summary.ignored_columns:
        print(f"ignored columns: {', '.join(summary.ignored_columns)}")
    return 0


def _task(args: argparse.Namespace) -> tuple[int, int] | None:
    index, tasks = args.task_index, args.num_tasks
    if index is None and tasks is None:
        return None
    if index is None or tasks is None or not 0 <= index < tasks:
        raise InputError(f"--task-index {index} --num-tasks {tasks}: give both, the index from 0 to "
                         "the number less one")
    if args.merge:
        raise InputError("--merge: joins the tasks' parts; leave --task-index and --num-tasks out")
    return index, tasks


def _bytes(text: str | None) -> int | None:
    """"500MB" -> 500000000."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)B?", text)
    if not found:
        raise InputError(f"--shard-bytes {text}: write a size such as 500MB or 1GB")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))


def _refuse(args: argparse.Namespace, why: str, **defaults) -> None:
    """Raise InputError if one of these options was given another value than its default."""
    for name, default in defaults.items():
        if getattr(args, name) != default:
            raise InputError(f"--{name.replace('_', '-')}: {why}")


def plan(args: argparse.Namespace) -> int:
    from vlmds.config import load_experiment
    from vlmds.plan import plan_experiment

    overrides = [*args.set, *([f"data.path={args.data}"] if args.data else [])]
    print(plan_experiment(
        load_experiment(args.exp, overrides), args.gpus, args.samples_per_second,
        args.cores_per_gpu, args.gpu))
    return 0


def caption(args: argparse.Namespace) -> int:
    """0 if every video has a caption, 2 otherwise; 3 if a signal stopped it."""
    from vlmds.captioning.command import caption

    return caption(args, _generation(args))


def serve(args: argparse.Namespace) -> int:
    from vlmds.serve.app import serve
    from vlmds.serve.models import Limits

    serve(args.run, host=args.host, port=args.port, device=args.device, overrides=args.set,
          limits=Limits(megabytes=args.max_mb, seconds=args.max_seconds, urls=args.allow_urls))
    return 0


def doctor(args: argparse.Namespace) -> int:
    from vlmds.config import load_experiment
    from vlmds.doctor import examine

    overrides = [*args.set, *([f"data.path={args.data}"] if args.data else [])]
    return examine(load_experiment(args.exp, overrides), args.output, seconds=args.seconds,
                   samples=args.samples, wanted=args.samples_per_second)


def bench(args: argparse.Namespace) -> int:
    if args.what == "scale":
        from vlmds.bench.scale import bench_scale

        bench_scale(args.output)
    elif args.what == "checkpoint":
        from vlmds.bench.checkpoint import bench_checkpoint

        bench_checkpoint(args.output)
    elif args.what == "generate":
        from vlmds.bench.generate import bench_generate

        bench_generate(args.output, args.exp, tiny=args.tiny, overrides=args.set)
    else:
        from vlmds.bench.data import bench_data

        bench_data(args.output, args.manifest, args.clips)
    return 0


def evaluate(args: argparse.Namespace) -> int:
    import torch.distributed as dist

    from vlmds.evaluation.evaluate import evaluate_run, evaluation_table, read_evaluation
    from vlmds.training.ranks import is_main

    try:
        folder = evaluate_run(
            args.run, data=args.data, split=args.split, output=args.output, clips=args.clips,
            batch_size=args.batch_size, generation=_generation(args), device=args.device,
            overrides=args.set, again=args.again)
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
    found = compare(runs, args.metric, [words.split() for words in args.words])
    size = write_report(args.output, runs, found)
    for path, text in ((args.csv, to_csv), (args.latex, to_latex)):
        if path:
            write(path, text(found))
    for warning in found["warnings"]:
        print(f"WARNING: {warning['en']}", file=sys.stderr)
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
    data, output, environment = args.data, args.output, {}
    options = tuple(shlex.split(args.evaluate))
    if args.demo:
        from vlmds.demo.clips import DIRECTIONS
        from vlmds.demo.run import RANKS, Size, ablations, prepare_demo, tiny_form
        from vlmds.training.ranks import free_port

        root = (output or Path("demo")).absolute()
        root.mkdir(parents=True, exist_ok=True)
        prepare_demo(root, size or Size(), {})
        exps = [str(tiny_form(exp.lower(), root)) for exp in exps]
        if args.all or len(exps) == 8:
            exps += map(str, ablations(root))
        data, output = str(root / "shards"), root / "runs"
        options = ("--max-new-tokens", "32", *options)
        environment = module.cpu_environment(RANKS)
        args.launcher = args.launcher or (
            f"deepspeed --num_gpus {RANKS} --master_port {free_port()}")
    if data is None:
        raise InputError("--data: no data given; pass a folder made by vlmds pack")
    output, launcher = output or Path("runs"), args.launcher or "deepspeed"
    jobs = module.plan_jobs(exps, output, seeds=args.seeds, share_stage1=args.share_stage1,
                            overrides=tuple(args.set))
    if args.emit:
        print(module.slurm_script(jobs, data, launcher, options), end="")
        return 0
    try:
        code = module.run_jobs(jobs, data, launcher, options, environment)
    finally:
        print(module.status_table(jobs), flush=True)
    evaluated = [str(job.run) for job in jobs if job.evaluated]
    if evaluated and code != module.STOPPED:
        words = ["--words", " ".join(korean for korean, _ in DIRECTIONS.values())] if args.demo else []
        main(["compare", *evaluated, "-o", str(output / "report.html"), *words])
    return code


def export(args: argparse.Namespace) -> int:
    from vlmds.export.folder import export_run
    from vlmds.export.hub import push_to_hub

    parity = export_run(args.run, args.output, format=args.format, merge=args.merge,
                        device=args.device, overrides=args.set)
    if parity:
        print(f"before and after folding the adapter in: {parity}")
    print(f"saved: {args.output}")
    if args.push_to_hub:
        print(f"pushed: {push_to_hub(args.output, args.push_to_hub)}")
    return 0


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
    command.add_argument("--gpus", type=int, default=1, help="ranks (default: 1)")
    command.add_argument("--gpu", metavar="NAME",
                         help="propose micro-batch, accumulation and activation checkpointing for "
                         "a card, such as h200, a100-40 or rtx4090")
    command.add_argument("--samples-per-second", type=float,
                         help="training speed of one GPU, to price the stores (default: estimated)")
    command.add_argument("--cores-per-gpu", type=float, default=8.0,
                         help="CPU cores that may decode for one GPU (default: 8)")
    command.set_defaults(call=plan)
    _caption_parser(commands)
    _serve_parser(commands)
    _doctor_parser(commands)
    command = commands.add_parser("bench", help="throughput and memory, against named baselines")
    command.add_argument("what", choices=("data", "scale", "checkpoint", "generate"),
                         help="packing and loading; a dataset that grows; what saving costs; "
                         "captions a second")
    command.add_argument("--manifest", type=Path, help="of data: these videos instead of made ones")
    command.add_argument("--clips", type=int, default=16, help="of data: how many to make")
    command.add_argument("--exp", default="e7", help="of generate: experiment (default: e7)")
    command.add_argument("--tiny", action="store_true", help="of generate: tiny random models")
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                         help="of generate: such as llm.model=/models/Qwen3-8B")
    command.add_argument("--output", type=Path, default=Path("bench"), help="default: ./bench")
    command.set_defaults(call=bench)
    _evaluate_parser(commands)
    _export_parser(commands)
    _sweep_parser(commands)
    command = commands.add_parser("compare", help="which experiment wins: one HTML page")
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    command.add_argument("-o", "--output", type=Path, default=Path("report.html"))
    command.add_argument("--evaluation", help="folder under RUN/evaluation (default: val)")
    command.add_argument("--metric", help="that decides (default: cider_d@morpheme)")
    command.add_argument("--words", action="append", default=[], metavar="'WORD WORD …'",
                         help="how often captions get these words right, such as '왼쪽 오른쪽'; may "
                         "be given several times")
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
    command = commands.add_parser(
        "pack", help="videos and captions -> shards with an index; or one store -> another")
    add = command.add_argument
    add("manifest", help="CSV, TSV, JSONL or Parquet with columns video and caption; or a packed "
        "dataset, to convert it to another store")
    add("out", type=as_path, help="folder, or URL, for the shards")
    add("--store", choices=("video", "frames", "features"),
        help="keep the videos' bytes, decoded frames as JPEGs, or (of a packed dataset) the vision "
        "model's features (default: video; of a packed dataset: frames)")
    add("--num-frames", type=int, help="of the frames or features store (default: 8)")
    add("--image-size", type=int, help="of the frames store (default: 336)")
    add("--vision", metavar="MODEL", help="of the features store: hub name or folder of a CLIP")
    add("--feature-layer", type=int, default=-1, choices=(-1, -2),
        help="of the features store: vision.feature_layer (default: -1)")
    add("--pool", type=int, default=1, help="of the features store: vision.pool (default: 1)")
    add("--quality", type=int, default=95, help="JPEG quality of the frames store (default: 95)")
    add("--shard-size", type=int, default=256, help="most rows per shard (default: 256)")
    add("--shard-bytes", metavar="SIZE", help="most bytes of videos per shard, such as 1GB")
    add("--val-fraction", type=float, default=0.0,
        help="share of the rows without a split that go to split val (default: 0)")
    add("--no-verify", action="store_true", help="do not decode the videos of a video store")
    add("--dedup", action="store_true",
        help="leave out rows whose video and span an earlier row has")
    add("--append", action="store_true",
        help="add the manifest's new rows to what is packed in OUT, as new shards")
    add("--task-index", type=int, metavar="I", help="pack only part I (from 0) …")
    add("--num-tasks", type=int, metavar="N", help="… of N parts; join them with --merge")
    add("--merge", action="store_true", help="pack nothing; make the dataset of the tasks' parts")
    add("--engine", choices=("local", "ray"), default="local",
        help="pack on this machine, or on the Ray cluster that RAY_ADDRESS names")
    add("--no-report", action="store_true", help="do not write pack_report.html")
    add("--workers", type=int, help="decoding processes (default: one per core)")
    add("--deadline", type=float, default=60.0, help="seconds a video may take (default: 60)")
    command.set_defaults(call=pack)


def _doctor_parser(commands) -> None:
    command = commands.add_parser(
        "doctor", help="is this machine, or under a launcher this cluster, ready to train")
    add = command.add_argument
    add("--exp", default="e8", help="experiment to be ready for (default: e8, the largest)")
    add("--data", help="packed dataset to look at")
    add("--output", type=Path, default=Path("runs"), help="where runs will be (default: ./runs)")
    add("--samples-per-second", type=float, metavar="X",
        help="that the training is to reach over all ranks; decoding is held against it")
    add("--samples", type=int, default=64, help="to read on each node (default: 64)")
    add("--seconds", type=float, default=30.0, help="that one check may take (default: 30)")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    command.set_defaults(call=doctor)


def _caption_parser(commands) -> None:
    command = commands.add_parser(
        "caption", help="captions from a trained run",
        description="Over many GPUs, with --out: torchrun --nproc-per-node 8 -m -- vlmds.cli "
        "caption … Start it again after a stop, or when there are more videos: it goes on.")
    add = command.add_argument
    add("--run", type=Path, required=True, help="run folder, or one of its artifacts")
    add("videos", nargs="*", metavar="VIDEO", help="path or URL")
    add("--data", metavar="DIR", help="a folder of videos, a manifest (CSV, TSV, JSONL, Parquet; "
        "no captions needed) or a packed dataset, instead of VIDEO")
    add("--split", help="of a packed dataset (default: val, or the only one)")
    add("--out", metavar="FILE", help="write the captions here: .jsonl, .json, .csv or .srt; of "
        "several videos, a folder with --format srt (default: print them)")
    add("--format", choices=("jsonl", "json", "csv", "srt"), help="default: as --out ends")
    add("--again", action="store_true", help="caption anew what is in --out already")
    add("--window", metavar="LENGTH", help="a caption for each such stretch: 30s, 1m, 1m30s")
    add("--stream", action="store_true", help="print each caption while it is written")
    add("--json", action="store_true", help="print one JSON object a line")
    add("--prompt", help="instead of the experiment's")
    _add_generation(command)
    add("--batch-size", type=int, default=4, help="videos at once (default: 4)")
    add("--workers", type=int, help="decoding processes (default: one per core)")
    add("--deadline", type=float, default=60.0,
        help="seconds that decoding may take, for a video or some windows (default: 60)")
    add("--device", help="cpu, cuda:0, … (default: the first GPU, else the CPU)")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="override where the models lie, such as llm.model=/models/Qwen3-8B")
    command.set_defaults(call=caption)


def _serve_parser(commands) -> None:
    command = commands.add_parser(
        "serve", help="a page to try runs on a video, and the same as JSON")
    add = command.add_argument
    add("--run", type=Path, required=True, nargs="+", action="extend", metavar="RUN",
        help="run folder, or one of its artifacts; several are compared side by side")
    add("--host", default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1, which only this machine reaches)")
    add("--port", type=int, default=7860, help="default: 7860; 0 is a free one")
    add("--max-mb", type=float, default=200.0, help="of a video's file (default: 200)")
    add("--max-seconds", type=float, default=600.0, help="of a video (default: 600)")
    add("--allow-urls", action="store_true",
        help="also fetch videos from http(s) URLs that a request names, whatever this machine "
        "can reach")
    add("--device", help="cpu, cuda:0, … (default: the first GPU, else the CPU)")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="override where the models lie, such as llm.model=/models/Qwen3-8B")
    command.set_defaults(call=serve)


def _add_generation(command) -> None:
    add = command.add_argument
    add("--max-new-tokens", type=int, default=128, help="most tokens of a caption (default: 128)")
    add("--beams", type=int, default=1, help="beam search (default: 1, greedy)")
    add("--temperature", type=float, default=0.0, help="sampling (default: 0, none)")
    add("--top-p", type=float, default=1.0, help="of sampling: nucleus (default: 1, all tokens)")
    add("--repetition-penalty", type=float, default=1.0, help="default: 1, none")
    add("--seed", type=int, default=0, help="of sampling (default: 0)")


def _generation(args: argparse.Namespace):
    from vlmds.generation import GenerationOptions

    return GenerationOptions(
        max_new_tokens=args.max_new_tokens, num_beams=args.beams, temperature=args.temperature,
        top_p=args.top_p, repetition_penalty=args.repetition_penalty, seed=args.seed)


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
    _add_generation(command)
    add("--batch-size", type=int, default=8, help="clips at once (default: 8)")
    add("--again", action="store_true", help="evaluate anew what is finished already")
    add("--device", help="cpu, cuda:0, … (default: the first GPU, else the CPU)")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="override where the models lie, such as llm.model=/models/Qwen3-8B")
    command.set_defaults(call=evaluate)


def _export_parser(commands) -> None:
    command = commands.add_parser(
        "export", help="a folder that others can load",
        description="vlmds: for vlmds itself. peft: the adapter alone. hf-llava: for plain "
        "transformers, the adapter folded in. Folded weights are loaded back and compared.")
    add = command.add_argument
    add("--run", type=Path, required=True, help="run folder, or one of its artifacts")
    add("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    add("--format", choices=("vlmds", "peft", "hf-llava"), default="vlmds")
    add("--merge", action="store_true",
        help="fold the adapter into the language model, in llm.dtype, never in 4 bit")
    add("--push-to-hub", metavar="OWNER/NAME", help="upload it, to a private repository if new")
    add("--device", help="cpu, cuda:0, … (default: the first GPU, else the CPU)")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="override where the models lie, such as llm.model=/models/Qwen3-8B")
    command.set_defaults(call=export)


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
    add("--evaluate", default="", metavar="'OPTIONS'",
        help="for vlmds evaluate, such as '--beams 3 --batch-size 16'")
    add("--emit", choices=("slurm",), help="print an array script instead of running")
    add("--demo", action="store_true", help="tiny forms on the demo's clips and models")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    command.set_defaults(call=sweep)


if __name__ == "__main__":
    sys.exit(main())
