"""DeepSpeed JSONs: what is set in them, and what is refused."""

import json

import pytest

from tests.training.launch import ROOT
from vlmds.errors import InputError
from vlmds.training.ds_config import resolve_ds_config

VALUES = {"train_batch_size": 16, "bf16.enabled": True, "zero_optimization.stage": 2}


@pytest.mark.parametrize("name", ["zero2", "zero2_cpu", "zero2_offload"])
def test_auto_takes_the_experiments_values(name):
    config = resolve_ds_config(ROOT / "ds_configs" / f"{name}.json", VALUES)
    assert config["train_batch_size"] == 16 and config["bf16"]["enabled"] is True


@pytest.mark.parametrize(
    "content, message",
    [
        ({"train_batch_size": 32}, "train_batch_size is 32, but the experiment needs 16"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3, but the experiment needs 2"),
        ({"bf16": {"enabled": False}}, "bf16.enabled is False, but the experiment needs True"),
        ({"optimizer": {"type": "Adam"}}, r'optimizer is {"type": "Adam"}, but the experiment sets it by'),
        ({"scheduler": {"type": "WarmupLR"}}, "stages.*.schedule"),
        ({"fp16": {"enabled": True}}, "llm.dtype"),
        ({"scheduler": "cosine"}, "stages.*.schedule"),
        ({"bf16": True}, "bf16 is true, not an object"),
        ({"zero_optimization": None}, "zero_optimization is null, not an object"),
        ([1], "not a JSON object"),
    ],
)
def test_what_contradicts_the_experiment_is_refused_with_both(tmp_path, content, message):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        resolve_ds_config(path, VALUES)
    assert message in str(error.value) and "ds.json" in str(error.value)


def test_switched_off_is_as_good_as_absent(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"fp16": {"enabled": False}}))
    assert resolve_ds_config(path, VALUES)["train_batch_size"] == 16
