"""DoRA against PEFT's own forward pass, and its norms, which must never be out of date."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.variants import DoraLinearVariant
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests import tiny
from vlmds.experiments.reading import load_experiment
from vlmds.experiments.schema import LanguageConfig
from vlmds.models import dora
from vlmds.models.dora import Dora, norms_kept, weights_changed
from vlmds.models.language import add_adapter, load_language_model

PEFT = load_experiment("e2", ["peft.dropout=0", "peft.r=4"]).peft


def llm(bias=False, dtype=torch.float32):
    torch.manual_seed(0)
    return (
        Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=100,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
                attention_bias=bias,
            )
        )
        .to(dtype)
        .requires_grad_(False)
    )


def moved(model):
    """With an adapter that is not where it began."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def loss_and_gradients(model):
    torch.manual_seed(2)
    ids = torch.randint(0, 100, (2, 12))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.fixture
def computed(monkeypatch):
    """How often a norm was computed."""
    calls = []
    compute = dora._compute_norm
    monkeypatch.setattr(dora, "_compute_norm", lambda *args: calls.append(1) or compute(*args))
    return calls


@pytest.mark.parametrize("bias", [False, True])
def test_without_dropout_it_is_pefts_dora(bias):
    ours = moved(add_adapter(llm(bias), PEFT))
    theirs = moved(
        get_peft_model(
            llm(bias),
            LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, use_dora=True, target_modules=PEFT.target_modules),
        )
    )
    assert {type(m.lora_variant["default"]) for m in ours.modules() if hasattr(m, "lora_variant")} == {Dora}
    for a, b in zip(loss_and_gradients(ours), loss_and_gradients(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_on_4bit_weights_it_is_pefts_dora(tmp_path):
    folder = tiny.make_models(tmp_path)
    config = LanguageConfig(model=str(folder / "qwen3"), load_in_4bit=True, dtype="float32")
    model = moved(add_adapter(load_language_model(config, torch.device("cpu")), PEFT))
    ours = loss_and_gradients(model)
    for module in model.modules():
        if hasattr(module, "lora_variant"):
            module.lora_variant["default"] = DoraLinearVariant()
    for a, b in zip(ours, loss_and_gradients(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_start_it_changes_nothing(dtype):
    ids = torch.arange(10)[None]
    plain = llm(dtype=dtype)(input_ids=ids).logits
    assert torch.equal(add_adapter(llm(dtype=dtype), PEFT)(input_ids=ids).logits, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_norms_change_no_bit(dtype, computed):
    model = moved(add_adapter(llm(dtype=dtype), PEFT))
    model.activation_checkpointing_enable({"use_reentrant": False})
    expected = loss_and_gradients(model)
    assert len(computed) == 2 * 14  # in each of two layers seven times, and again at recomputation
    with norms_kept():
        for _ in range(3):
            for a, b in zip(loss_and_gradients(model), expected, strict=True):
                assert torch.equal(a, b)
    assert len(computed) == 3 * 14


def test_a_norm_never_outlives_its_weights(computed):
    model = add_adapter(llm(), PEFT)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.register_step_post_hook(lambda *_: weights_changed())

    def fresh():
        """How many norms the loss takes; it must be the loss that new norms give."""
        before = len(computed)
        loss = loss_and_gradients(model)[0]
        used = len(computed) - before
        layers = [m for m in model.modules() if hasattr(m, "lora_variant")]
        variants = [layer.lora_variant["default"] for layer in layers]
        for layer in layers:
            layer.lora_variant["default"] = Dora()
        assert torch.equal(loss_and_gradients(model)[0], loss)
        for layer, variant in zip(layers, variants, strict=True):
            layer.lora_variant["default"] = variant
        return used

    with norms_kept():
        assert fresh() == 14 and fresh() == 0
        optimizer.step()
        assert fresh() == 14
        with norms_kept():  # nested: the same norms
            assert fresh() == 0
            optimizer.step()
            assert fresh() == 14
        assert fresh() == 0
    moved(model)
    assert fresh() == 14 and fresh() == 14
    with norms_kept():
        assert fresh() == 14
    moved(model)
    with norms_kept():
        assert fresh() == 14
    with pytest.raises(RuntimeError), norms_kept():
        raise RuntimeError
    assert fresh() == 14 and fresh() == 14


def test_dropout_is_on_the_adapters_branch_only():
    """With an adapter of zero, dropout changes nothing, whatever the magnitude."""
    model = add_adapter(llm(), load_experiment("e2", ["peft.dropout=0.5"]).peft).train()
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1.5)
    first, second = (loss_and_gradients(model)[0] for _ in range(2))
    assert torch.equal(first, second)
