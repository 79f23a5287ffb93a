"""The job's ranks: joining them, and the exchange of small values between them.

Small values (counts, errors, paths) go through a gloo group of their own: they are needed on the host,
and a message over NCCL would make the host wait for the GPU.
"""

from __future__ import annotations

import os
import platform
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from vlmds.distributed import watchdog
from vlmds.distributed.cuda import NCCL_RAISES, check_gpus, free_memory_from_cuda
from vlmds.distributed.heartbeat import start_heartbeat
from vlmds.distributed.watchdog import doing, start_watch
from vlmds.errors import InputError
from vlmds.experiments.schema import Experiment, LoggingConfig, TrainingConfig
from vlmds.files import machine

Result = TypeVar("Result")
Item = TypeVar("Item")
REPORT_SECONDS, WAIT_SECONDS = 5.0, 0.5
"""Between two reports of a long piece of work, and between two checks of whether it is done."""
_DEFAULTS = TrainingConfig()

# Global, as torch's default process group is, to which both belong.
_turns = 0  # calls of take_turns and on_each_cache so far, which number their keys in the job's store
_control: dist.ProcessGroup | None = None  # the gloo group; None: the default group is it


def init_distributed(
    timeout_minutes: float = _DEFAULTS.timeout_minutes,
    stall_seconds: float = LoggingConfig().stall_seconds,
    heartbeat_seconds: float | None = _DEFAULTS.heartbeat_seconds,
    probing: bool = False,
) -> torch.device:
    """Join the job's ranks (of ``deepspeed``, ``torchrun``, ``srun`` + torchrun, or one plain process) and
    return this rank's device, which is set before any weight is loaded.

    Args:
        timeout_minutes, stall_seconds, heartbeat_seconds: as in an experiment's ``training`` and ``logging``.
        probing: for checks of the links: NCCL connects only when it is first used, a failed
            connection raises, and no heartbeat ends the process.

    Raises:
        InputError: there are GPUs, but PyTorch cannot use them (not if probing).
    """
    global _control
    if not probing:
        check_gpus()
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
    accelerator = get_accelerator()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(accelerator.device_name(local_rank))
    on_cpu = device.type == "cpu"
    if not on_cpu:
        accelerator.set_device(local_rank)
    if device.type == "cuda":
        free_memory_from_cuda(accelerator)
    if probing:
        os.environ.update(NCCL_RAISES)
    timeout = timedelta(minutes=timeout_minutes)
    # On CPUs DeepSpeed compiles a shared-memory op for inference_all_reduce, which training never calls.
    # A process that is killed while loading it leaves a lock on which every later start waits for ever.
    # Without the op, no compiler is needed either.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "gloo" if on_cpu else "nccl"
    join(backend, timeout, None if probing else device)
    deepspeed.init_distributed(  # uses the group that exists
        dist_backend=backend, timeout=timeout, auto_mpi_discovery=False, verbose=False
    )
    _control = None if on_cpu else dist.new_group(backend="gloo", timeout=timeout)
    start_watch(timeout_minutes, stall_seconds)
    if not probing:
        start_heartbeat(heartbeat_seconds)
    return device


def join_ranks(experiment: Experiment) -> torch.device:
    """:func:`init_distributed` with the timeouts of the experiment."""
    training = experiment.training
    return init_distributed(training.timeout_minutes, experiment.logging.stall_seconds, training.heartbeat_seconds)


def leave() -> None:
    """Leave the other ranks, if this process has joined any; it may continue with other work."""
    if dist.is_initialized():
        dist.destroy_process_group()
    watchdog.stop()


def join(backend: str, timeout: timedelta, device: torch.device | None) -> None:
    """Create the default process group, bound to ``device`` if that is a GPU: NCCL then connects at once,
    and barriers use that GPU."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    bound = device if device is not None and device.type == "cuda" and world_size > 1 else None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=timeout, device_id=bound)
        return
    # When torchrun restarts the ranks (--max-restarts with a static rendezvous), its store still has the
    # addresses of dead ranks. So each start uses keys of its own.
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"start-{start}", store),
        timeout=timeout,
        rank=rank,
        world_size=world_size,
        device_id=bound,
    )


def free_port() -> int:
    """A TCP port that no process listens on: two jobs on one machine must not use the same one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cpu_environment(ranks: int) -> dict[str, str]:
    """Environment variables that CPU ranks need; empty if there is a GPU for each rank."""
    if torch.cuda.device_count() >= ranks:
        return {}
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    return {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}


