"""DeepSpeed: the ZeRO-2 optimizer's private parts, which vlmds/training/engine.py overrides and
vlmds/training/checkpoint.py and ema.py read; tests/training/test_norm.py tests the result."""

import inspect
import json
import logging
from pathlib import Path

import deepspeed
import pytest
from deepspeed.accelerator import get_accelerator, real_accelerator
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from tests.training.launch import forked
from vlmds.training.engine import NormChecked


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> dict:
    """What one rank saw of an engine; see deepspeed_worker.py."""
    folder = tmp_path_factory.mktemp("deepspeed")
    worker = Path(__file__).with_name("deepspeed_worker.py")
    forked(1, str(worker), str(folder / "seen.json"), log=folder / "log")
    return json.loads((folder / "seen.json").read_text())


@pytest.mark.parametrize(
    "name", ["check_overflow", "update_offload_overflow_tracker", "scaled_global_norm", "reset_cpu_buffers"]
)
def test_the_optimizer_has_what_norm_checked_overrides(name):
    theirs, ours = (inspect.signature(getattr(of, name)).parameters for of in (DeepSpeedZeroOptimizer, NormChecked))
    assert list(theirs) == list(ours)


@pytest.mark.distributed
def test_the_engines_optimizer_can_change_its_class(engine):
    assert engine["class"] == ["NormChecked", "DeepSpeedZeroOptimizer"]


@pytest.mark.distributed
def test_a_step_asks_for_overflow_then_for_the_norm(engine):
    """Engine.step() must call both overridden methods, in this order, and skip by the norm."""
    assert engine["calls"][0] == "check_overflow" and "scaled_global_norm" in engine["calls"]
    assert engine["norm"] > 0 and engine["overflow"] is False and engine["moved"]


@pytest.mark.distributed
def test_gradients_stand_by_parameter_group(engine):
    """NormChecked._own_norms: averaged_gradients, _get_preflattened_grad_partition, dp_process_group."""
    found = engine["gradients"]
    assert found["groups"] == list(range(len(found["groups"]))) and found["groups"]
    assert set(found["flat"]) <= {None, 1} and found["offload"] is False and found["ranks"] == 1


@pytest.mark.distributed
def test_a_parameters_place_in_the_flat_partition_is_known(engine):
    """checkpoint._fragments: _hp_mapping, hp_fragment_address, lp_fragment_address, bit16_groups."""
    assert engine["fragments"] and all(engine["fragments"])


@pytest.mark.distributed
def test_adam_keeps_its_state_by_flat_partition(engine):
    """checkpoint.MOMENTS and optimizer_steps."""
    assert engine["state"] == ["exp_avg", "exp_avg_sq", "step"]


@pytest.mark.distributed
def test_flat_partitions_are_written_back_to_the_model(engine):
    """ema.WeightAverage and checkpoint.load_checkpoint: update_lp_params."""
    assert engine["written back"]


@pytest.mark.distributed
def test_release_removes_all_that_an_engine_leaves_on_a_model(engine):
    """engine.release names the attributes and hooks; a new one might keep the engine alive."""
    assert engine["left behind"] == {}, "to be added to the names in vlmds.training.engine.release"


@pytest.mark.distributed
def test_the_throughput_timer_can_be_switched_off(engine):
    """ds_config.experiment_ds_config: timers.throughput.enabled."""
    assert engine["timer"] is False


@pytest.mark.distributed
def test_the_shared_memory_op_is_not_compiled_at_a_start(engine):
    """distributed/ranks.py: deepspeed.ops.__compatible_ops__, read by deepspeed.comm."""
    assert engine["shared-memory op"] == "None"
    assert ShareMemCommBuilder.NAME == "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__


def test_a_bad_configuration_raises_what_the_check_catches():
    """ds_config.check_ds_config."""
    with pytest.raises((AssertionError, KeyError, TypeError, ValueError, DeepSpeedConfigError)):
        DeepSpeedConfig({"train_batch_size": "many"})


def test_the_notice_of_the_accelerator_comes_from_one_file():
    """console/quiet.drop_accelerator_notice: the logger's name and the file of the record."""
    assert Path(real_accelerator.__file__).name == "real_accelerator.py"
    logger = logging.getLogger("DeepSpeed")
    assert deepspeed.utils.logging.logger is logger and real_accelerator.accel_logger is logger


def test_the_accelerators_free_memory_can_be_replaced():
    """distributed/cuda.free_memory_from_cuda: a method that takes nothing, or a device."""
    assert [p.default for p in inspect.signature(get_accelerator().available_memory).parameters.values()] == [None]
