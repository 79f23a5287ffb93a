import torch
import torch.distributed as dist

from vlmds.training import ranks
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
