"""Activation checkpointing: the same gradients, and the fewest layers recomputed for which the memory is enough."""

from pathlib import Path

import pytest
import torch

from tests.manual.optimisations import curves, differences
from tests.training.engine_worker import TINY_PROJECTOR, batch, tiny_captioner
from tests.training.launch import forked, metrics
from vlmds.errors import InputError
from vlmds.experiments.reading import load_experiment
from vlmds.models.language import add_adapter
from vlmds.models.trainable import freeze
from vlmds.training.activations import checkpoint_activations, checkpointed_layers, fewest_that_fits

CPU = torch.device("cpu")


def setting(value, exp="e3"):
    return load_experiment(exp, [f"training.activation_checkpointing={value}"])


@pytest.mark.parametrize("value, expected", [("true", 1), ("false", 0), ("2", 2), ("auto", 0)])
def test_settings(value, expected):
    """On a CPU auto is none."""
    experiment = setting(value)
    assert checkpointed_layers(experiment, experiment.stages[0], False, CPU) == expected


def gpu(monkeypatch, free, held=0):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1e18))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: held)


def test_auto_measures_the_gpu_also_outside_of_a_job(monkeypatch):
    """As the baselines of `vlmds bench train` do."""
    experiment = setting("auto")
    for free, expected in ((1e15, 0), (1e9, 1)):
        gpu(monkeypatch, free)
        assert checkpointed_layers(experiment, experiment.stages[0], False, torch.device("cuda:0")) == expected


def test_what_is_loaded_already_does_not_count_twice(monkeypatch):
    """A plan counts the weights; on the GPU PyTorch has them already. What others use is not free."""
    experiment = setting("auto")

    def chosen(free, held):
        gpu(monkeypatch, free, held)
        return checkpointed_layers(experiment, experiment.stages[1], False, torch.device("cuda:0"))

    assert chosen(200e9, 0) == chosen(193e9, 7e9) == 0
    assert chosen(72e9, 0) == chosen(65e9, 7e9) == 2  # takes 65 GB and what fragments leave
    assert chosen(65e9, 0) == 1


def test_the_rank_with_the_least_free_memory_decides_for_all(tmp_path: Path):
    """Two ranks; each measures after a collective, because the first one takes memory itself."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, torch\n"
        "from vlmds.experiments.reading import load_experiment\n"
        "from vlmds.training import activations\n"
        "from vlmds.distributed.ranks import init_distributed\n"
        "init_distributed(3)\n"
        "rank, happened = int(os.environ['RANK']), []\n"
        "def free(device):\n"
        "    happened.append('measured')\n"
        "    return (10**15 if rank == 0 else 10**9), 10**15\n"
        "torch.cuda.mem_get_info, torch.cuda.memory_reserved = free, lambda device: 0\n"
        "torch.cuda.synchronize = lambda device: happened.append('waited')\n"
        "zeros = torch.zeros\n"
        "def on_cpu(count, device):\n"
        "    happened.append('collective')\n"
        "    return zeros(count)\n"
        "activations.torch.zeros = on_cpu\n"
        "e3 = load_experiment('e3', ['training.activation_checkpointing=auto'])\n"
        "free_bytes = activations.free_bytes(torch.device('cuda:0'))\n"
        "assert happened == ['collective', 'waited', 'measured'], happened\n"
        "activations.torch.zeros = zeros\n"
        "activations.start_communicators = lambda device: None\n"
        "every = activations.checkpointed_layers(e3, e3.stages[1], False, torch.device('cuda:0'))\n"
        "assert free_bytes == (10**15 if rank == 0 else 10**9) and every == 1, every\n"
    )
    forked(2, str(script), log=tmp_path / "log")


@pytest.mark.parametrize("value", ["0", "-1", "sometimes", "1.5"])
def test_other_values_are_refused(value):
    with pytest.raises(InputError, match="training.activation_checkpointing: must be auto, true, fal"):
        setting(value)


def test_it_changes_no_gradient():
    """Dropout included: its masks are drawn again alike."""
    experiment = load_experiment("e8", [*TINY_PROJECTOR, "peft.dropout=0.3"])
    captioner = tiny_captioner(experiment)
    captioner.llm = add_adapter(captioner.llm, experiment.peft)
    freeze(captioner, experiment.stages[1])
    captioner.train()
    layers = captioner.llm.get_base_model().model.layers
    found = {}
    for every in (1, 2, 0):
        checkpoint_activations(captioner, every)
        assert [layer.gradient_checkpointing for layer in layers] == {
            0: [False, False],
            1: [True, True],
            2: [True, False],
        }[every]
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
