"""Checks of `vlmds doctor` on one machine: accelerator, limits, shared memory, disk, models and data. None
waits for another rank."""

from __future__ import annotations

import os
import resource
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vlmds.console.text import counted
from vlmds.data.dataset import Dataset, open_given, stages_with
from vlmds.data.loader import Batches, SampleReader
from vlmds.data.shard_reader import CACHED_SHARDS
from vlmds.distributed.cuda import driver_version, unusable_gpus
from vlmds.distributed.ranks import rank_and_world
from vlmds.errors import SampleError
from vlmds.experiments.schema import Experiment
from vlmds.files import sync_file
from vlmds.models.assemble import meta_models
from vlmds.models.fetch import presence
from vlmds.models.pretrained import published_or_loaded_config
from vlmds.models.trainable import freeze
from vlmds.models.vision import vision_half
from vlmds.planning.memory import checkpoint_bytes
from vlmds.planning.start_checks import check_experiment, check_initial
from vlmds.runs.initial import check_fits, initial_projector

OK, WARNING, FAILED = "ok", "warning", "FAILED"
GIB = 2**30
OPEN_FILES = 4096
WRITE_BYTES, WRITE_CHUNK = 256 << 20, 8 << 20


@dataclass(frozen=True)
class Finding:
    """One result of a check. level: OK, WARNING or FAILED."""

    level: str
    text: str
    fix: str = ""


@dataclass
class CheckContext:
    """Input of the checks: this rank, its job and the options.

    seconds: time limit of one check. samples: number of dataset samples to read on each node. wanted:
    samples per second that training should reach over all ranks, or None. nodes: by rank, the number of
    its node. names: of the nodes. leader: whether this rank is the first of its node.
    """

    experiment: Experiment
    output: Path
    seconds: float
    samples: int
    wanted: float | None
    device: torch.device
    nodes: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @property
    def node(self) -> int:
        return self.nodes[rank_and_world()[0]]

    @property
    def leader(self) -> bool:
        return self.nodes.index(self.node) == rank_and_world()[0]

    @property
    def local_ranks(self) -> int:
        return self.nodes.count(self.node)


def check_accelerator(context: CheckContext) -> list[Finding]:
    """The GPU is present, usable, computes correctly, and is not used by other processes."""
    if context.device.type == "cpu":
        if os.environ.get("DS_ACCELERATOR") == "cpu":
            return [
                Finding(
                    OK, f"CPU, as DS_ACCELERATOR asks; {os.cpu_count()} cores, {torch.get_num_threads()} threads a rank"
                )
            ]
        if problem := unusable_gpus():
            return [Finding(FAILED, *problem)]
        return [
            Finding(
                WARNING,
                "no GPU found, training would run on the CPU",
                "install the driver, or set DS_ACCELERATOR=cpu if that is intended",
            )
        ]
    properties = torch.cuda.get_device_properties(context.device)
    ones = torch.ones(1024, 1024, device=context.device, dtype=torch.bfloat16)
    if not bool((ones @ ones == 1024).all()):
        return [Finding(FAILED, f"{context.device}: a matrix product was wrong", "take this GPU out of service")]
    driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # not in the stubs
    findings = [
        Finding(
            OK,
            f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, driver "
            f"{driver_version()} for CUDA {driver // 1000}.{driver % 1000 // 10}, torch "
            f"for {torch.version.cuda}",
        )
    ]
    free, total = torch.cuda.mem_get_info(context.device)
    others = total - free - torch.cuda.memory_reserved(context.device)
    if others > 0.05 * total:
        findings.append(
            Finding(
                WARNING,
                f"{context.device}: {others / GIB:.1f} GiB are in use by other processes",
                "end the processes that nvidia-smi lists",
            )
        )
    if context.experiment.llm.dtype == "bfloat16" and not torch.cuda.is_bf16_supported():
        findings.append(
            Finding(FAILED, f"{properties.name} has no bfloat16", "use a GPU of compute capability 8.0 or newer")
        )
    return findings


