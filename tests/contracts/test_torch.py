"""PyTorch: private names and details that vlmds relies on."""

import inspect
import os
import signal

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.agent.server import local_elastic_agent
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.flop_counter import FlopCounterMode


def test_the_groups_store_can_be_shared():
    """distributed/ranks, watchdog, heartbeat: _get_default_store of the process group.
    test_deepspeed.py's worker counts in such a store."""
    assert not inspect.signature(dist.distributed_c10d._get_default_store).parameters
    store = dist.PrefixStore("a", dist.HashStore())
    assert store.add("n", 1) == 1 and store.add("n", 0) == 1


def test_gradients_add_up_in_their_own_dtype():
    """training/engine.build_engine: grad_dtype of a parameter in bfloat16. 256 + 1 is 256 in bfloat16."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    weight.grad_dtype = torch.float32
    for factor in (256.0, 1.0):
        (weight * factor).sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.item() == 257.0


def test_storage_has_an_address_without_having_memory():
    """planning/memory.saved_bytes: _cdata, the same for a view, another for another tensor, on "meta", too."""
    tensor, other = (torch.empty(4, 4, device="meta") for _ in range(2))
    address = tensor.untyped_storage()._cdata
    assert address == tensor.T[1:].untyped_storage()._cdata != other.untyped_storage()._cdata
    assert tensor.untyped_storage().nbytes() == 64


def test_hooks_stand_in_four_dictionaries():
    """training/engine.release clears them."""
    module = nn.Linear(2, 2)
    module.register_forward_hook(lambda *_: None)
    module.register_forward_pre_hook(lambda *_: None)
    module.register_full_backward_hook(lambda *_: None)
    module.register_full_backward_pre_hook(lambda *_: None)
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    assert [len(getattr(module, name)) for name in names] == [1, 1, 1, 1]


def test_lists_are_interpolated_in_place():
    """training/ema.WeightAverage: torch._foreach_lerp_."""
    average = [torch.zeros(2), torch.zeros(1)]
    torch._foreach_lerp_(average, [torch.full((2,), 4.0), torch.ones(1)], 0.25)
    assert [t.tolist() for t in average] == [[1.0, 1.0], [0.25]]


def test_products_are_counted_without_memory():
    """planning/flops.projector_flops: FlopCounterMode on "meta"; a multiply-add is two."""
    with FlopCounterMode(display=False) as counter:
        nn.Linear(8, 4, device="meta")(torch.empty(3, 8, device="meta"))
    assert counter.get_total_flops() == 2 * 3 * 8 * 4


class Dies(IterableDataset):
    def __iter__(self):
        os.kill(os.getpid(), signal.SIGKILL)
        yield


def test_a_dead_reader_process_is_named_as_such():
    """data/loader.Batches: the words "DataLoader worker" distinguish it from the reader's own error."""
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(DataLoader(Dies(), batch_size=None, num_workers=1))


def test_too_many_reader_processes_are_warned_of_in_these_words():
    """console/quiet ignores this warning; training says it itself."""
    with pytest.warns(UserWarning, match="suggested max number of worker"):
        DataLoader([1], num_workers=1000)


def test_torchrun_says_how_often_it_started_in_these_variables():
    """distributed/ranks.join."""
    agent = inspect.getsource(local_elastic_agent)
    assert '"TORCHELASTIC_RESTART_COUNT"' in agent and '"TORCHELASTIC_USE_AGENT_STORE"' in agent
    reader = inspect.getsource(inspect.getmodule(dist.rendezvous))
    assert 'os.environ.get("TORCHELASTIC_USE_AGENT_STORE", None) == str(True)' in reader


def test_the_allocators_settings_are_read_from_these_variables(monkeypatch):
    """distributed/cuda.use_expandable_segments, before CUDA starts."""
    from vlmds.distributed.cuda import use_expandable_segments

    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    use_expandable_segments()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.gpu
def test_the_drivers_version_is_a_number():
    """doctor/node: torch._C._cuda_getDriverVersion, such as 12040."""
    assert torch._C._cuda_getDriverVersion() > 10000
