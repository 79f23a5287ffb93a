"""Energy taken by the GPUs, from NVML's counter (extra ``energy``)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vlmds.distributed.ranks import sum_over_ranks


class EnergyMeter:
    """Joules of one stage over all ranks, each of which has a GPU of its own.

    Args:
        read: joules that this rank's GPU has taken so far, or None where nothing counts them.
        before: joules of the stage's earlier starts.
    """

    def __init__(self, read: Callable[[], float | None], before: float = 0.0):
        self._read, self._before = read, before
        self._start = read()

    def total(self) -> float | None:
        """Joules so far, the same on all ranks; None if a rank's GPU has no counter."""
        now = self._read()
        taken = None if now is None or self._start is None else now - self._start
        total, unknown = sum_over_ranks([taken or 0.0, taken is None])
        return None if unknown else self._before + total


def gpu_counter(device: torch.device) -> Callable[[], float | None]:
    """A function that returns the joules a GPU has taken since its driver was loaded (Volta and later).
    It returns None on a CPU, without nvidia-ml-py, on GPUs without a counter, and on a part of a GPU
    (MIG), where the counter is that of the whole GPU."""
    if device.type != "cuda":
        return lambda: None
    try:
        import pynvml

        pynvml.nvmlInit()
        # By UUID: CUDA_VISIBLE_DEVICES renumbers CUDA's devices, not NVML's.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        if _in_parts(handle):
            return lambda: None
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except ImportError:
        return lambda: None
    except pynvml.NVMLError:
        return lambda: None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000  # from millijoules


def _in_parts(handle) -> bool:
    """Whether a GPU is divided (MIG). CUDA may report the whole GPU's UUID for a part of it."""
    import pynvml

    try:
        return pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
    except pynvml.NVMLError:  # a GPU without MIG
        return False
