"""`vlmds doctor`: is this machine, or this cluster, ready to train?

As a plain process it looks at one machine; as launch/doctor.py in the place of launch/train.py, under
any launcher, at all machines and at what lies between them. Each check says ok, warning or FAILED,
and the mend. None can hang: a local check runs in a thread that is left behind at its deadline, and
what ranks do together has the process group's timeout.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from vlmds.config import Experiment
from vlmds.data.dataset import Dataset, open_dataset
from vlmds.data.index import CACHED_SHARDS
from vlmds.data.loader import Batches, SampleReader
from vlmds.doctor_network import Measure, check_clocks, measure_links
from vlmds.errors import InputError, SampleError
from vlmds.files import sync_file
from vlmds.memory import checkpoint_bytes
from vlmds.models.pretrained import published_or_loaded_config
from vlmds.models.vision import vision_half
from vlmds.plan import shapes
from vlmds.training.ranks import gather, init_distributed, is_main
from vlmds.training.run import git_commit, versions
from vlmds.training.optimizer import freeze
from vlmds.training.watch import doing

OK, WARNING, FAILED = "ok", "warning", "FAILED"
GIB = 2**30
OPEN_FILES = 4096
WRITE_BYTES, WRITE_CHUNK = 256 << 20, 8 << 20


@dataclass(frozen=True)
class Finding:
    level: str
    text: str
    mend: str = ""


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
        return self.nodes[dist.get_rank()]

    @property
    def leader(self) -> bool:
        return self.nodes.index(self.node) == dist.get_rank()

    @property
    def local_ranks(self) -> int:
        return self.nodes.count(self.node)


def examine(experiment: Experiment, output: Path, *, seconds: float, samples: int,
            wanted: float | None) -> int:
    """All checks, printed by rank 0. Returns 0, or 2 if one FAILED, on every rank."""
    try:
        device = init_distributed(4 * seconds / 60)
    except (RuntimeError, ValueError) as error:  # DistError is a RuntimeError
        _print("ranks", Finding(FAILED, f"rank {os.environ.get('RANK')} cannot join the others at "
                                f"{os.environ.get('MASTER_ADDR')}: {_first_line(error)}",
                                "are all nodes started, the port open, and GLOO_SOCKET_IFNAME and "
                                "NCCL_SOCKET_IFNAME set to the network between the nodes?"))
        return 2
    patient = Patient(experiment, output, seconds, samples, wanted, device)
    places = gather((socket.gethostname(), int(os.environ.get("LOCAL_RANK", 0))))
    for host, local_rank in places:
        if local_rank == 0:
            number = len(patient.names)
            patient.names.append(f"{host}#{number}" if host in patient.names else host)
        patient.nodes.append(len(patient.names) - 1)
    if is_main():
        print(f"{dist.get_world_size()} ranks on {len(patient.names)} nodes: "
              f"{', '.join(patient.names)}", flush=True)
    failed = False
    for name, check in (
            ("accelerator", _by_each_rank(check_accelerator)), ("versions", check_versions),
            ("limits", _by_leaders(check_limits)), ("memory", _by_leaders(check_shared_memory)),
            ("clock", lambda p: _judge_clocks(p, check_clocks(p.nodes))),
            ("network", check_links), ("output", _by_leaders(check_disk)),
            ("same output", check_same_output), ("dataset", _by_leaders(check_dataset)),
            ("decoding", check_decoding)):
        doing(f"the check {name!r}")
        for finding in check(patient):
            failed |= finding.level == FAILED
            if is_main():
                _print(name, finding)
    return 2 if failed else 0


def _by_each_rank(check: Callable[[Patient], list[Finding]], leaders_only: bool = False):
    """The check on every rank, within its time; equal findings become one line."""

    def run(patient: Patient) -> list[Finding]:
        mine = []
        if patient.leader or not leaders_only:
            mine = within(patient.seconds, lambda: check(patient))
        return _merge(gather(mine), patient)

    return run


def _by_leaders(check: Callable[[Patient], list[Finding]]):
    return _by_each_rank(check, leaders_only=True)


def _merge(found: list[list[Finding]], patient: Patient) -> list[Finding]:
    where: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(found):
        for finding in findings:
            nodes = where.setdefault(finding, [])
            if patient.nodes[rank] not in nodes:
                nodes.append(patient.nodes[rank])
    return [finding if len(nodes) == len(patient.names) else
            Finding(finding.level, f"{', '.join(patient.names[n] for n in nodes)}: {finding.text}",
                    finding.mend) for finding, nodes in where.items()]


def within(seconds: float, check: Callable[[], list[Finding]]) -> list[Finding]:
    """What the check finds; if it does not end in time or breaks, that is what is found."""
    result: list[Finding] = []

    def work() -> None:
        try:
            result.extend(check())
        except InputError as error:
            result.append(Finding(FAILED, str(error)))
        except Exception as error:  # whatever breaks a check is what it found
            result.append(Finding(FAILED, f"{type(error).__name__}: {_first_line(error)}"))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return [Finding(FAILED, f"no answer within {seconds:g} s",
                        "a disk or device that does not answer; look there, or give more --seconds")]
    return result


def check_accelerator(patient: Patient) -> list[Finding]:
    """Present, computes, and nobody else's memory on it."""
    if patient.device.type == "cpu":
        if os.environ.get("DS_ACCELERATOR") == "cpu":
            return [Finding(OK, f"CPU, as DS_ACCELERATOR asks; {os.cpu_count()} cores, "
                            f"{torch.get_num_threads()} threads a rank")]
        return [Finding(WARNING, "no GPU found, training would run on the CPU",
                        "install the driver, or set DS_ACCELERATOR=cpu if that is meant")]
    properties = torch.cuda.get_device_properties(patient.device)
    ones = torch.ones(1024, 1024, device=patient.device, dtype=torch.bfloat16)
    if not bool((ones @ ones == 1024).all()):
        return [Finding(FAILED, f"{patient.device}: a product of matrices came out wrong",
                        "take this GPU out of service")]
    driver = torch._C._cuda_getDriverVersion()
    findings = [Finding(OK, f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, driver "
                        f"for CUDA {driver // 1000}.{driver % 1000 // 10}, torch for "
                        f"{torch.version.cuda}")]
    free, total = torch.cuda.mem_get_info(patient.device)
    others = total - free - torch.cuda.memory_reserved(patient.device)
    if others > 0.05 * total:
        findings.append(Finding(WARNING, f"{patient.device}: {others / GIB:.1f} GiB are in use by "
                                "others", "end the processes that nvidia-smi lists"))
    if patient.experiment.llm.dtype == "bfloat16" and not torch.cuda.is_bf16_supported():
        findings.append(Finding(FAILED, f"{properties.name} has no bfloat16",
                                "use a GPU of compute capability 8.0 or newer"))
    return findings


