"""PEFT and bitsandbytes: the parts of a LoRA layer that vlmds replaces or reads."""

import inspect

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from vlmds.models.dora import Dora


def adapted(dora: bool):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 6, bias=False)).requires_grad_(False)
    config = LoraConfig(r=2, lora_alpha=4, use_dora=dora, target_modules=["0"])
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(1.0)
    (layer,) = (module for module in model.modules() if isinstance(module, LoraLayer))
    return model, layer


def test_a_layer_has_its_adapter_under_these_names():
    """models/dora.py; and "lora_" in the names of an adapter's parameters (planning, flops, trainable)."""
    model, layer = adapted(dora=True)
    assert layer.scaling["default"] == 2.0 and layer.lora_dropout["default"](torch.ones(1)) == 1
    assert layer.lora_A["default"].weight.shape == (2, 8) and layer.lora_B["default"].weight.shape == (6, 2)
    assert layer.lora_magnitude_vector["default"].weight.shape == (6,)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 3 and all("lora_" in name for name in trained)


def test_a_doras_norm_is_made_of_these_two_methods():
    """models/dora._compute_norm: get_lora_weight gives BA, get_weight_norm the norm of each row of W + s·BA."""
    _, layer = adapted(dora=True)
    dora, (a, b) = layer.lora_magnitude_vector["default"], (layer.lora_A["default"], layer.lora_B["default"])
    product, weight = dora.get_lora_weight(a, b), dequantize_module_weight(layer.get_base_layer())
    torch.testing.assert_close(product, b.weight @ a.weight)
    assert torch.equal(weight, layer.get_base_layer().weight)
    norm = dora.get_weight_norm(weight, product, layer.scaling["default"])
    torch.testing.assert_close(norm, (weight + 2.0 * product).norm(dim=1))


def test_a_layers_variant_computes_its_output():
    """models/dora.use_dora puts Dora into lora_variant; bench/baselines.py puts PEFT's own back."""
    _, layer = adapted(dora=True)
    assert type(layer.lora_variant["default"]) is DoraLinearVariant
    theirs, ours = (list(inspect.signature(of.forward).parameters) for of in (DoraLinearVariant, Dora))
    assert theirs == ours[1:]  # a static method there
    x = torch.randn(3, 8)
    expected = layer(x)
    layer.lora_variant["default"] = Dora()
    torch.testing.assert_close(layer(x), expected)

    class Marked(Dora):
        def forward(self, *args, **kwargs):
            return torch.zeros(())

    layer.lora_variant["default"] = Marked()
    assert layer(x).shape == ()


@pytest.mark.parametrize("dora", [False, True])
def test_a_merge_refuses_what_is_not_finite(dora):
    """export/merge.merge_adapter: ValueError of merge(safe_merge=True), base_model.unload()."""
    model, layer = adapted(dora)
    x = torch.randn(3, 8)
    expected = model(x)
    layer.merge(safe_merge=True)
    plain = model.base_model.unload()
    assert type(plain[0]) is nn.Linear
    torch.testing.assert_close(plain(x), expected)
    _, layer = adapted(dora)
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError):
        layer.merge(safe_merge=True)


def test_an_adapter_that_is_enabled_again_is_trainable():
    """planning/memory.layer_activations puts the flags back after disable_adapter()."""
    model, _ = adapted(dora=False)
    model.requires_grad_(False)
    with model.disable_adapter():
        pass
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_4bit_weights_stay_packed_where_this_is_off():
    """models/language._keep_4bit_weights_packed: Linear4bit.support_avx512bf16_for_cpu, read in forward."""
    layer = Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    assert "support_avx512bf16_for_cpu" in vars(layer)
    assert "self.support_avx512bf16_for_cpu" in inspect.getsource(Linear4bit.forward)


def test_4bit_weights_take_the_bytes_that_the_plan_counts():
    """planning/memory.llm_bytes: half a byte a weight, a byte for 64 of them, four for 256 of those."""
    layer = Linear4bit(256, 256, bias=False, quant_type="nf4", compress_statistics=True).to("cpu")
    state = layer.weight.quant_state
    assert layer.weight.nbytes == 256 * 256 // 2 and state.absmax.nbytes == 256 * 256 // 64
    assert state.state2.absmax.nbytes == 4 * 256 * 256 // 64 // 256
