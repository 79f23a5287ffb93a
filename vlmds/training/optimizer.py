"""What the optimizer does when: parameter groups by kind, and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import nn

from vlmds.experiments.schema import StageConfig, TrainingConfig
from vlmds.models.captioner import Captioner

KINDS = {  # kind of trainable parameter: what its name contains; keys of KindFactors, in order
    "projector": "projector.",
    "lora_a": "lora_A",
    "lora_b": "lora_B",
    "magnitude": "lora_magnitude_vector",
}


def parameter_groups(
    captioner: Captioner, stage: StageConfig, training: TrainingConfig
) -> list[dict]:
    """The trainable parameters, one group for each kind there is, always in the same order.

    A group's ``factor`` is what the stage's learning rate is multiplied with. Matrices decay;
    biases, norms and other vectors of the projector do not, as is usual, so the projector has two
    groups when there is weight decay.
    """
    groups = []
    for kind, mark in KINDS.items():
        params = [p for name, p in captioner.named_parameters() if p.requires_grad and mark in name]
        factor = getattr(stage.lr_factors, kind)
        decay = training.weight_decay * getattr(stage.weight_decay_factors, kind)
        parts = [(kind, params, decay)]
        if kind == "projector" and decay:
            parts = [(kind, [p for p in params if p.ndim > 1], decay),
                     (f"{kind}_vectors", [p for p in params if p.ndim <= 1], 0.0)]
        groups += [{"name": name, "params": members, "weight_decay": weight, "factor": factor,
                    "lr": stage.lr * factor} for name, members, weight in parts if members]
    return groups


def freeze(captioner: Captioner, stage: StageConfig) -> None:
    """Make exactly what the stage trains trainable."""
    captioner.projector.requires_grad_("projector" in stage.train)
    for name, parameter in captioner.llm.named_parameters():
        # Parameters of LoRA and DoRA: lora_A, lora_B, lora_magnitude_vector.
        parameter.requires_grad_("peft" in stage.train and "lora_" in name)


def learning_rate(step: int, total: int, stage: StageConfig) -> float:
    """The rate of optimizer step ``step`` (from 0) of ``total``, before the groups' factors.

    Linear warm-up, then ``stage.schedule`` down to ``min_lr_ratio``. A pure function, so a resumed
    run needs no scheduler state.
    """
    warmup = round(stage.warmup_ratio * total)
    if step < warmup:
        return stage.lr * (step + 1) / warmup
    if stage.schedule == "constant":
        return stage.lr
    start = warmup
    if stage.schedule == "wsd":  # warm-up, stable, decay
        start = max(warmup, total - round(stage.decay_ratio * total))
        if step < start:
            return stage.lr
    progress = (step - start) / max(1, total - start)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if stage.schedule == "cosine" else 1 - progress
    return stage.lr * (stage.min_lr_ratio + (1 - stage.min_lr_ratio) * left)


def set_learning_rate(engine, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["factor"]


def seed_micro_batch(seed: int, stage: int, step: int, micro: int, rank: int) -> None:
    """Seed dropout as a function of where we are, so that a resumed run needs no saved RNG."""
    generator = torch.Generator().manual_seed(
        hash((seed, stage, step, micro, rank)) % 2**63  # hash of ints is the same in any process
    )
    torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))


def trainable(module: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
