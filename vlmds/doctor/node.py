"""What one machine is asked by `vlmds doctor` (vlmds/doctor/cluster.py): its accelerator, limits, shared
memory, disk and data. No check here waits for another rank."""

from __future__ import annotations

import os
import resource
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vlmds.console.text import counted
from vlmds.data.dataset import Dataset, open_dataset
from vlmds.data.index import CACHED_SHARDS
from vlmds.data.loader import Batches, SampleReader
from vlmds.distributed.cuda import driver_version, unusable_gpus
from vlmds.distributed.ranks import place
from vlmds.errors import SampleError
from vlmds.experiments.schema import Experiment
from vlmds.files import sync_file
from vlmds.models.assemble import meta_models
from vlmds.models.fetch import presence
from vlmds.models.pretrained import published_or_loaded_config
from vlmds.models.trainable import freeze
from vlmds.models.vision import vision_half
from vlmds.planning.checks import check_experiment
from vlmds.planning.memory import checkpoint_bytes

OK, WARNING, FAILED = "ok", "warning", "FAILED"
GIB = 2**30
OPEN_FILES = 4096
WRITE_BYTES, WRITE_CHUNK = 256 << 20, 8 << 20


@dataclass(frozen=True)
class Finding:
    level: str
    text: str
    fix: str = ""


@dataclass
class Patient:
    """What the checks know of this rank and its job.

    seconds: how long one check may take. samples: dataset samples to read on each node. wanted:
    samples per second that the training is to reach over all ranks, or None. nodes: the number of
    each rank's node; names: of the nodes; leader: whether this rank is the first of its node.
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
        return self.nodes[place()[0]]

    @property
    def leader(self) -> bool:
        return self.nodes.index(self.node) == place()[0]

    @property
    def local_ranks(self) -> int:
        return self.nodes.count(self.node)


def check_accelerator(patient: Patient) -> list[Finding]:
    """Present, usable, computes, and nobody else's memory on it."""
    if patient.device.type == "cpu":
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
                "install the driver, or set DS_ACCELERATOR=cpu if that is meant",
            )
        ]
    properties = torch.cuda.get_device_properties(patient.device)
    ones = torch.ones(1024, 1024, device=patient.device, dtype=torch.bfloat16)
    if not bool((ones @ ones == 1024).all()):
        return [
            Finding(FAILED, f"{patient.device}: a product of matrices came out wrong", "take this GPU out of service")
        ]
    driver = torch._C._cuda_getDriverVersion()
    findings = [
        Finding(
            OK,
            f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, driver "
            f"{driver_version()} for CUDA {driver // 1000}.{driver % 1000 // 10}, torch "
            f"for {torch.version.cuda}",
        )
    ]
    free, total = torch.cuda.mem_get_info(patient.device)
    others = total - free - torch.cuda.memory_reserved(patient.device)
    if others > 0.05 * total:
        findings.append(
            Finding(
                WARNING,
                f"{patient.device}: {others / GIB:.1f} GiB are in use by others",
                "end the processes that nvidia-smi lists",
            )
        )
    if patient.experiment.llm.dtype == "bfloat16" and not torch.cuda.is_bf16_supported():
        findings.append(
            Finding(FAILED, f"{properties.name} has no bfloat16", "use a GPU of compute capability 8.0 or newer")
        )
    return findings


def check_limits(patient: Patient) -> list[Finding]:
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


def check_shared_memory(patient: Patient) -> list[Finding]:
    """Batches travel from the reader processes to the ranks through /dev/shm."""
    data, training = patient.experiment.data, patient.experiment.training
    sample = data.num_frames * 3 * _image_size(patient.experiment) ** 2
    ahead = 5 * data.num_workers  # batches: four read ahead by each process, and one in its hands
    need = patient.local_ranks * ahead * training.micro_batch * sample
    free = shutil.disk_usage("/dev/shm").free
    text = f"{free / GIB:.2f} GiB free in /dev/shm, readers may hold {need / GIB:.2f} GiB"
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


