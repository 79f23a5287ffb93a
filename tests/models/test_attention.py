"""Which attention is taken where. The kernels of FlashAttention themselves need a GPU."""

import pytest
import torch

from tests import tiny
from vlmds.config import load_experiment
from vlmds.errors import InputError
from vlmds.models.attention import attention_for, choose_attention, installed_flash
from vlmds.models.language import load_language_model

BOTH = {"flash_attention_2", "flash_attention_3"}
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype, major, installed, taken", [
    ("bfloat16", 9, BOTH, "flash_attention_3"),
    ("bfloat16", 9, {"flash_attention_2"}, "flash_attention_2"),
    ("bfloat16", 8, BOTH, "flash_attention_2"),  # version 3 is for Hopper
    ("bfloat16", 10, BOTH, "flash_attention_2"),
    ("bfloat16", 8, {"flash_attention_3"}, "sdpa"),
    ("bfloat16", 7, BOTH, "sdpa"),
    ("bfloat16", 9, set(), "sdpa"),
    ("float32", 9, BOTH, "sdpa"),
    ("bfloat16", None, BOTH, "sdpa"),
])
def test_auto_takes_the_newest_that_can_run(dtype, major, installed, taken):
    assert choose_attention("auto", dtype, major, installed) == taken
    assert choose_attention("sdpa", dtype, major, installed) == "sdpa"
    if taken != "sdpa":
        assert choose_attention(taken, dtype, major, installed) == taken


@pytest.mark.parametrize("wanted, dtype, major, installed, told", [
    ("flash_attention_2", "bfloat16", 9, {"flash_attention_3"}, "pip install flash-attn, or set"),
    ("flash_attention_3", "bfloat16", 9, {"flash_attention_2"}, "pip install flash-attn-3, or set"),
    ("flash_attention_3", "bfloat16", 8, BOTH, "not made for cards of compute capability 8.x"),
    ("flash_attention_2", "float32", 9, BOTH, "set llm.dtype to bfloat16"),
    ("flash_attention_2", "bfloat16", None, BOTH, "needs a GPU"),
])
def test_one_named_that_cannot_run_is_refused_with_the_mend(wanted, dtype, major, installed, told):
    with pytest.raises(InputError) as error:
        choose_attention(wanted, dtype, major, installed)
    assert str(error.value).startswith(f"llm.attention: {wanted} ") and told in str(error.value)
    assert str(error.value).endswith("or set llm.attention to auto")


def test_on_this_machine(tmp_path):
    """What transformers reports, and what a model loaded here then has."""
    models = tiny.make_models(tmp_path)
    experiment = load_experiment("e3", [*tiny.settings(models), "llm.dtype=bfloat16"])
    assert installed_flash() <= BOTH
    assert attention_for(experiment.llm, CPU) == "sdpa"
    assert load_language_model(experiment.llm, CPU).config._attn_implementation == "sdpa"
    named = experiment.llm.model_copy(update={"attention": "flash_attention_2"})
    with pytest.raises(InputError, match="llm.attention: flash_attention_2 needs a GPU"):
        load_language_model(named, CPU)
