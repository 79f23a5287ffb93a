"""The writing of checkpoints in the background of the training.

``begin`` copies this rank's partitions to host memory and returns; a thread writes them. No rank waits
for another: every step begins with a sum over ranks, in which one number says how many ranks have
written. When all have, a thread of rank 0 gives the checkpoint its name.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from vlmds.console.progress import phase
from vlmds.distributed.ranks import gather
from vlmds.training import checkpoint
from vlmds.training.ema import WeightAverage
from vlmds.training.engine import Engine


class Saver:
    """One stage's checkpoints on this rank. All ranks call ``begin``, ``publish`` and ``drain``
    alike.

    Args:
        root: the run's folder for checkpoints, on a file system that all ranks share.
        keep: newest checkpoints that stay, besides the best.
        say: called with a line about a checkpoint that could not be written; training goes on, and the
            earlier checkpoints stay.
    """

    def __init__(self, root: Path, stage: str, keep: int, say: Callable[[str], None]):
        self.root, self.stage, self.keep, self._say = root, stage, keep, say
        self.rank = dist.get_rank()
        self._writer: threading.Thread | None = None
        self._publisher: threading.Thread | None = None  # on rank 0
        self._buffers: dict[str, Tensor] = {}
        self._entry: dict | None = None
        self._problem: str | None = None
        self._unsaved: str | None = None  # on rank 0: why the last one has no name

    def begin(self, engine: Engine, average: WeightAverage | None, step: int, state: dict) -> None:
        """Start to write the checkpoint of optimizer step ``step``; ``state`` is JSON values, the
        same on every rank."""
        self._settle()
        self._folder = self.root / checkpoint.checkpoint_name(self.stage, step)
        self._state = {**state, "optimizer_steps": checkpoint.optimizer_steps(engine)}
        tensors = self._copy(checkpoint.fragments_to_save(engine, average))
        self._entry = self._problem = None
        self._writer = threading.Thread(target=self._write, args=(tensors,), daemon=True)
        self._writer.start()

    @property
    def finished(self) -> bool:
        """Whether this rank has written (or failed to) what is not published yet."""
        return self._writer is not None and not self._writer.is_alive()

    @phase("writing the checkpoint")
    def drain(self) -> str | None:
        """Wait for the checkpoint that is being written, if any. Afterwards it has its name, or
        the reason was reported, and is returned on every rank."""
        self._settle()
        # Also a barrier: the first rank to leave may take the others with it.
        return gather(self._unsaved)[0]

    def _settle(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self.publish()
        if self._publisher is not None:
            self._publisher.join()
            self._publisher = None

    def publish(self) -> None:
        """Once ``finished`` on all ranks: make the files a checkpoint, or report why not. Rank 0 does
        it in a thread, because a file system may take long for it."""
        self._writer = None
        results = gather((self._entry, self._problem))
        if self.rank == 0:
            self._publisher = threading.Thread(
                target=self._publish, args=(self._folder, self._state, results), daemon=True
            )
            self._publisher.start()

    def _publish(self, folder: Path, state: dict, results: list[tuple]) -> None:
        problem = next((p for _, p in results if p is not None), None)
        temporary = checkpoint.temporary_name(folder)
        self._unsaved = None
        try:
            if problem is None:
                checkpoint.publish(temporary, folder, state, [entry for entry, _ in results])
        except Exception as error:  # any: it must be reported
            problem = str(error)
        if problem is not None:
            self._unsaved = f"{folder.name} not saved: {problem}"
            shutil.rmtree(temporary, ignore_errors=True)
            self._say(f"WARNING: {self._unsaved}; training goes on, the earlier checkpoints stand")
            return
        try:
            checkpoint.prune(self.root, self.stage, self.keep)
        except Exception as error:
            self._say(f"WARNING: old checkpoints of {self.root} cannot be removed: {error}")

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """To the host: into pinned memory from a GPU, which is kept for the next time."""
        if not any(tensor.is_cuda for tensor in tensors.values()):
            return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            if name not in self._buffers:
                self._buffers[name] = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._buffers[name].copy_(tensor, non_blocking=True)
        torch.cuda.synchronize()
        return self._buffers

    def _write(self, tensors: dict[str, Tensor]) -> None:
        temporary = checkpoint.temporary_name(self._folder)
        try:
            self._entry = checkpoint.write_part(temporary, self.rank, tensors)
        except Exception as error:  # any: all ranks must learn that there is no file
            self._problem = f"{temporary.parent}: {error}"