def check_disk(patient: Patient) -> list[Finding]:
    """Write speed, flushed to disk, and room for the run's checkpoints."""
    patient.output.mkdir(parents=True, exist_ok=True)
    path = patient.output / f".doctor-write-{patient.node}.tmp"
    chunk, written, begin = os.urandom(WRITE_CHUNK), 0, time.monotonic()
    try:
        with path.open("wb") as file:
            while written < WRITE_BYTES and time.monotonic() - begin < patient.seconds / 4:
                written += file.write(chunk)
        flush = time.monotonic()
        sync_file(path)
        end = time.monotonic()
    finally:
        path.unlink(missing_ok=True)
    findings = [
        Finding(
            OK,
            f"{patient.output.absolute()}: {written / 1e6 / (end - begin):,.0f} MB/s "
            f"written, fsync of {written / 1e6:,.0f} MB took {end - flush:.2f} s",
        )
    ]
    experiment = patient.experiment
    kept = experiment.training.keep_checkpoints + 2  # the best, and the one being written
    need, captioner = 0, meta_models(experiment).captioner
    for stage in experiment.stages:
        freeze(captioner, stage)
        need += kept * checkpoint_bytes(experiment, captioner)
    free = shutil.disk_usage(patient.output).free
    text = (
        f"{free / GIB:,.1f} GiB free, {kept} checkpoints of each stage of {experiment.name} need "
        f"at most {need / GIB:,.2f} GiB"
    )
    return [
        *findings,
        Finding(FAILED, text, "free some, choose another --output, or a smaller training.keep_checkpoints")
        if free < need
        else Finding(OK, text),
    ]


def check_models(patient: Patient) -> list[Finding]:
    """The pretrained models are on this machine, or can be downloaded."""
    findings = []
    for section in (patient.experiment.vision, patient.experiment.llm):
        found = presence(section)
        level = OK if found.here else FAILED if found.missing is None else WARNING
        findings.append(Finding(level, f"{section.model}: {found.text}"))
    return findings


def check_dataset(patient: Patient) -> list[Finding]:
    """Sizes of all shards, checksums of members all over them, and all that training would refuse
    for this data and number of ranks."""
    data = patient.experiment.data
    if data.path is None and data.blend is None:
        return [Finding(WARNING, "not checked", "pass --data DIR")]
    dataset = open_dataset(data)
    for part, shard in dataset.shards():
        part.verify([shard], "size")
    check_experiment(patient.experiment, meta_models(patient.experiment), dataset, place()[1])
    begin, read, split = time.monotonic(), 0, "train"
    reader = _reader(patient, dataset, split)
    count = min(patient.samples, len(reader))
    for number in range(count):
        if time.monotonic() - begin > patient.seconds / 2:
            count = number
            break
        wanted = reader.order.place(number * len(reader) // count)
        part = dataset.parts[wanted.part]
        row = part.row(split, *next(reader.order.candidates(wanted)))
        read += sum(len(member) for member in part.read(row).values())
    rate = read / 1e6 / max(time.monotonic() - begin, 1e-9)
    return [
        Finding(
            OK,
            f"{dataset.fingerprint[:12]}: {counted(len(reader), 'sample')} in {split}; "
            f"{count} read and their checksums correct, {rate:,.0f} MB/s",
        )
    ]


def decode_rate(patient: Patient) -> float:
    """Of this rank, after its first batch."""
    reader = _reader(patient, open_dataset(patient.experiment.data), "train")
    micro_batch = patient.experiment.training.micro_batch
    rank, ranks = place()
    batches = [range(first, first + micro_batch) for first in ((n * ranks + rank) * micro_batch for n in range(4096))]
    begin, samples = None, 0
    stop = time.monotonic() + patient.seconds / 2
    workers = patient.experiment.data.num_workers
    for batch in Batches(reader, batches, lambda samples: {"size": len(samples)}, workers):
        if "failure" in batch:
            raise SampleError(batch["failure"])
        now = time.monotonic()
        if begin is None:
            begin = now  # starting the processes does not count
            continue
        samples += batch["size"]
        if now > stop or (samples >= patient.samples and now - begin > 1):
            break
    return samples / (now - begin)


def _reader(patient: Patient, dataset: Dataset, split: str) -> SampleReader:
    data = patient.experiment.data
    return SampleReader(dataset, split, data.num_frames, _image_size(patient.experiment), window=data.shuffle_window)


def _image_size(experiment: Experiment) -> int:
    vision = experiment.vision
    return vision_half(published_or_loaded_config(vision), vision.model).image_size
