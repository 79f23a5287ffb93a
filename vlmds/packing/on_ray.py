"""Packing of shards on a Ray cluster: `vlmds pack --engine ray`.

A task packs one shard: a lost worker costs one shard, which Ray packs again elsewhere, to the same
bytes. All workers must see the videos and the output folder under the same paths or URLs.
"""

import logging
from pathlib import Path

from vlmds.console.progress import Phase, phase, silenced
from vlmds.console.text import install_hint
from vlmds.errors import InputError
from vlmds.packing.local import pack_here
from vlmds.packing.options import PackOptions
from vlmds.packing.shards import Shard

IN_FLIGHT = 2  # tasks per CPU of the cluster that are handed out at once
RETRIES = 5  # of a task whose worker or machine is lost


def pack_on_ray(out: Path, shards: list[Shard], options: PackOptions, workers: int | None, deadline: float) -> None:
    """Pack these shards on the cluster that RAY_ADDRESS names, or on a local one.

    workers: tasks at once (default: twice the cluster's CPUs). Raises InputError if Ray is not
    installed or a shard could not be packed.
    """
    try:
        import ray
    except ImportError:
        raise InputError(f"--engine ray: Ray is not installed; {install_hint('ray')}") from None
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(_pack_one)
    limit = workers or max(1, int(IN_FLIGHT * ray.cluster_resources().get("CPU", 1)))
    pending: dict = {}
    rows = sum(len(shard.rows) for shard in shards)
    try:
        with phase("packing", rows, "videos", left=True) as shown:
            for shard in shards:
                if len(pending) == limit:
                    _collect(ray, pending, shown)
                pending[task.remote(out, shard, options, deadline)] = shard
            while pending:
                _collect(ray, pending, shown)
    finally:
        if started:
            ray.shutdown()


def _pack_one(out: Path, shard: Shard, options: PackOptions, deadline: float) -> None:
    """A Ray worker's task: one shard, one decoding process."""
    with silenced():
        pack_here(out, [shard], options, 1, deadline)


def _collect(ray, pending: dict, shown: Phase) -> None:
    """Wait for one task."""
    (done,), _ = ray.wait(list(pending), num_returns=1)
    shard = pending.pop(done)
    try:
        ray.get(done)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise InputError(
            f"--engine ray: shard {shard.name} could not be packed: "
            f"{' '.join(str(error).split())[-300:]}; run the same command again"
        ) from error
    shown.advance(len(shard.rows))
