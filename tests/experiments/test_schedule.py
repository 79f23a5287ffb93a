"""Schedules and parameter groups."""

import pytest

from tests.training.engine_worker import TINY_PROJECTOR, tiny_captioner
from vlmds.experiments.reading import load_experiment
from vlmds.experiments.schedule import learning_rate
from vlmds.models.language import add_adapter
from vlmds.models.trainable import freeze, parameter_groups


def stage(**values):
    overrides = [f"stages.0.{key}={value}" for key, value in values.items()]
    return load_experiment("e3", ["stages.0.lr=1.0", "stages.0.warmup_ratio=0.1", *overrides]).stages[0]


@pytest.mark.parametrize(
    "settings, expected",
    [  # rates of steps 0, 9, 10, 55, 99 of 100
        ({}, [0.1, 1.0, 1.0, 0.5, 0.00030459]),
        ({"min_lr_ratio": 0.2}, [0.1, 1.0, 1.0, 0.6, 0.20024367]),
        ({"schedule": "linear"}, [0.1, 1.0, 1.0, 0.5, 1 / 90]),
        ({"schedule": "constant"}, [0.1, 1.0, 1.0, 1.0, 1.0]),
        ({"schedule": "wsd", "decay_ratio": 0.5}, [0.1, 1.0, 1.0, 0.9, 0.02]),
        ({"warmup_ratio": 0}, [1.0, 0.98015, 0.97553, 0.42178, 0.00024672]),
    ],
)
def test_schedules(settings, expected):
    found = [learning_rate(step, 100, stage(**settings)) for step in (0, 9, 10, 55, 99)]
    assert found == pytest.approx(expected, rel=1e-3)


def test_each_kind_of_parameter_has_its_rate_and_decay():
    experiment = load_experiment(
        "e8",
        [
            *TINY_PROJECTOR,
            "training.weight_decay=0.1",
            "stages.1.lr=1e-4",
            "stages.1.lr_factors.lora_b=16",
            "stages.1.lr_factors.projector=2",
            "stages.1.weight_decay_factors.magnitude=0",
            "stages.1.weight_decay_factors.lora_a=0.5",
        ],
    )
    captioner = tiny_captioner(experiment)
    captioner.llm = add_adapter(captioner.llm, experiment.peft)
    freeze(captioner, experiment.stages[1])
    groups = parameter_groups(captioner, experiment.stages[1], experiment.training)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("projector", pytest.approx(2e-4), 0.1),
        ("projector_vectors", pytest.approx(2e-4), 0.0),
        ("lora_a", pytest.approx(1e-4), pytest.approx(0.05)),
        ("lora_b", pytest.approx(16e-4), 0.1),
        ("magnitude", pytest.approx(1e-4), 0.0),
    ]
    grouped = [id(p) for g in groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in captioner.parameters() if p.requires_grad)


def test_rank_stabilised_lora_scales_by_the_root_of_the_rank():
    experiment = load_experiment("e7", [*TINY_PROJECTOR, "peft.r=4", "peft.alpha=8", "peft.rslora=true"])
    llm = add_adapter(tiny_captioner(experiment).llm, experiment.peft)
    scales = {m.scaling["default"] for m in llm.modules() if hasattr(m, "lora_A")}
    assert scales == {4.0}
