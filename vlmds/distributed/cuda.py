"""CUDA on this machine: whether its GPUs can be used, and what PyTorch and NCCL are set to."""

from __future__ import annotations

import os
import re
from glob import glob
from pathlib import Path

from vlmds.errors import InputError

DEVICES = "/dev/nvidia[0-9]*"
DRIVER = Path("/proc/driver/nvidia/version")

# For a check of links: a collective that does not come through raises after its group's timeout.
# By default NCCL's watchdog aborts the process instead.
NCCL_RAISES = {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}


def unusable_gpus() -> tuple[str, str] | None:
    """(What is wrong, the fix) if this machine has GPUs, nobody asked for another device by
    ``DS_ACCELERATOR``, and PyTorch cannot use one of them; else None."""
    import torch  # not with this module, which every command imports

    if os.environ.get("DS_ACCELERATOR", "cuda") != "cuda" or torch.cuda.is_available():
        return None
    found = sorted(glob(DEVICES))
    if not found:
        return None
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return (
            f"{found[0]} is there, but CUDA_VISIBLE_DEVICES={hidden!r} hides every GPU",
            "unset it, or ask the scheduler for GPUs; DS_ACCELERATOR=cpu uses the CPU",
        )
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return (
        f"{found[0]} is there, but PyTorch cannot use it: driver {driver_version()}, torch "
        f"{torch.__version__} {built}{_reason()}",
        "install a driver and a PyTorch that fit each other; DS_ACCELERATOR=cpu uses the CPU",
    )


def check_gpus() -> None:
    """Raise InputError if there are :func:`unusable_gpus`: on a CPU 8B would take years."""
    problem = unusable_gpus()
    if problem:
        raise InputError("; ".join(problem))


def driver_version() -> str:
    """Of NVIDIA's kernel module, such as "550.54.15"; "unknown" where it says nothing."""
    try:
        version = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", DRIVER.read_text())
    except OSError:
        version = None
    return version[1] if version else "unknown"


def _reason() -> str:
    """What CUDA says of it, in brackets."""
    import torch

    if torch.version.cuda is None:
        return ""
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return f" ({str(error).splitlines()[0]})"
    return ""


def use_expandable_segments() -> None:
    """Let PyTorch's allocator grow its segments, so that batches of many lengths do not leave gaps
    nobody can use. To be called before CUDA starts; what the user set stands."""
    if not any(
        name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def free_memory_from_cuda(accelerator) -> None:
    """Let DeepSpeed's CUDA accelerator ask CUDA how many bytes are free. By itself it asks NVML,
    if nvidia-ml-py is installed, for a GPU whose number it takes from CUDA_VISIBLE_DEVICES; UUIDs
    there (MIG, Slurm, Kubernetes) end the start with "invalid literal for int()"."""
    import torch

    accelerator.available_memory = lambda device=None: torch.cuda.mem_get_info(device)[0]
