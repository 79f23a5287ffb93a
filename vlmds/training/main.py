"""The command `deepspeed launch/train.py --exp e7.yaml`: one experiment, its whole schedule.

The arguments, the checks, the models, the run folder, the stages, in this order: a mistake is found
before the slow part, and a refused start leaves nothing behind. See
docs/training.md for what each argument does.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vlmds.console.progress import log_line, phase
from vlmds.console.text import counted
from vlmds.data.alike import sampling_of
from vlmds.data.dataset import Dataset, open_stages, stages_with
from vlmds.data.features import check_features, needs_tower
from vlmds.distributed.cores import cores_of_rank
from vlmds.distributed.failures import run_on_ranks
from vlmds.distributed.ranks import device_name, gather, is_main, join_ranks, on_main, shared_error, together
from vlmds.distributed.stop_request import StopRequest
from vlmds.distributed.watchdog import doing
from vlmds.experiments.differences import flat_settings
from vlmds.experiments.reading import load_experiment
from vlmds.experiments.schedule import Schedule, describe_batch
from vlmds.experiments.schema import Experiment
from vlmds.files import absolute
from vlmds.models.assemble import MetaModels, load_model, meta_models
from vlmds.models.attention import attention_for
from vlmds.models.fetch import fetch_models, pin_models
from vlmds.models.hub import pretrained_models
from vlmds.models.language import load_tokenizer
from vlmds.planning.start_checks import check_experiment, check_initial, sequence_builder
from vlmds.runs.folder import RunFolder, check_run_folder, open_run
from vlmds.runs.initial import COPY, initial_projector
from vlmds.runs.lineage import base_weights, recorded_revisions
from vlmds.runs.tuning import tuned_record
from vlmds.training.ds_config import check_ds_config, find_ds_config
from vlmds.training.origin import begin, check_origin
from vlmds.training.stages import run_stages

# Keys that may differ between nodes, besides the paths of data.
OF_A_NODE = (
    "data.cache_dir",
    "data.cache_gb",
    "data.num_workers",
    "vision.model",
    "vision.revision",
    "llm.model",
    "llm.revision",
)


def main(args: argparse.Namespace) -> int:
    """Returns the exit code: see :func:`vlmds.distributed.failures.run_on_ranks`.

    Args:
        args: the arguments of :func:`vlmds.cli.training.add_train`.
    """
    return run_on_ranks(lambda: start(args))


def start(args: argparse.Namespace) -> int:
    """Train, or with ``--plan`` print the plan only. Raises InputError, Stopped."""
    overrides = list(args.set)
    if args.data is not None:
        overrides.append(f"data.path={absolute(args.data)}")
    experiment = load_experiment(args.exp, overrides)
    if args.plan:
        if is_main():
            from vlmds.planning.plan import plan_experiment

            log_line(plan_experiment(experiment, gpus=int(os.environ.get("WORLD_SIZE", 1))))
        return 0
    train(experiment, Path(args.output or Path("runs") / experiment.name), args)
    return 0


def train(experiment: Experiment, output: Path, args: argparse.Namespace) -> None:
    """Train on all ranks that the launcher started.

    Raises:
        InputError, Stopped: on every rank.
    """
    stop = StopRequest()
    with phase("waiting for all ranks"):
        device = join_ranks(experiment)
    config = together(lambda: find_ds_config(args.ds_config))
    check_same_everywhere(experiment, config)
    on_main(lambda: check_run_folder(output))
    tuned = on_main(lambda: tuned_record(args.tuned, experiment) if args.tuned else None)
    doing("checking the data")
    with phase("opening the data"):
        datasets = on_main(lambda: open_stages(experiment))
    together(lambda: verify([*stages_with(datasets)], experiment))
    doing("looking for the pretrained models")
    start_from = None if args.resume in ("auto", "never") else Path(args.resume)
    earlier = (output, start_from and start_from.resolve().parent.parent, args.from_run)
    experiment = pin_models(experiment, on_main(lambda: recorded_revisions(experiment, *earlier)))
    # Only rank 0 needs them.
    parts: Any = together(lambda: meta_models(experiment) if is_main() else None)
    initial = on_main(lambda: initial_projector(experiment, *earlier))
    on_main(lambda: check_experiment(experiment, parts, datasets, dist.get_world_size(), initial))
    experiment = fetch_models(experiment)
    on_main(lambda: check_models(experiment, parts, datasets))
    doing("checking the base weights")
    weights = base_weights(experiment)
    if initial is not None and initial.artifact.folder != output / COPY:  # its own copy has been checked
        on_main(lambda: check_initial(initial, experiment, datasets, weights))
    origin = {
        **data_origin(experiment, datasets),
        "weights": weights,
        "revisions": {part: section.revision for part, section in pretrained_models(experiment).items()},
        **({"init": initial.record} if initial is not None else {}),
        **({"tuned": tuned} if tuned is not None else {}),
    }
    world_size = dist.get_world_size()
    run = on_main(
        lambda: open_run(output, experiment, args.resume, origin=origin, world_size=world_size, command=sys.argv)
    )
    samples = [dataset.count("train") for dataset in datasets]
    schedule = together(lambda: Schedule.of(experiment, world_size, run.global_batch, samples))
    together(lambda: check_ds_config(config, experiment, schedule.accumulation))
    taken = on_main(lambda: check_origin(run, experiment, start_from, args.from_run))
    if is_main():
        log_line(f"vlmds: {describe_batch(experiment, world_size, run.global_batch)}")
        if initial is not None:
            log_line(f"vlmds: {initial}")
    warn_of_readers(experiment.data.num_workers)
    doing("loading the models")
    stored = None if needs_tower(experiment, datasets) else datasets[0].meta["vision"]["fingerprint"]
    model = together(lambda: load_model(experiment, device, stored))
    run = on_main(lambda: begin(run, experiment, start_from, taken, initial))
    _, remark = attention_for(experiment.llm, experiment.training.micro_batch, device)
    on_main(lambda: note_attention(run, model.captioner.llm.config._attn_implementation, remark))
    hardware = sorted({*gather(device_name(device))})
    on_main(lambda: run.note(hardware=hardware))
    run_stages(experiment, model, datasets, run, schedule, config, device, stop)


def check_models(experiment: Experiment, parts: MetaModels, datasets: list[Dataset]) -> None:
    """Checks that need the models' files: the tokenizer must suit the language model, and stored
    features must be those of the tower. Raises InputError."""
    tokenizer = load_tokenizer(experiment.llm)
    for stage in experiment.stages:
        sequence_builder(experiment.for_stage(stage.name), tokenizer, parts.captioner)
    for dataset in stages_with(datasets):
        check_features(dataset, experiment)


def data_origin(experiment: Experiment, datasets: list[Dataset]) -> dict[str, Any]:
    """What a run records of its data. ``stage_data``, the fingerprint of each stage's data, is there if a stage
    has data of its own; ``data_fingerprint`` is that of the last stage."""
    last = datasets[-1]
    origin = {"data_fingerprint": last.fingerprint, "sampling": sampling_of(last.meta, experiment.data.fit)}
    if len(stages_with(datasets)) > 1:
        names = [stage.name for stage in experiment.stages]
        origin["stage_data"] = {name: dataset.fingerprint for name, dataset in zip(names, datasets, strict=True)}
    return origin


def warn_of_readers(num_workers: int) -> None:
    """Warn if rank 0 starts fewer reader processes than configured
    (:class:`vlmds.data.loader.Batches`)."""
    cores = cores_of_rank()
    if is_main() and num_workers > cores:
        log_line(
            f"vlmds: WARNING: data.num_workers {num_workers}: a rank starts only "
            f"{counted(cores, 'reader process', 'reader processes')}, its share of this node's "
            "cores"
        )


def note_attention(run: RunFolder, attention: str, remark: str) -> None:
    """Record and print the implementation of attention in use, and the remark of
    :func:`attention_for`; a warning has a line of its own."""
    run.note(attention=attention)
    warning = remark.startswith("WARNING: ")
    log_line(f"vlmds: attention: {attention}{f' ({remark})' if remark and not warning else ''}")
    if warning:
        log_line(f"vlmds: {remark}")


def check_same_everywhere(experiment: Experiment, ds_config: Path) -> None:
    """Raise InputError on all ranks, naming the keys, unless all have the same experiment (paths of
    data and models may differ) and the same DeepSpeed JSON."""
    content = ds_config.read_bytes() if ds_config.is_file() else b""
    settings = {
        key: value
        for key, value in flat_settings(experiment.model_dump()).items()
        if key not in OF_A_NODE and not re.fullmatch(r"(stages\.\d+\.)?data\.(blend\.\d+\.)?path", key)
    }
    digests = gather(hashlib.sha256(repr(sorted(settings.items())).encode() + content).hexdigest())
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is None:
        return
    all_settings = gather(settings)
    keys = [
        f"{key} {all_settings[0].get(key)!r} and {all_settings[other].get(key)!r}"
        for key in sorted(all_settings[0].keys() | all_settings[other].keys())
        if all_settings[0].get(key) != all_settings[other].get(key)
    ]
    where = f"--exp: {'; '.join(keys)}" if keys else f"--ds-config {ds_config}: another file"
    raise shared_error(f"{where} on ranks 0 and {other}; give all nodes the same")


def verify(datasets: list[Dataset], experiment: Experiment) -> None:
    """Check this rank's share of the shards and indexes. Raises InputError if one is damaged."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if experiment.data.verify == "sha256":
        for part in [part for dataset in datasets for part in dataset.parts][rank::world_size]:
            part.verify_index()
    shards = [found for dataset in datasets for found in dataset.shards()]
    with phase("checking the data", unit="shards") as shown:
        for part, shard in shown.counting(shards[rank::world_size]):
            doing(f"checking shard {part.root / shard.path}")
            part.verify([shard], experiment.data.verify)