def check_limits(context: CheckContext) -> list[Finding]:
    """The limit of open files is high enough for the reader processes."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= OPEN_FILES or soft == resource.RLIM_INFINITY:
        return [Finding(OK, f"{soft:,} open files")]
    # Each reader process keeps this many shards open, besides its sockets and libraries.
    level = FAILED if soft < 2 * CACHED_SHARDS else WARNING
    return [
        Finding(
            level,
            f"only {soft:,} open files",
            "ulimit -n 65536, in the shell that starts the ranks or in /etc/security/limits.conf",
        )
    ]


def check_shared_memory(context: CheckContext) -> list[Finding]:
    """/dev/shm has room for the batches that go through it from the reader processes to the ranks."""
    data, training = context.experiment.data, context.experiment.training
    sample = data.num_frames * 3 * _image_size(context.experiment) ** 2
    ahead = 5 * data.num_workers  # batches: per process, four read ahead and one in progress
    need = context.local_ranks * ahead * training.micro_batch * sample
    free = shutil.disk_usage("/dev/shm").free
    text = f"{free / GIB:.2f} GiB free in /dev/shm, readers may use {need / GIB:.2f} GiB"
    if free < need:
        return [
            Finding(
                FAILED,
                text,
                "docker run --shm-size or --ipc=host; in Kubernetes an "
                "emptyDir of medium Memory on /dev/shm; or a smaller data.num_workers",
            )
        ]
    return [Finding(OK, text)]


def check_disk(context: CheckContext) -> list[Finding]:
    """Write speed, including the flush to disk, and room for the run's checkpoints."""
    context.output.mkdir(parents=True, exist_ok=True)
    path = context.output / f".doctor-write-{context.node}.tmp"
    chunk, written, begin = os.urandom(WRITE_CHUNK), 0, time.monotonic()
    try:
        with path.open("wb") as file:
            while written < WRITE_BYTES and time.monotonic() - begin < context.seconds / 4:
                written += file.write(chunk)
        flush = time.monotonic()
        sync_file(path)
        end = time.monotonic()
    finally:
        path.unlink(missing_ok=True)
    findings = [
        Finding(
            OK,
            f"{context.output.absolute()}: {written / 1e6 / (end - begin):,.0f} MB/s "
            f"written, fsync of {written / 1e6:,.0f} MB took {end - flush:.2f} s",
        )
    ]
    experiment = context.experiment
    kept = experiment.training.keep_checkpoints + 2  # the best, and the one being written
    need, captioner = 0, meta_models(experiment).captioner
    for stage in experiment.stages:
        freeze(captioner, stage)
        need += kept * checkpoint_bytes(experiment, captioner)
    free = shutil.disk_usage(context.output).free
    text = (
        f"{free / GIB:,.1f} GiB free, {kept} checkpoints of each stage of {experiment.name} need "
        f"at most {need / GIB:,.2f} GiB"
    )
    return [
        *findings,
        Finding(FAILED, text, "free some, choose another --output, or reduce training.keep_checkpoints")
        if free < need
        else Finding(OK, text),
    ]


def check_models(context: CheckContext) -> list[Finding]:
    """The pretrained models are on this machine, or can be downloaded."""
    findings = []
    for section in (context.experiment.vision, context.experiment.llm):
        found = presence(section)
        level = OK if found.here else FAILED if found.missing is None else WARNING
        findings.append(Finding(level, f"{section.model}: {found.text}"))
    return findings


def check_start(context: CheckContext) -> list[Finding]:
    """The projector that ``projector.init`` names is there, and fits the experiment, as training checks it."""
    experiment = context.experiment
    initial = initial_projector(experiment)
    if initial is None:
        return []
    check_fits(initial, experiment, meta_models(experiment).captioner.projector)
    check_initial(initial, experiment, open_given(experiment))
    return [Finding(OK, str(initial))]


def check_dataset(context: CheckContext) -> list[Finding]:
    """Sizes of all shards, checksums of samples spread over them, and the checks with which training would
    refuse this data and number of ranks."""
    datasets = open_given(context.experiment)
    different = stages_with(datasets)
    for dataset in different:
        for part, shard in dataset.shards() if dataset else ():
            part.verify([shard], "size")
    if any(datasets):
        check_experiment(context.experiment, meta_models(context.experiment), datasets, rank_and_world()[1])
    seconds = context.seconds / 2 / len(different)
    return [_check_samples(context, dataset, seconds) for dataset in different]


def _check_samples(context: CheckContext, dataset: Dataset | None, seconds: float) -> Finding:
    """Read samples spread over the dataset for at most so many seconds."""
    if dataset is None:
        return Finding(WARNING, "not checked", "pass --data DIR")
    begin, read, split = time.monotonic(), 0, "train"
    reader = _reader(context, dataset, split)
    count = min(context.samples, len(reader))
    for number in range(count):
        if time.monotonic() - begin > seconds:
            count = number
            break
        wanted = reader.order.locate(number * len(reader) // count)
        part = dataset.parts[wanted.part]
        row = part.row(split, *next(reader.order.candidates(wanted)))
        read += sum(len(member) for member in part.read(row).values())
    rate = read / 1e6 / max(time.monotonic() - begin, 1e-9)
    own = f"{dataset.key}: " if dataset.key != "data" else ""
    return Finding(
        OK,
        f"{own}{dataset.fingerprint[:12]}: {counted(len(reader), 'sample')} in {split}; "
        f"{count} read and their checksums correct, {rate:,.0f} MB/s",
    )


def decode_rate(context: CheckContext, dataset: Dataset) -> float:
    """Samples per second that this rank's reader processes decode, after the first batch."""
    reader = _reader(context, dataset, "train")
    micro_batch = context.experiment.training.micro_batch
    rank, ranks = rank_and_world()
    batches = [range(first, first + micro_batch) for first in ((n * ranks + rank) * micro_batch for n in range(4096))]
    begin, samples, now = 0.0, 0, 0.0
    stop = time.monotonic() + context.seconds / 2
    workers = context.experiment.data.num_workers
    for batch in Batches(reader, batches, lambda samples: {"size": len(samples)}, workers):
        if "failure" in batch:
            raise SampleError(batch["failure"])
        now = time.monotonic()
        if not begin:
            begin = now  # the start of the processes does not count
            continue
        samples += batch["size"]
        if now > stop or (samples >= context.samples and now - begin > 1):
            break
    return samples / (now - begin)


def _reader(context: CheckContext, dataset: Dataset, split: str) -> SampleReader:
    data = context.experiment.data
    size = _image_size(context.experiment)
    return SampleReader(dataset, split, data.num_frames, size, window=data.shuffle_window, fit=data.fit)


def _image_size(experiment: Experiment) -> int:
    vision = experiment.vision
    size = vision_half(published_or_loaded_config(vision), vision.model).image_size
    assert isinstance(size, int)  # transformers allows more, CLIP does not
    return size
