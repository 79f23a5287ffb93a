"""The engine on real ranks (gloo, CPU): losses and gradients do not depend on the world size."""

import json
from pathlib import Path

import pytest

from tests.training.launch import forked

WORKER = Path(__file__).with_name("engine_worker.py")
pytestmark = pytest.mark.distributed


def run(tmp_path, ranks, *overrides):
    output = tmp_path / f"{ranks}-{'-'.join(overrides) or 'plain'}.json".replace("/", "_")
    forked(ranks, str(WORKER), str(output), *overrides, log=tmp_path / f"log{ranks}")
    return json.loads(output.read_text())


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_two_ranks_equal_one(tmp_path, adapter):
    """2 ranks x 2 micro-batches of 2 equal 1 rank x 2 micro-batches of 4: the loss is normalised by
    the tokens of the whole global batch, whatever the split."""
    one = run(tmp_path, 1, "training.micro_batch=4", f"peft.type={adapter}")
    two = run(tmp_path, 2, "training.micro_batch=2", f"peft.type={adapter}")
    for (stage, loss, norm), (_, loss2, norm2) in zip(one["steps"], two["steps"], strict=True):
        assert loss2 == pytest.approx(loss, rel=1e-5), stage
        assert norm2 == pytest.approx(norm, rel=1e-4), stage
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-3, abs=1e-4)
    for stage in ("align", "finetune"):
        losses = [loss for name, loss, _ in one["steps"] if name == stage]
        assert losses[-1] < losses[0]
    # No engine or optimizer of stage 1 survives into stage 2, nor any past the end.
    assert one["leaks"] == two["leaks"] == [False, False]


@pytest.mark.parametrize("dtype, rounding", [("float32", 1e-5), ("bfloat16", 5e-3)])
def test_reducing_once_equals_reducing_every_micro_batch(tmp_path, dtype, rounding):
    """2 ranks x 4 micro-batches, against DeepSpeed's own way; also in bfloat16, whose gradients must
    add up in fp32."""
    settings = ("training.micro_batch=1", f"llm.dtype={dtype}")
    once, each = run(tmp_path, 2, *settings), run(tmp_path, 2, *settings, "plain")
    for (stage, loss, norm), (_, loss2, norm2) in zip(once["steps"], each["steps"], strict=True):
        assert loss == pytest.approx(loss2, rel=rounding), stage
        assert norm == pytest.approx(norm2, rel=rounding), stage
    if dtype == "float32":  # Adam makes whole steps of what is mere rounding in bfloat16
        assert once["weights"] == pytest.approx(each["weights"], rel=1e-3, abs=1e-4)
    assert once["gradients"] == ["torch.float32"] and each["gradients"] == []
