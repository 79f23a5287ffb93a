"""The plan's sizes of checkpoints and partitions, against a real run's."""

import pytest
from safetensors import safe_open

from tests import tiny
from vlmds.experiments.reading import load_experiment
from vlmds.models.assemble import meta_models
from vlmds.models.trainable import freeze
from vlmds.planning.memory import checkpoint_bytes, partition_sizes

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("number", [0, 1])
def test_a_real_checkpoint_has_the_planned_size(models, two_ranks, number):
    """Two ranks: the bytes of all tensors, and what ZeRO-2 gave to the first rank."""
    experiment = load_experiment("e3", tiny.settings(models))
    stage = experiment.stages[number]
    captioner = meta_models(experiment).captioner
    freeze(captioner, stage)
    total, first = 0, dict.fromkeys(("weight", "exp_avg", "exp_avg_sq"), 0)
    for rank in (0, 1):
        path = two_ranks / "checkpoints" / f"{stage.name}-0000006" / f"rank-0000{rank}.safetensors"
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  # it cannot be iterated over
                elements = file.get_tensor(key).numel()
                total += 4 * elements
                if rank == 0:
                    first[key.split("/")[0]] += elements
    assert total == checkpoint_bytes(experiment, captioner)
    assert set(first.values()) == {sum(partition_sizes(experiment, stage, captioner, 2))}
