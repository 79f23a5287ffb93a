"""Measured memory of a training step, part by part, to compare with ``vlmds plan``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vlmds.models.assemble import Model


def resident_parts(model: Model, engine) -> dict[str, int]:
    """Bytes of the tensors that stay from step to step, by the parts of
    :func:`vlmds.planning.memory.stage_memory`. Tensors that share memory count once."""
    llm = dict(model.captioner.llm.named_parameters())
    optimizer = engine.optimizer
    masters = list(optimizer.single_partition_of_fp32_groups)
    moments = [
        value for state in optimizer.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    ]
    projector = model.captioner.projector.parameters()
    adapter = [p for name, p in llm.items() if "lora_" in name]
    return {
        "LLM weights": _bytes(t for name, p in llm.items() if "lora_" not in name for t in (p, *_quantisation(p))),
        "CLIP weights": 0 if model.tower is None else _bytes(model.tower.parameters()),
        "trainables": _bytes([*projector, *adapter]),
        "fp32 copies": _bytes(masters),
        "Adam moments": _bytes(moments),
    }


def _quantisation(parameter: Tensor) -> list[Tensor]:
    """Scales and tables of a weight in NF4; none of another weight."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return []
    nested = state.state2
    return [state.absmax, state.code, state.offset, nested.absmax, nested.code]


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class StepMemory:
    """The most bytes that one step allocates above what was there before, and in which phase.

    On a GPU the allocator's counters give the total, without phases; on a CPU PyTorch's profiler
    records every allocation. Neither includes memory that libraries allocate themselves.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._result: dict = {}

    def start(self) -> None:
        if self.device.type == "cuda":
            self._before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            self._profile.start()

    def stop(self) -> None:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            self._result = {"step_bytes": peak - self._before, "phase_bytes": {}}
            return
        self._profile.stop()
        profiler: Any = self._profile.profiler  # torch types its parts as optional
        roots = profiler.kineto_results.experimental_event_tree()
        phases: dict[str, int] = {}
        _most_by_phase(roots, "between", phases)
        self._result = {"step_bytes": max(phases.values()), "phase_bytes": phases}

    def result(self) -> dict:
        """{"step_bytes", "phase_bytes": by phase}"""
        return self._result


def _most_by_phase(events, phase: str, found: dict[str, int]) -> None:
    """Adds to `found` the most bytes that were allocated during each phase."""
    todo = [(event, phase) for event in events]
    while todo:
        event, phase = todo.pop()
        if event.name.startswith("vlmds "):
            phase = event.name.removeprefix("vlmds ")
        size = getattr(event.extra_fields, "total_allocated", None)
        if size is not None:
            found[phase] = max(found.get(phase, 0), size)
        todo += [(child, phase) for child in event.children]
