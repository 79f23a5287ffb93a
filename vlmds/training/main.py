"""The command `deepspeed launch/train.py --exp e7.yaml`: one experiment, whole schedule.

The arguments, the data, the run folder, the model, the stages: in this order, so that a mistake is
found before the slow part. See the README for what each argument does.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import sys
import traceback
from pathlib import Path

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from vlmds.config import Experiment, load_experiment
from vlmds.data.dataset import Dataset, open_dataset
from vlmds.data.features import check_tower
from vlmds.errors import InputError, Stopped
from vlmds.files import absolute, new_folder
from vlmds.models.assemble import load_model
from vlmds.models.pretrained import quiet_libraries
from vlmds.training import checkpoint
from vlmds.training.engine import accumulation_steps, experiment_ds_config
from vlmds.training.lineage import base_revisions, base_weights, inherit
from vlmds.training.lost import connection_lost
from vlmds.training.preemption import StopRequest
from vlmds.training.ranks import (
    gather, init_distributed, is_main, on_main, shared_error, together,
)  # fmt: skip
from vlmds.training.run import RunFolder, check_same_experiment, flat_settings, open_run
from vlmds.training.stages import run_stages
from vlmds.training.validation import check_validation
from vlmds.training.watch import doing, last_words, lost_words, note_failure, tell

# Keys that may differ between nodes.
OF_A_NODE = ("data.path", "data.cache_dir", "data.cache_gb", "data.num_workers", "vision.model",
             "llm.model")
REPOSITORY = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad input, 3 stopped by a signal with a checkpoint saved.
    After any other failure the process ends with 1, having told what it was doing."""
    args = _parser().parse_args(arguments)
    quiet_libraries()
    try:
        overrides = list(args.set)
        if args.data is not None:
            overrides.append(f"data.path={absolute(args.data)}")
        experiment = load_experiment(args.exp, overrides)
        if args.plan:
            if is_main():
                from vlmds.plan import plan_experiment

                tell(plan_experiment(experiment, gpus=int(os.environ.get("WORLD_SIZE", 1))))
            return 0
        train(experiment, Path(args.output or Path("runs") / experiment.name), args)
    except (InputError, Stopped) as error:
        if is_main():
            tell(f"vlmds: {error}", sys.stderr)
        elif not getattr(error, "shared", True) and os.environ.get("LOCAL_RANK") == "0":
            # What only this node finds, such as a file that is not on it; rank 0 may still be waiting.
            tell(f"vlmds: rank {os.environ['RANK']}: {error}", sys.stderr)
        if not getattr(error, "shared", True):
            note_failure()
        leave()
        return 2 if isinstance(error, InputError) else 3
    except BaseException as error:
        if connection_lost(error):
            lost_words()
        else:
            tell(traceback.format_exc(), sys.stderr)
            last_words(f"{type(error).__name__}: {error}".splitlines()[0])
        # Taking the process groups down would wait for ranks that are not coming.
        os._exit(1)
    leave()
    return 0


def train(experiment: Experiment, output: Path, args: argparse.Namespace) -> None:
    """Train on all ranks that the launcher started.

    Raises:
        InputError, Stopped: on every rank.
    """
    stop = StopRequest()
    device = init_distributed(
        experiment.training.timeout_minutes, experiment.logging.stall_seconds)
    config = args.ds_config or default_ds_config()
    check_same_everywhere(experiment, config)
    doing("checking the data")
    dataset = on_main(lambda: open_dataset(experiment.data))
    together(lambda: verify(dataset, experiment))
    on_main(lambda: check_tower(dataset, experiment))
    check_validation(experiment, "val" in dataset.splits, dataset.root)
    doing("checking the base weights")
    origin = {
        "data_fingerprint": dataset.fingerprint,
        "sampling": {name: dataset.meta[name] for name in ("sampler", "resizer")},
        "weights": base_weights(experiment),
        "revisions": on_main(lambda: base_revisions(experiment))}
    resume = args.resume
    start_from = None if resume in ("auto", "never") else Path(resume)
    run = on_main(lambda: open_run(
        output, experiment, resume, origin=origin, world_size=dist.get_world_size(),
        command=sys.argv))
    accumulation = accumulation_steps(experiment, dist.get_world_size(), run.global_batch)
    experiment_ds_config(config, experiment, accumulation)  # or InputError, before the slow part
    run = on_main(lambda: begin(run, experiment, start_from, args.from_run))
    doing("loading the models")
    stored = None
    if dataset.store == "features" and not experiment.training.evaluate_every:  # has black frames
        stored = dataset.meta["vision"]["fingerprint"]
    model = together(lambda: load_model(experiment, device, stored))
    on_main(lambda: note_attention(run, model.captioner.llm.config._attn_implementation))
    run_stages(experiment, model, dataset, run, config, device, stop)


def note_attention(run: RunFolder, attention: str) -> None:
    """Say what ``llm.attention`` has become here."""
    run.note(attention=attention)
    tell(f"vlmds: attention: {attention}")


