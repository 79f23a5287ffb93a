"""DoRA (arXiv:2402.09353) at the cost of LoRA: PEFT's parameters and values, with less work.

A DoRA layer gives ``m / ||W + s·BA|| * (W x + s·BA x)``, row by row of W. PEFT 0.21 computes the
norm in every forward pass, recomputation included, for which it unpacks W and makes BA as large as
W. The norm carries no gradient (section 4.3 of the paper) and depends on weights alone, so inside
:func:`norms_kept` each layer computes it once, by PEFT's own formula: the values are the same, bit
for bit.

Dropout acts on the adapter's branch ``BA x`` alone, as it does in LoRA. PEFT also drops from the
input of ``(m / norm - 1) * W x``, which takes a second full product with W and its gradient. Both
forms have the same expectation, are the same without dropout, and at inference; here LoRA and DoRA
differ in the magnitude only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

_weights: object | None = None
"""Stands for the current weights while changes of them are announced. Global, because PEFT calls the
layers and the optimizer its hook without an argument that could carry it."""


@contextmanager
def norms_kept() -> Iterator[None]:
    """Context in which DoRA layers keep their weight norms. Inside, weights may change only through
    an optimizer that calls :func:`weights_changed`. Also a decorator; may be nested."""
    global _weights
    before = _weights
    _weights = before or object()
    try:
        yield
    finally:
        _weights = before and _weights


def weights_changed() -> None:
    """Discard all norms: the weights have changed."""
    global _weights
    _weights = _weights and object()


class Dora(DoraLinearVariant):
    """What PEFT asks for a DoRA layer's output, in place of its own variant; one for each layer."""

    def __init__(self) -> None:
        self._norm: tuple[object, Tensor] | None = None  # of which weights; [out]

    def forward(  # type: ignore[override]  # PEFT has a static method, which it calls on an instance
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """x [..., in], result = W x + bias [..., out] -> the layer's output [..., out]. module: the
        LoraLayer, whose parts have no types."""
        lora = module.lora_B[active_adapter](module.lora_A[active_adapter](module.lora_dropout[active_adapter](x)))
        magnitude = module.lora_magnitude_vector[active_adapter].weight
        scale = magnitude / self._weight_norm(module, active_adapter, x.dtype)
        bias = module.get_base_layer().bias
        if bias is None:
            return scale * torch.add(result, lora, alpha=module.scaling[active_adapter])
        return scale * torch.add(result - bias, lora, alpha=module.scaling[active_adapter]) + bias

    def _weight_norm(self, module: Any, adapter: str, dtype: torch.dtype) -> Tensor:
        if _weights is not None and self._norm is not None and self._norm[0] is _weights:
            return self._norm[1]
        norm = _compute_norm(module, adapter, dtype)
        self._norm = (_weights, norm) if _weights is not None else None
        return norm


@torch.no_grad()
def _compute_norm(module: Any, adapter: str, dtype: torch.dtype) -> Tensor:
    """||W + s·BA|| of each row, [out], as PEFT computes it."""
    dora = module.lora_magnitude_vector[adapter]
    product = dora.get_lora_weight(module.lora_A[adapter], module.lora_B[adapter])
    weight = dequantize_module_weight(module.get_base_layer())
    return dora.get_weight_norm(weight.to(dtype), product.to(dtype), module.scaling[adapter])


def use_dora(model: nn.Module) -> None:
    """Let every DoRA layer of a PEFT model compute as :class:`Dora` does."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for adapter, variant in module.lora_variant.items():
                if type(variant) is DoraLinearVariant:
                    module.lora_variant[adapter] = Dora()
