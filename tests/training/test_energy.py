"""Energy of the GPUs, with an imitation of NVML."""

import sys
import types

import pytest
import torch
import torch.distributed as dist

from vlmds.distributed import ranks
from vlmds.training.energy import EnergyMeter, gpu_counter


def test_joules_of_all_starts_or_none(tmp_path, monkeypatch):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        monkeypatch.setattr(ranks, "_control", dist.group.WORLD)
        meter = EnergyMeter(iter([100.0, 130.0, 175.0]).__next__, before=7.0)
        assert (meter.total(), meter.total()) == (37.0, 82.0)
        assert EnergyMeter(gpu_counter(torch.device("cpu"))).total() is None
    finally:
        dist.destroy_process_group()


class Properties:
    uuid = "8dd1cb53-6a2a-4d2c-9a5c-5c9e7a3d5c11"


class FakeNVML(types.ModuleType):
    """As much of nvidia-ml-py 13 as is called, on a machine that has no driver: there the real one
    ends at nvmlInit. One GPU, second by NVML's numbers and first by CUDA's."""

    class NVMLError(Exception):
        pass

    NVML_DEVICE_MIG_ENABLE = 1

    def __init__(self, mig):
        super().__init__("pynvml")
        self.mig = mig
        self.joules = 5.0

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != f"GPU-{Properties.uuid}":
            raise self.NVMLError(uuid)
        return "handle"

    def nvmlDeviceGetMigMode(self, handle):
        if self.mig is None:
            raise self.NVMLError("not supported")
        return [self.mig, self.mig]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return 1000 * self.joules


@pytest.mark.parametrize(("mig", "joules"), [(None, 5.0), (0, 5.0), (1, None)])
def test_the_counter_is_that_of_the_ranks_own_gpu(monkeypatch, mig, joules):
    """Found by its UUID, whatever CUDA_VISIBLE_DEVICES says; none counts for a part of a GPU."""
    monkeypatch.setitem(sys.modules, "pynvml", FakeNVML(mig))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,1,0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert gpu_counter(torch.device("cuda:0"))() == joules


@pytest.mark.gpu
def test_a_real_gpu_counts():
    pytest.importorskip("pynvml")
    read = gpu_counter(torch.device("cuda:0"))
    first = read()
    if first is None:
        pytest.skip("this GPU does not count")
    assert read() >= first > 0
