"""The job's ranks: joining them, and what they tell each other beside the training itself.

Small facts (counts, errors, paths) travel over a gloo group of their own: they are known on the
host, and a message over NCCL would make the host wait for the GPU.
"""

from __future__ import annotations

import os
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

from vlmds.distributed.cuda import NCCL_RAISES, check_gpus, free_memory_from_cuda
from vlmds.distributed.heartbeat import start_heartbeat
from vlmds.distributed.watchdog import doing, start_watch
from vlmds.errors import InputError
from vlmds.experiments.schema import LoggingConfig, TrainingConfig
from vlmds.files import machine

Result = TypeVar("Result")
Item = TypeVar("Item")
REPORT_SECONDS, WAIT_SECONDS = 5.0, 0.5
"""Between two reports of a long piece of work, and between two looks at whether it is done."""
TIMEOUT_MINUTES, HEARTBEAT_SECONDS = (
    TrainingConfig.model_fields[name].default for name in ("timeout_minutes", "heartbeat_seconds")
)
STALL_SECONDS = LoggingConfig.model_fields["stall_seconds"].default
_turns = 0
_control: dist.ProcessGroup | None = None


def init_distributed(
    timeout_minutes: float = TIMEOUT_MINUTES,
    stall_seconds: float = STALL_SECONDS,
    heartbeat_seconds: float | None = HEARTBEAT_SECONDS,
    probing: bool = False,
) -> torch.device:
    """Join the job's ranks (``deepspeed``, ``torchrun``, ``srun`` + torchrun, or one plain process)
    and return this rank's device, which is set before any weight is loaded.

    Args:
        probing: for checks of the links: no connection over NCCL is made before it is used, one
            that fails raises, and no heartbeat ends the process.

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
    # On CPUs DeepSpeed compiles a shared-memory op for inference_all_reduce, which training never
    # calls. A process that is killed while it loads it leaves a lock behind on which every later
    # start waits for ever; without the op there is neither that nor a compiler to install.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "gloo" if on_cpu else "nccl"
    join(backend, timeout, None if probing else device)
    deepspeed.init_distributed(  # which takes what is there
        dist_backend=backend, timeout=timeout, auto_mpi_discovery=False, verbose=False
    )
    _control = None if on_cpu else dist.new_group(backend="gloo", timeout=timeout)
    start_watch(timeout_minutes, stall_seconds)
    if not probing:
        start_heartbeat(heartbeat_seconds)
    return device


def join(backend: str, timeout: timedelta, device: torch.device | None) -> None:
    """Make the default process group, bound to ``device`` where that is a GPU: NCCL then connects
    at once, and a barrier knows its GPU."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    bound = device if device is not None and device.type == "cuda" and world_size > 1 else None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=timeout, device_id=bound)
        return
    # torchrun's store lives on when it starts the ranks again (--max-restarts with a static
    # rendezvous), and in it the addresses of dead ranks. Each start has names of its own.
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
    """A TCP port that nobody listens on: two jobs on one machine must not take the same."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cpu_environment(ranks: int) -> dict[str, str]:
    """What CPU ranks need, empty where there are GPUs."""
    if torch.cuda.device_count() >= ranks:
        return {}
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    return {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}


def is_main() -> bool:
    """Whether this is rank 0, the one that writes and speaks."""
    return int(os.environ.get("RANK", 0)) == 0


def rank_and_world() -> tuple[int, int]:
    """(this rank, number of ranks); (0, 1) in a process that has joined none."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def take_turns(items: Sequence[Item]) -> Iterator[Item]:
    """The items that fall to this rank: each rank takes the next one whenever it is ready for it,
    so that all are done at about the same time. To be called on all ranks alike."""
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
    """Call ``make`` on rank 0 alone and return what it returns on every rank.

    Raises:
        InputError: on every rank, if it raises one on rank 0.
    """
    value = together(make if rank_and_world()[0] == 0 else lambda: None)
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, group=_control)
    return values[0]


def together(make: Callable[[], Result]) -> Result:
    """Call ``make`` on every rank; what it returns on this one.

    Raises:
        InputError: on every rank, if it raises one on any.
    """
    value, problem = None, None
    try:
        value = make()
    except InputError as error:
        problem = str(error)
    problem = next((p for p in gather(problem) if p is not None), None)
    if problem is not None:
        raise shared_error(problem)
    return value


def raise_together(failed: float, mine: list[str]) -> None:
    """Raise InputError on every rank with the first of all ranks' problems, if ``failed``, the sum
    over ranks of whether there is one, is not 0."""
    if failed:
        raise shared_error(next(problem for problems in gather(mine) for problem in problems))


def shared_error(problem: str) -> InputError:
    """An InputError that every rank raises."""
    error = InputError(problem)
    error.shared = True
    return error


def on_each_cache(work: Callable[[Callable[[str], None]], None], folder: Path) -> None:
    """Call ``work`` on one rank for each disk that ``folder`` lies on, while the others wait. All
    ranks call it alike.

    Unlike a collective, the waiting has no fixed timeout: it lasts as long as some rank reports. Only
    when no report has come for the job's timeout does the watchdog end it.

    Args:
        work: gets a function to report progress with, which any thread may call.

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
    """Whether this rank is the first that sees ``folder`` as it is here. Nodes may share it."""
    machines = gather(machine())
    mine = machines.index(machine())
    token = folder / f".vlmds-{secrets.token_hex(8)}.tmp"
    if dist.get_rank() == mine:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            token.touch()
        except OSError:  # it cannot be written: whoever needs to will report that
            pass
    names = gather(token.name if dist.get_rank() == mine else None)
    first = next(
        rank for rank, name in enumerate(names) if rank == mine or (name is not None and (folder / name).exists())
    )
    gather(None)  # all have looked
    with suppress(OSError):  # on a disk that may only be read, also where there is none
        token.unlink()
    return first == dist.get_rank()