def check_versions(patient: Patient) -> list[Finding]:
    """Of every package, and of this source; equal on all ranks."""
    mine = {**versions(), "commit": git_commit() or "none"}
    everyone = gather(mine)
    findings = []
    for name in sorted(set().union(*everyone)):
        found: dict[str, set[str]] = {}
        for rank, theirs in enumerate(everyone):
            node = patient.names[patient.nodes[rank]]
            found.setdefault(theirs.get(name, "missing"), set()).add(node)
        if len(found) > 1:
            text = "; ".join(f"{version} on {', '.join(sorted(nodes))}"
                             for version, nodes in sorted(found.items()))
            findings.append(Finding(FAILED, f"{name}: {text}",
                                    "install the same everywhere: pip install -c constraints.txt"))
    text = ", ".join(f"{name} {version}" for name, version in mine.items())
    return findings or [Finding(OK, text)]


def check_limits(patient: Patient) -> list[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= OPEN_FILES or soft == resource.RLIM_INFINITY:
        return [Finding(OK, f"{soft:,} open files")]
    # Each reader process keeps this many shards open, besides its sockets and libraries.
    level = FAILED if soft < 2 * CACHED_SHARDS else WARNING
    return [Finding(level, f"only {soft:,} open files", "ulimit -n 65536, in the shell that starts "
                    "the ranks or in /etc/security/limits.conf")]


def check_shared_memory(patient: Patient) -> list[Finding]:
    """Batches travel from the reader processes to the ranks through /dev/shm."""
    data, training = patient.experiment.data, patient.experiment.training
    sample = data.num_frames * 3 * _image_size(patient.experiment) ** 2
    ahead = 5 * data.num_workers  # batches: four read ahead by each process, and one in its hands
    need = patient.local_ranks * ahead * training.micro_batch * sample
    free = shutil.disk_usage("/dev/shm").free
    text = f"{free / GIB:.2f} GiB free in /dev/shm, readers may hold {need / GIB:.2f} GiB"
    if free < need:
        return [Finding(FAILED, text, "docker run --shm-size or --ipc=host; in Kubernetes an "
                        "emptyDir of medium Memory on /dev/shm; or a smaller data.num_workers")]
    return [Finding(OK, text)]


def check_links(patient: Patient) -> list[Finding]:
    """All-reduce within nodes, between nodes, and over all; wrong sums and slow links."""
    measures = measure_links(patient.nodes, patient.names, patient.device, patient.seconds)
    if not measures:
        return [Finding(OK, "one rank, nothing to connect")]
    findings = [_judge_link(measure, measures) for measure in measures]
    interfaces = {name: os.environ[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
                  if name in os.environ}
    if len(patient.names) > 1 and not interfaces:
        findings.append(Finding(OK, "interfaces are left to the libraries (no GLOO_SOCKET_IFNAME, "
                                "no NCCL_SOCKET_IFNAME)"))
    return findings


def _judge_link(measure: Measure, measures: list[Measure]) -> Finding:
    if measure.problem:
        return Finding(FAILED, f"{measure.name}: {measure.problem}",
                       "look at the link, firewalls, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME; "
                       "NCCL_DEBUG=INFO tells more")
    text = f"{measure.name}: {measure.gb_per_s:.2f} GB/s"
    best = max(m.gb_per_s for m in measures if m.kind == measure.kind)
    if measure.kind == "pair" and measure.gb_per_s < best / 2:
        return Finding(WARNING, f"{text}, another pair reaches {best:.2f}",
                       "one of the two nodes has a slow link or uses another interface")
    return Finding(OK, text)


def _judge_clocks(patient: Patient, offsets: list[float]) -> list[Finding]:
    if len(offsets) < 2:
        return []
    worst = max(range(len(offsets)), key=lambda node: abs(offsets[node]))
    text = f"clocks differ by up to {abs(offsets[worst]):.3f} s"
    if abs(offsets[worst]) > 1:
        return [Finding(WARNING, f"{text} ({patient.names[worst]} from {patient.names[0]}); training "
                        "does not mind, log files and credentials do", "run chrony or ntpd")]
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
    findings = [Finding(OK, f"{patient.output.absolute()}: {written / 1e6 / (end - begin):,.0f} MB/s "
                        f"written, fsync of {written / 1e6:,.0f} MB took {end - flush:.2f} s")]
    experiment = patient.experiment
    kept = experiment.training.keep_checkpoints + 2  # the best, and the one being written
    need, captioner = 0, shapes(experiment).captioner
    for stage in experiment.stages:
        freeze(captioner, stage)
        need += kept * checkpoint_bytes(experiment, captioner)
    free = shutil.disk_usage(patient.output).free
    text = (f"{free / GIB:,.1f} GiB free, {kept} checkpoints of each stage of {experiment.name} need "
            f"at most {need / GIB:,.2f} GiB")
    return [*findings, Finding(FAILED, text, "free some, choose another --output, or a smaller "
                               "training.keep_checkpoints") if free < need else Finding(OK, text)]


def check_same_output(patient: Patient) -> list[Finding]:
    """A file that rank 0 writes must be seen from every node."""
    token = patient.output / ".doctor-token.tmp"
    text = os.urandom(8).hex()
    if is_main():
        try:
            token.write_text(text)
        except OSError:
            pass  # told by the check of the disk
    text = gather(text)[0]

    def look() -> list[Finding]:
        deadline = time.monotonic() + min(10.0, patient.seconds / 2)  # network caches take seconds
        while time.monotonic() < deadline:
            if token.is_file() and token.read_text() == text:
                return [Finding(OK, f"{patient.output.absolute()} is one folder")]
            time.sleep(0.1)
        return [Finding(FAILED, f"{patient.output.absolute()} is not the folder that "
                        f"{patient.names[0]} sees", "put --output on a file system that all nodes "
                        "share")]

    findings = _by_leaders(lambda p: look())(patient)
    if is_main():
        token.unlink(missing_ok=True)
    return findings if len(patient.names) > 1 else [f for f in findings if f.level != OK]


def check_dataset(patient: Patient) -> list[Finding]:
    """Sizes of all shards, and checksums of members all over them."""
    data = patient.experiment.data
    if data.path is None and data.blend is None:
        return [Finding(WARNING, "not looked at", "pass --data DIR")]
    dataset = open_dataset(data)
    for part, shard in dataset.shards():
        part.verify([shard], "size")
    begin, read = time.monotonic(), 0
    split = "train" if "train" in dataset.splits else dataset.splits[0]
    reader = _reader(patient, dataset, split)
    count = min(patient.samples, len(reader))
    for number in range(count):
        if time.monotonic() - begin > patient.seconds / 2:
            count = number
            break
        place = reader.order.place(number * len(reader) // count)
        part = dataset.parts[place.part]
        row = part.row(split, *next(reader.order.candidates(place)))
        read += sum(len(member) for member in part.read(row).values())
    rate = read / 1e6 / max(time.monotonic() - begin, 1e-9)
    return [Finding(OK, f"{dataset.fingerprint[:12]}: {len(reader):,} samples in {split}; {count} "
                    f"read and their checksums right, {rate:,.0f} MB/s")]


def check_decoding(patient: Patient) -> list[Finding]:
    """Samples per second that the reader processes of all ranks give at once."""
    data = patient.experiment.data
    if data.path is None and data.blend is None:
        return []
    rate, problem = 0.0, None
    try:
        rate = _decode_rate(patient)
    except Exception as error:  # the other ranks wait for what this one found
        problem = f"{type(error).__name__}: {_first_line(error)}"
    rates = gather((rate, problem))
    if problem := next((p for _, p in rates if p), None):
        return [Finding(FAILED, problem)]
    total = sum(r for r, _ in rates)
    text = (f"{total:,.1f} samples/s by {data.num_workers} reader processes a rank on "
            f"{os.cpu_count()} cores a node")
    if patient.wanted is None:
        return [Finding(OK, text)]
    text += f", {patient.wanted:g} wanted"
    mend = ("pack with --store frames or features, or raise data.num_workers where cores are idle")
    level = OK if total >= 1.2 * patient.wanted else WARNING if total >= patient.wanted else FAILED
    return [Finding(level, text, "" if level == OK else mend)]


def _decode_rate(patient: Patient) -> float:
    """Of this rank, after its first batch."""
    reader = _reader(patient, open_dataset(patient.experiment.data), "train")
    micro_batch = patient.experiment.training.micro_batch
    first, stride = dist.get_rank() * micro_batch, dist.get_world_size() * micro_batch
    batches = [range(first + n * stride, first + n * stride + micro_batch) for n in range(4096)]
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
    return SampleReader(dataset, split, data.num_frames, _image_size(patient.experiment),
                        window=data.shuffle_window)


def _image_size(experiment: Experiment) -> int:
    name = experiment.vision.model
    return vision_half(published_or_loaded_config(name, "vision.model"), name).image_size


def _print(name: str, finding: Finding) -> None:
    mend = f"; {finding.mend}" if finding.mend else ""
    print(f"{finding.level:<8} {name}: {finding.text}{mend}", flush=True)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
