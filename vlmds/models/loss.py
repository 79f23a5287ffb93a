"""Cross-entropy over a large vocabulary, without the logits of all tokens at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

TOKENS = 128
"""Tokens whose logits are in memory at once: in fp32, 78 MB with Qwen3's vocabulary."""


def token_losses(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Cross-entropy of each token, in nats.

    Args:
        hidden: inputs of the output layer [K, D].
        head: the frozen output layer, without a bias; weight [V, D].
        targets: int64 [K].

    Returns:
        fp32 [K]. Its gradient reaches `hidden` alone.
    """
    return _TokenLosses.apply(hidden, head.weight, targets)


def can_split(head: nn.Module, model_type: str) -> bool:
    """Whether :func:`token_losses` gives this output layer's loss: a plain frozen Linear, of a model
    that uses its product as logits (others scale or cap it)."""
    return (
        model_type in ("qwen3", "qwen2", "llama")
        and type(head) is nn.Linear
        and head.bias is None
        and not head.weight.requires_grad
    )


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy that computes the gradient of `hidden` in the forward pass, which is possible as the
    weight is frozen: some tokens at a time, without keeping logits or their log-softmax (as Liger
    Kernel's fused linear cross-entropy does, arXiv:2410.10989)."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for begin in range(0, len(hidden), TOKENS):
            part = slice(begin, begin + TOKENS)
            logits = (hidden[part] @ weight.T).float()  # [T, V]
            target = targets[part, None]
            logits -= logits.amax(1, keepdim=True)
            scores = logits.gather(1, target)
            sums = logits.exp_().sum(1, keepdim=True)
            losses[part] = (sums.log() - scores).squeeze(1)
            if gradient is not None:
                logits /= sums  # the softmax
                logits.scatter_add_(1, target, torch.full_like(scores, -1.0))
                gradient[part] = logits.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx, of_losses: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * of_losses[:, None]).to(gradient.dtype), None, None