def check_same_everywhere(experiment: Experiment, ds_config: Path) -> None:
    """Raise InputError, naming the keys, on all ranks unless all have the same experiment, but for
    where things lie on their nodes, and the same DeepSpeed JSON."""
    content = ds_config.read_bytes() if ds_config.is_file() else b""
    settings = {key: value for key, value in flat_settings(experiment.model_dump()).items()
                if key not in OF_A_NODE and not re.fullmatch(r"data\.blend\.\d+\.path", key)}
    digests = gather(hashlib.sha256(repr(sorted(settings.items())).encode() + content).hexdigest())
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is None:
        return
    all_settings = gather(settings)
    keys = [f"{key} {all_settings[0].get(key)!r} and {all_settings[other].get(key)!r}"
            for key in sorted(all_settings[0].keys() | all_settings[other].keys())
            if all_settings[0].get(key) != all_settings[other].get(key)]
    where = f"--exp: {'; '.join(keys)}" if keys else f"--ds-config {ds_config}: another file"
    raise shared_error(f"{where} on ranks 0 and {other}; give all nodes the same")


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def verify(dataset: Dataset, experiment: Experiment) -> None:
    """Check this rank's share of the shards and indexes, so that damage is found before training."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if experiment.data.verify == "sha256":
        for part in dataset.parts[rank::world_size]:
            part.verify_index()
    for part, shard in dataset.shards()[rank::world_size]:
        doing(f"checking shard {part.root / shard.path}")
        part.verify([shard], experiment.data.verify)


def begin(run: RunFolder, experiment: Experiment, start_from: Path | None, from_run: Path | None
          ) -> RunFolder:
    """Check what the run is to grow from, then write the run and take that over. Returns the run."""
    origin = run.record.get("resumed_from", {})
    again = start_from is not None and origin.get("checkpoint") == str(start_from.resolve())
    if again:
        tell(f"vlmds: {run.path}: started from {start_from} before, and goes on from there")
    elif start_from is not None:
        check_adoptable(start_from, experiment, run)
        run.record["resumed_from"] = {"checkpoint": str(start_from.resolve()),
                                      "stage": checkpoint.read_state(start_from)["stage"]}
    if from_run is not None:
        inherit(from_run, experiment, run)
    if start_from is not None and not again:
        adopt(start_from, experiment, run)
    run.begin(experiment)
    return run


def check_adoptable(folder: Path, experiment: Experiment, run: RunFolder) -> None:
    """Raise InputError unless the checkpoint ``folder`` is sound and of a run like this one."""
    problem = checkpoint.check(folder)
    if problem:
        raise InputError(f"--resume {folder}: not a usable checkpoint: {problem}")
    other = folder.resolve().parents[1]
    check_same_experiment(other, experiment)
    if other != run.path.resolve() and any(run.path.glob("checkpoints/[a-z]*")):
        raise InputError(f"--resume {folder}: {run.path} has checkpoints of its own; choose another "
                         "--output")
    lineage = checkpoint.read_state(folder)["lineage"]
    for name, what in (("data_fingerprint", "on other data"), ("weights", "from other base weights"),
                       ("sampling", "on frames that were sampled or resized otherwise")):
        if lineage.get(name, run.record[name]) != run.record[name]:
            raise InputError(f"--resume {folder}: was trained {what}; give the same, or start anew")
    theirs = RunFolder.read(other)["global_batch"]
    if theirs != run.global_batch:
        raise InputError(f"--resume {folder}: was trained with training.global_batch {theirs}, not "
                         f"{run.global_batch}; set that")


def adopt(folder: Path, experiment: Experiment, run: RunFolder) -> None:
    """Make ready to start from the checkpoint ``folder``: of another run, whose finished stages are
    copied here; or of this one, whose later checkpoints and artifacts are moved out of the way."""
    names = [stage.name for stage in experiment.stages]
    number = names.index(checkpoint.read_state(folder)["stage"])
    other = folder.resolve().parents[1]
    if other != run.path.resolve():
        for name in names[:number]:
            with new_folder(run.artifact(name)) as new:
                shutil.copytree(other / "artifacts" / name, new, dirs_exist_ok=True)
        return
    later = [found for found in checkpoint.checkpoints(run.checkpoints, names[number])
             if found.name > folder.name]
    for name in names[number + 1:]:
        later += checkpoint.checkpoints(run.checkpoints, name)
    later += [run.artifact(name) for name in names[number:] if run.artifact(name).exists()]
    if later:
        aside = run.path / f"before-start-{len(run.record['starts'])}"
        aside.mkdir(exist_ok=True)
        tell(f"vlmds: what came after {folder.name} is moved to {aside}")
        for found in later:
            found.rename(aside / f"{found.parent.name}-{found.name}")


def default_ds_config() -> Path:
    """ds_configs/zero2.json, or on a CPU zero2_cpu.json.

    Raises:
        InputError: the package was installed without the repository around it.
    """
    on_cpu = get_accelerator().device_name() == "cpu"
    path = REPOSITORY / "ds_configs" / ("zero2_cpu.json" if on_cpu else "zero2.json")
    if not path.is_file():
        raise InputError(f"--ds-config: {path} is not there; give a DeepSpeed JSON")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/train.py", description="Train one experiment: all stages of its schedule.")
    add = parser.add_argument
    add("--exp", required=True, help="path of a YAML file, or the name of a packaged experiment")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="override keys, such as training.micro_batch=4 stages.0.lr=5e-4")
    add("--data", help="folder written by vlmds pack (sets data.path)")
    add("--output", help="run folder (default: runs/NAME)")
    add("--resume", default="auto", metavar="auto|never|PATH",
        help="go on with the run in --output (auto, the default), insist on a new one (never), or "
             "start from a checkpoint folder")
    add("--from", dest="from_run", type=Path, metavar="RUN",
        help="take all stages but the last from another run, instead of training them")
    add("--ds-config", type=Path, help="DeepSpeed JSON (default: ds_configs/zero2.json)")
    add("--plan", action="store_true", help="print the plan and stop")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser
