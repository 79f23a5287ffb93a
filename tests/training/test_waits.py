"""Waits of the host for a GPU: none between the start of a step and its end."""

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.training.launch import arguments, train

SCRIPT = Path(__file__).with_name("waits.py")


@pytest.mark.distributed
@pytest.mark.parametrize(
    "exp, more",
    [
        ("e3", ["training.micro_batch=1"]),
        ("e8", [*tiny.RESAMPLER, "llm.dtype=bfloat16", "peft.dropout=0.1", "training.activation_checkpointing=2"]),
    ],
)
def test_nothing_in_the_micro_batches_waits_for_the_gpu(models, shards, tmp_path, exp, more):
    notes = tmp_path / "waits.json"
    train(
        0,
        *arguments(models, shards, tmp_path / "run", *more, "stages.0.steps=2", "stages.1.steps=2", exp=exp),
        script=SCRIPT,
        VLMDS_TEST_WAITS=str(notes),
    )
    found = json.loads(notes.read_text())
    assert found["steps"] == 4 and found["operations"] > 1000, found
    assert not found["waits"], "\n".join(f"{name}:\n{where}" for name, where in found["waits"].items())
