"""Activation checkpointing: the layers of the LLM that recompute their activations in the backward pass."""

from __future__ import annotations

import torch
import torch.distributed as dist

from vlmds.distributed.ranks import gather, rank_and_world
from vlmds.experiments.schema import Experiment, StageConfig
from vlmds.models.assemble import meta_models
from vlmds.models.captioner import Captioner
from vlmds.models.trainable import freeze
from vlmds.planning.memory import LATER_BYTES, outside_bytes, recompute_interval, stage_memories


def checkpointed_layers(experiment: Experiment, stage: StageConfig, stored_features: bool, device: torch.device) -> int:
    """Interval of recomputed layers: 0 for none, n for every n-th. ``auto`` recomputes as few layers as
    :mod:`vlmds.planning.memory` predicts to fit ``device``: none on a CPU, and every one where even that
    is not predicted to fit. The rank with the least memory decides for all; all ranks call it alike.

    Args:
        stored_features: the data contains CLIP's features, so no tower is loaded.
    """
    setting = experiment.training.activation_checkpointing
    if setting != "auto":
        return int(setting)
    if device.type != "cuda":
        return 0
    free = min(gather(free_bytes(device))) - LATER_BYTES
    return _fewest(experiment, stage, stored_features, free, rank_and_world()[1])


def free_bytes(device: torch.device) -> int:
    """Bytes of a GPU's memory that PyTorch may use, those that it uses already included. Measured
    after a collective, because NCCL makes its communicators in the first one; all ranks call it alike."""
    start_communicators(device)
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def start_communicators(device: torch.device) -> None:
    """Wait for a small collective; nothing in a process without other ranks."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1, device=device))
        torch.cuda.synchronize(device)


def fewest_that_fits(
    experiment: Experiment, stage: StageConfig, stored_features: bool, capacity: float, world_size: int
) -> int:
    """The interval that ``auto`` is expected to choose on GPUs with ``capacity`` bytes."""
    return _fewest(experiment, stage, stored_features, capacity - outside_bytes(world_size), world_size)


def _fewest(experiment: Experiment, stage: StageConfig, stored_features: bool, free: float, world_size: int) -> int:
    model = meta_models(experiment)
    freeze(model.captioner, stage)
    memories = stage_memories(experiment, stage, model.captioner, None if stored_features else model.tower, world_size)
    every = recompute_interval(memories, free)
    return 1 if every is None else every


def checkpoint_activations(captioner: Captioner, every: int) -> None:
    """Recompute the activations of every ``every``-th layer from now on; 0: of none."""
    if every:
        captioner.llm.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
    else:
        captioner.llm.activation_checkpointing_disable()
