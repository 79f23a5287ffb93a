"""CUDA on this machine: whether its GPUs are usable, and settings of PyTorch and NCCL."""

from __future__ import annotations

import os
import re
from glob import glob
from pathlib import Path

from vlmds.errors import InputError

DEVICES = "/dev/nvidia[0-9]*"
DRIVER = Path("/proc/driver/nvidia/version")

# For checks of the links: a collective that fails raises after its group's timeout. By default NCCL's
# watchdog aborts the process instead.
NCCL_RAISES = {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}


def unusable_gpus() -> tuple[str, str] | None:
    """(problem, fix) if this machine has GPUs that PyTorch cannot use, and ``DS_ACCELERATOR`` does not
    ask for another device; else None."""
    import torch  # here, because every command imports this module

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
    """Raise InputError if there are :func:`unusable_gpus`: training 8B on a CPU would take years."""
    problem = unusable_gpus()
    if problem:
        raise InputError("; ".join(problem))


def driver_version() -> str:
    """Version of NVIDIA's kernel module, such as "550.54.15"; or "unknown"."""
    try:
        version = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", DRIVER.read_text())
    except OSError:
        version = None
    return version[1] if version else "unknown"


def _reason() -> str:
    """CUDA's error message in brackets, or an empty text."""
    import torch

    if torch.version.cuda is None:
        return ""
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return f" ({str(error).splitlines()[0]})"
    return ""


def use_expandable_segments() -> None:
    """Let PyTorch's allocator grow its segments, which avoids fragmentation by batches of many lengths. To be
    called before CUDA starts; settings of the user are kept."""
    if not any(
        name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def free_memory_from_cuda(accelerator) -> None:
    """Let DeepSpeed's CUDA accelerator ask CUDA for the number of free bytes. If nvidia-ml-py is installed
    it would ask NVML, for a GPU whose number it reads from CUDA_VISIBLE_DEVICES; with UUIDs there (MIG,
    Slurm, Kubernetes) that fails with "invalid literal for int()"."""
    import torch

    accelerator.available_memory = lambda device=None: torch.cuda.mem_get_info(device)[0]