def is_main() -> bool:
    """Whether this is rank 0, which writes files and prints. Needs no process group."""
    return int(os.environ.get("RANK", 0)) == 0


def rank_and_world() -> tuple[int, int]:
    """(this rank, number of ranks); (0, 1) in a process that has not joined others."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def device_name(device: torch.device) -> str:
    """The name of a GPU, or "CPU: " and that of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # no Linux
        found = None
    return f"CPU: {found[1] if found else platform.processor()}"


def take_turns(items: Sequence[Item]) -> Iterator[Item]:
    """The items of this rank: each rank takes the next item when it is ready for it, so all ranks finish at
    about the same time. All ranks call it with the same items."""
    global _turns
    _turns += 1
    if not dist.is_initialized():
        yield from items
        return
    store = dist.PrefixStore(f"turns-{_turns}", dist.distributed_c10d._get_default_store())
    while (number := store.add("next", 1) - 1) < len(items):
        yield items[number]


def sum_over_ranks(values: list[float]) -> list[float]:
    """Elementwise sums, in float64."""
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums, group=_control)
    return sums.tolist()


def gather(value: Any) -> list:
    """Every rank's value, by rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_control)
    return values


def on_main(make: Callable[[], Result]) -> Result:
    """Call ``make`` on rank 0 only; every rank returns its result.

    Raises:
        InputError: on every rank, if it raises one on rank 0.
    """
    values: list[Any] = [together(lambda: make() if rank_and_world()[0] == 0 else None)]
    if dist.is_initialized():
        dist.broadcast_object_list(values, group=_control)
    return values[0]


def together(make: Callable[[], Result]) -> Result:
    """Call ``make`` on every rank, and return this rank's result.

    Raises:
        InputError: on every rank, if it raises one on any.
    """
    problem = None
    try:
        value = make()
    except InputError as error:
        problem = str(error)
    problem = next((p for p in gather(problem) if p is not None), None)
    if problem is not None:
        raise shared_error(problem)
    return value


def raise_together(failed: float, mine: list[str]) -> None:
    """Raise InputError on every rank, with the first problem of any rank, if there is one.

    Args:
        failed: number of ranks with a problem, the same on every rank.
        mine: this rank's problems.
    """
    if failed:
        raise shared_error(next(problem for problems in gather(mine) for problem in problems))


def shared_error(problem: str) -> InputError:
    """An InputError that every rank raises."""
    return InputError(problem, shared=True)


def on_each_cache(work: Callable[[Callable[[str], None]], None], folder: Path) -> None:
    """Call ``work`` on one rank for each disk that has ``folder``, while the others wait. All ranks
    call it.

    Unlike that of a collective, the wait has no fixed timeout: it lasts as long as some rank reports
    progress. The watchdog ends it after the job's timeout without a report.

    Args:
        work: its argument is a function that reports progress, which any thread may call.

    Raises:
        InputError: on every rank, if ``work`` raises one on any.
    """
    if not dist.is_initialized():
        work(lambda text: None)
        return
    global _turns
    _turns += 1
    store = dist.PrefixStore(f"cache-{_turns}", dist.distributed_c10d._get_default_store())
    problem, reported = None, [time.monotonic()]

    def report(text: str) -> None:
        if time.monotonic() - reported[0] > REPORT_SECONDS:
            reported[0] = time.monotonic()
            doing(text)
            store.add("reports", 1)

    if _first_of_cache(folder):
        try:
            work(report)
        except InputError as error:
            problem = str(error)
    store.add("finished", 1)
    reports = -1
    while store.add("finished", 0) < dist.get_world_size():
        if (now := store.add("reports", 0)) != reports:
            reports = now
            doing("waiting for another rank's download")
        time.sleep(WAIT_SECONDS)

    def outcome() -> None:
        if problem is not None:
            raise InputError(problem)

    together(outcome)


def _first_of_cache(folder: Path) -> bool:
    """Whether this rank is the first of those that share this ``folder``. Nodes may share it."""
    machines = gather(machine())
    mine = machines.index(machine())
    token = folder / f".vlmds-{secrets.token_hex(8)}.tmp"
    if dist.get_rank() == mine:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            token.touch()
        except OSError:  # not writable: reported by the code that writes there
            pass
    names = gather(token.name if dist.get_rank() == mine else None)
    first = next(
        rank for rank, name in enumerate(names) if rank == mine or (name is not None and (folder / name).exists())
    )
    gather(None)  # all ranks have checked
    with suppress(OSError):  # a read-only disk raises also if the file does not exist
        token.unlink()
    return first == dist.get_rank()
