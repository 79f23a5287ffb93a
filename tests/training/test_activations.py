"""Activation checkpointing: the same gradients, and as little of it as fits."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.training.engine_worker import batch, tiny_captioner
from tests.training.launch import metrics
from tests.training.optimisations import curves, differences
from vlmds.config import load_experiment
from vlmds.errors import InputError
from vlmds.models.language import add_adapter
from vlmds.training.activations import (
    checkpoint_activations,
    checkpointed_layers,
    fewest_that_fits,
)
from vlmds.training.optimizer import freeze

CPU = torch.device("cpu")


def setting(value, exp="e3"):
    return load_experiment(exp, [f"training.activation_checkpointing={value}"])


@pytest.mark.parametrize("value, expected", [("true", 1), ("false", 0), ("2", 2), ("auto", 0)])
def test_settings(value, expected):
    """On a CPU auto is none."""
    experiment = setting(value)
    assert checkpointed_layers(experiment, experiment.stages[0], False, CPU) == expected


def test_auto_looks_at_the_gpu_also_outside_of_a_job(monkeypatch):
    """As the baselines of `vlmds bench train` do."""
    experiment = setting("auto")
    for memory, expected in ((1e15, 0), (1e9, 1)):
        monkeypatch.setattr(torch.cuda, "get_device_properties",
                            lambda device: SimpleNamespace(total_memory=memory))
        assert checkpointed_layers(
            experiment, experiment.stages[0], False, torch.device("cuda:0")) == expected


@pytest.mark.parametrize("value", ["0", "-1", "sometimes", "1.5"])
def test_other_values_are_refused(value):
    with pytest.raises(InputError, match="training.activation_checkpointing: must be auto, true, fal"):
        setting(value)


def test_it_changes_no_gradient():
    """Dropout included: its masks are drawn again alike."""
    experiment = load_experiment("e8", [
        "projector.width=32", "projector.num_queries=4", "projector.num_heads=2",
        "data.num_frames=2", "peft.dropout=0.3"])
    captioner = tiny_captioner(experiment)
    captioner.llm = add_adapter(captioner.llm, experiment.peft)
    freeze(captioner, experiment.stages[1])
    captioner.train()
    layers = captioner.llm.get_base_model().model.layers
    found = {}
    for every in (1, 2, 0):
        checkpoint_activations(captioner, every)
        assert [layer.gradient_checkpointing for layer in layers] == {
            0: [False, False], 1: [True, True], 2: [True, False]}[every]
        captioner.zero_grad()
        torch.manual_seed(3)
        captioner(*batch(captioner.projector.num_tokens)).backward()
        found[every] = [p.grad for p in captioner.parameters() if p.requires_grad]
    for every in (1, 2):
        assert all(map(torch.equal, found[every], found[0]))


def test_auto_recomputes_as_little_as_fits():
    """E3 in NF4, whose 4,608 visual tokens keep much: less on a larger card; E7's 64 need none."""
    def auto(exp, gigabytes):
        experiment = setting("auto", exp)
        return fewest_that_fits(experiment, experiment.stages[1], False, gigabytes * 1e9, 1)

    chosen = [auto("e3", size) for size in (24, 80, 141, 1000)]
    rank = [0, 8, 4, 3, 2, 1]
    assert [rank.index(every) for every in chosen] == sorted(map(rank.index, chosen), reverse=True)
    assert chosen[0] == 1 and chosen[-1] == 0
    assert len(set(chosen)) > 2
    assert auto("e7", 80) == 0


@pytest.mark.distributed
def test_every_optimisation_gives_the_plain_forms_losses(models, shards, tmp_path: Path):
    optimised, plain = curves(models, shards, tmp_path, 6)
    assert len(optimised) == 12
    assert max(differences(optimised, plain, "loss")) < 1e-4
    assert max(differences(optimised, plain, "grad_norm")) < 1e-2
    align, finetune = (row["loss"] for row in metrics(tmp_path / "optimised") if row["kind"] == "val")
    assert finetune < align
