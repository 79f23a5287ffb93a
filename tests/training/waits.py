"""launch/train.py that records where the host would wait for a GPU.

On a CPU nothing waits, and all tensors are alike. So those that would be on the GPU are followed:
the engine's weights, the features, what is sent there, and whatever is computed from them. An
operation whose result the host, or the shape of another tensor, depends on would wait. Those within
the micro-batches of a step go into the file VLMDS_TEST_WAITS as JSON: {operations: number of all on
the GPU, steps, waits: {operation: where}}.
"""

import json
import os
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmds.cli import main
from vlmds.models import captioner
from vlmds.models.assemble import Model
from vlmds.training import trainer

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.nonzero,
    aten.masked_select,
    aten.masked_scatter,
    aten.masked_scatter_,
    aten.masked_scatter_backward,
    aten.equal,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.repeat_interleave,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
"""Which wait if an index is a mask."""
NOTES = Path(os.environ["VLMDS_TEST_WAITS"])
found = {"operations": 0, "steps": 0, "waits": {}}


class OnGpu(TorchDispatchMode):
    """Follows tensors by their memory, which it keeps, as another tensor could otherwise get the same."""

    def __init__(self):
        super().__init__()
        self.memory = {}

    def add(self, tensor):
        storage = tensor.untyped_storage()
        self.memory[storage._cdata] = storage
        return tensor

    def has(self, value):
        return isinstance(value, torch.Tensor) and value.untyped_storage()._cdata in self.memory

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs or {}))
        here = any(map(self.has, leaves))
        result = func(*args, **(kwargs or {}))
        if here:
            found["operations"] += 1
            packet = func.overloadpacket
            by_mask = packet in INDEXING and any(
                self.has(leaf) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1])
            )
            if packet in WAITING or by_mask:
                found["waits"].setdefault(str(func), "".join(traceback.format_stack(limit=12)))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.add(leaf)
        return result


reduced_once, features, without_wait = trainer.reduced_once, Model.features, captioner.without_wait
current = None


@contextmanager
def watched(engine):
    global current
    current = OnGpu()
    for tensor in (*engine.module.parameters(), *engine.module.buffers()):
        current.add(tensor)
    with current, reduced_once(engine):
        yield
    found["steps"] += 1
    current = None
    NOTES.write_text(json.dumps(found))


def marked_features(self, batch):
    made = features(self, batch)
    return made if current is None else current.add(made)


def marked(tensor, device):
    sent = without_wait(tensor, device)
    return sent if current is None else current.add(sent.clone())


trainer.reduced_once, Model.features, captioner.without_wait = watched, marked_features, marked

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
