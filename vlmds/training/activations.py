"""Activation checkpointing: which layers of the LLM keep their activations for the backward pass,
and which compute them again."""

from __future__ import annotations

import torch

from vlmds.config import Experiment, StageConfig
from vlmds.memory import fewest_recomputed, stage_memories
from vlmds.models.assemble import shapes
from vlmds.models.captioner import Captioner
from vlmds.training.optimizer import freeze
from vlmds.training.ranks import place


def checkpointed_layers(
    experiment: Experiment, stage: StageConfig, stored_features: bool, device: torch.device
) -> int:
    """0 for no layer, n for every n-th. ``auto`` recomputes no more than the memory of ``device``
    asks for, as :mod:`vlmds.memory` predicts; nothing on a CPU, and every layer where even that is
    not predicted to fit.

    Args:
        stored_features: the data holds CLIP's features, so no tower is loaded.
    """
    setting = experiment.training.activation_checkpointing
    if setting != "auto":
        return int(setting)
    if device.type != "cuda":
        return 0
    capacity = torch.cuda.get_device_properties(device).total_memory
    return fewest_that_fits(experiment, stage, stored_features, capacity, place()[1])


def fewest_that_fits(experiment: Experiment, stage: StageConfig, stored_features: bool,
                     capacity: float, world_size: int) -> int:
    """What ``auto`` is on a GPU with ``capacity`` bytes."""
    model = shapes(experiment)
    freeze(model.captioner, stage)
    memories = stage_memories(experiment, stage, model.captioner,
                              None if stored_features else model.tower, world_size)
    every = fewest_recomputed(memories, capacity)
    return 1 if every is None else every


def checkpoint_activations(captioner: Captioner, every: int) -> None:
    """Recompute every n-th layer's activations from now on; 0: of none."""
    if every:
        captioner.llm.activation_checkpointing_enable(
            {"use_reentrant": False}, every_n_layers=every)
    else:
        captioner.llm.activation_checkpointing_disable()
