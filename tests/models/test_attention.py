"""The choice of the attention implementation. The kernels of FlashAttention need a GPU."""

from types import SimpleNamespace

import pytest
import torch

from tests import tiny
from vlmds.errors import InputError
from vlmds.experiments.reading import load_experiment
from vlmds.models.attention import attention_for, choose_attention, installed_flash
from vlmds.models.language import load_language_model

BOTH = {"flash_attention_2", "flash_attention_3"}
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "dtype, major, installed, taken",
    [
        ("bfloat16", 9, BOTH, "flash_attention_3"),
        ("bfloat16", 9, {"flash_attention_2"}, "flash_attention_2"),
        ("bfloat16", 8, BOTH, "flash_attention_2"),  # version 3 is for Hopper
        ("bfloat16", 10, BOTH, "flash_attention_2"),
        ("bfloat16", 8, {"flash_attention_3"}, "sdpa"),
        ("bfloat16", 7, BOTH, "sdpa"),
        ("bfloat16", 9, set(), "sdpa"),
        ("float32", 9, BOTH, "sdpa"),
        ("bfloat16", None, BOTH, "sdpa"),
    ],
)
def test_auto_takes_the_newest_that_can_run(dtype, major, installed, taken):
    for micro_batch in (2, None):
        assert choose_attention("auto", dtype, micro_batch, major, installed) == (taken, "")
        assert choose_attention("sdpa", dtype, micro_batch, major, installed) == ("sdpa", "")
        if taken != "sdpa":
            assert choose_attention(taken, dtype, micro_batch, major, installed) == (taken, "")


def test_a_micro_batch_of_one_takes_sdpa_and_says_why():
    """FlashAttention would wait for the GPU in every layer; asked for by name, it stays."""
    taken, remark = choose_attention("auto", "bfloat16", 1, 9, BOTH)
    assert taken == "sdpa"
    assert "flash_attention_3 waits for the GPU in every layer" in remark
    assert choose_attention("auto", "bfloat16", 1, 9, set()) == ("sdpa", "")
    assert choose_attention("sdpa", "bfloat16", 1, 9, BOTH) == ("sdpa", "")
    taken, remark = choose_attention("flash_attention_2", "bfloat16", 1, 9, BOTH)
    assert taken == "flash_attention_2"
    assert remark.startswith("WARNING: ") and "set llm.attention to auto" in remark


def test_transformers_reads_the_positions_of_a_batch_of_one_only():
    """What that choice rests on."""
    from transformers.modeling_flash_attention_utils import _is_packed_sequence

    positions = torch.arange(8, device="meta")[None]
    assert _is_packed_sequence(positions, batch_size=2) is False
    with pytest.raises(RuntimeError):  # of a meta tensor no value can be read
        bool(_is_packed_sequence(positions, batch_size=1))


def test_the_start_says_which_attention_and_why(capsys):
    from vlmds.training.main import note_attention

    noted = {}
    run = SimpleNamespace(note=noted.update)
    note_attention(run, "sdpa", "")
    note_attention(run, "sdpa", "flash_attention_2 waits")
    assert capsys.readouterr().out.splitlines() == [
        "vlmds: attention: sdpa",
        "vlmds: attention: sdpa (flash_attention_2 waits)",
    ]
    note_attention(run, "flash_attention_2", "WARNING: flash_attention_2 waits")
    assert capsys.readouterr().out.splitlines() == [
        "vlmds: attention: flash_attention_2",
        "vlmds: WARNING: flash_attention_2 waits",
    ]
    note_attention(run, "sdpa", "")
    assert noted == {"attention": "sdpa"}


@pytest.mark.parametrize(
    "wanted, dtype, major, installed, message",
    [
        ("flash_attention_2", "bfloat16", 9, {"flash_attention_3"}, "pip install flash-attn, or set"),
        ("flash_attention_3", "bfloat16", 9, {"flash_attention_2"}, "pip install flash-attn-3, or set"),
        ("flash_attention_3", "bfloat16", 8, BOTH, "not made for cards of compute capability 8.x"),
        ("flash_attention_2", "float32", 9, BOTH, "set llm.dtype to bfloat16"),
        ("flash_attention_2", "bfloat16", None, BOTH, "needs a GPU"),
    ],
)
def test_one_named_that_cannot_run_is_refused_with_the_fix(wanted, dtype, major, installed, message):
    with pytest.raises(InputError) as error:
        choose_attention(wanted, dtype, 2, major, installed)
    assert str(error.value).startswith(f"llm.attention: {wanted} ") and message in str(error.value)
    assert str(error.value).endswith("or set llm.attention to auto")


def test_on_this_machine(tmp_path):
    """What transformers reports, and what a model loaded here then has."""
    models = tiny.make_models(tmp_path)
    experiment = load_experiment("e3", [*tiny.settings(models), "llm.dtype=bfloat16"])
    assert installed_flash() <= BOTH
    assert attention_for(experiment.llm, 1, CPU) == ("sdpa", "")
    assert load_language_model(experiment.llm, CPU).config._attn_implementation == "sdpa"
    named = experiment.llm.model_copy(update={"attention": "flash_attention_2"})
    with pytest.raises(InputError, match="llm.attention: flash_attention_2 needs a GPU"):
        load_language_model(named, CPU)
