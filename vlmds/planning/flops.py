"""Floating-point operations of a training step, from shapes alone. A multiply-add is two.

A frozen weight needs its forward product and the gradient of its input: about 4N operations a
position instead of the 6N of full training. A trained one also needs its own gradient. Counted are
the matrix products: CLIP (forward only), projector, LLM, adapter, causal attention (half of the
square) and logits where a caption token follows. Norms, activations, embeddings and softmax are not
counted. Recomputation by activation checkpointing is a field of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vlmds.models.assemble import MetaModels


@dataclass(frozen=True)
class StepFlops:
    """Operations of one sample. clip: forward. projector, llm, head: forward and backward. recomputed:
    the forward pass of the LLM's layers, which full activation checkpointing repeats."""

    clip: float
    projector: float
    llm: float
    head: float
    recomputed: float

    @property
    def total(self) -> float:
        """All of them, without recomputation."""
        return self.clip + self.projector + self.llm + self.head


def sample_flops(model: MetaModels, positions: float, supervised: float, *, stored_features: bool = False) -> StepFlops:
    """Operations of one sample in a step.

    Args:
        model: on the meta device, frozen as in the stage.
        positions: of the LLM's input. supervised: positions that predict a caption token.
        stored_features: the data has CLIP's features.
    """
    llm = model.captioner.llm
    config: Any = llm.config
    frozen = trained = 0
    for name, module in llm.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            if "lora_" not in name:
                frozen += module.weight.numel()
            elif module.weight.requires_grad:
                trained += module.weight.numel()
    square = 4 * config.num_attention_heads * config.head_dim * positions**2 / 2  # QK and AV
    forward = 2 * (frozen + trained) * positions + config.num_hidden_layers * square
    backward = (2 * frozen + 4 * trained) * positions + 2 * config.num_hidden_layers * square
    head = 2 * config.hidden_size * config.vocab_size * supervised
    return StepFlops(
        clip=0.0 if stored_features else clip_flops(model),
        projector=projector_flops(model),
        llm=forward + backward,
        head=2 * head,
        recomputed=forward,
    )


def clip_flops(model: MetaModels) -> float:
    """Operations of the forward pass of all frames of a sample."""
    config: Any = model.tower.config
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    width, wide = config.hidden_size, config.intermediate_size
    layer = 2 * tokens * (4 * width**2 + 2 * width * wide) + 4 * tokens**2 * width
    patches = 2 * (tokens - 1) * 3 * config.patch_size**2 * width
    return model.captioner.projector.num_frames * (config.num_hidden_layers * layer + patches)


def projector_flops(model: MetaModels) -> float:
    """Forward and, where it is trained, both gradients: three times the forward pass, counted by a
    run on the meta device. CLIP's features need no gradient; that is not subtracted."""
    projector = model.captioner.projector
    dtype = next(projector.parameters()).dtype
    features = torch.empty(
        1, projector.num_frames * projector.patches, projector.vision_dim, dtype=dtype, device="meta"
    )
    with FlopCounterMode(display=False) as counter:
        projector(features)
    trains = any(p.requires_grad for p in projector.parameters())
    return counter.get_total_flops() * (3 if trains else 1)
