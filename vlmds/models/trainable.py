"""The parameters that a stage trains, and their groups in the optimizer."""

from __future__ import annotations

from torch import nn

from vlmds.experiments.schema import StageConfig, TrainingConfig
from vlmds.models.captioner import Captioner

KINDS = {  # kind of trainable parameter: what its name contains; keys of KindFactors, in order
    "projector": "projector.",
    "lora_a": "lora_A",
    "lora_b": "lora_B",
    "magnitude": "lora_magnitude_vector",
}


def parameter_groups(model: nn.Module, stage: StageConfig, training: TrainingConfig) -> list[dict]:
    """The trainable parameters of a captioner, one group for each kind there is, always in the same
    order.

    A group's ``factor`` multiplies the stage's learning rate. Weight decay applies to matrices and, as
    is usual, not to biases, norms and other vectors of the projector, which then has two groups.
    """
    groups = []
    for kind, mark in KINDS.items():
        params = [p for name, p in model.named_parameters() if p.requires_grad and mark in name]
        factor = getattr(stage.lr_factors, kind)
        decay = training.weight_decay * getattr(stage.weight_decay_factors, kind)
        parts = [(kind, params, decay)]
        if kind == "projector" and decay:
            parts = [
                (kind, [p for p in params if p.ndim > 1], decay),
                (f"{kind}_vectors", [p for p in params if p.ndim <= 1], 0.0),
            ]
        groups += [
            {"name": name, "params": members, "weight_decay": weight, "factor": factor, "lr": stage.lr * factor}
            for name, members, weight in parts
            if members
        ]
    return groups


def freeze(captioner: Captioner, stage: StageConfig) -> None:
    """Make exactly what the stage trains trainable."""
    captioner.projector.requires_grad_("projector" in stage.train)
    for name, parameter in captioner.llm.named_parameters():
        # Parameters of LoRA and DoRA: lora_A, lora_B, lora_magnitude_vector.
        parameter.requires_grad_("peft" in stage.train and "lora_" in name)


def trainable(module: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
