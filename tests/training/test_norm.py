"""The gradients' norm: it alone decides, on all ranks, whether a step is taken.

tests/contracts/test_deepspeed.py names what is private in DeepSpeed and used here (see NormChecked).
"""

import json
from pathlib import Path

import pytest

from tests.training.launch import ROOT, forked
from tests.training.norm_worker import FAULTS

WORKER = Path(__file__).with_name("norm_worker.py")


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", ["zero2_cpu", "zero2_offload"])
def test_the_norm_alone_skips_a_step_on_all_ranks(tmp_path, config, dtype):
    """Two ranks; one element of one gradient on the second is no number, or infinite."""
    output = tmp_path / "seen.json"
    forked(
        2,
        str(WORKER),
        str(output),
        str(ROOT / "ds_configs" / f"{config}.json"),
        f"llm.dtype={dtype}",
        "training.max_grad_norm=0.05",
        log=tmp_path / "log",
    )
    seen = json.loads(output.read_text())
    assert seen["steps"] == len(FAULTS) and seen["skipped"] == sum(map(bool, FAULTS))
    for steps in seen["ranks"]:
        for fault, step in zip(FAULTS, steps, strict=True):
            assert step["searches"] == 0, "DeepSpeed searches gradients for what is no number"
            assert step["skipped"] == bool(fault) and step["finite"], step
            assert step["unchanged"] == bool(fault), step
            if not fault:
                assert step["norm"] == pytest.approx(step["deepspeed_norm"], rel=1e-6)
        # The norm is above the limit, and what the optimizer got was clipped to it.
        assert steps[0]["norm"] > 0.05
        assert steps[0]["first_moment"] == pytest.approx(0.05, rel=1e-4)
