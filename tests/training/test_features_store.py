"""Training on stored features, without a vision tower."""

from types import SimpleNamespace

import pytest
import torch

from tests import tiny
from tests.training.launch import arguments, metrics, train
from vlmds.data.features import needs_tower
from vlmds.experiments.reading import load_experiment
from vlmds.models.vision import load_vision_tower
from vlmds.packing.convert import convert

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def features(models, shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("features") / "out"
    vision = load_experiment("e3", tiny.settings(models)).vision
    tower = load_vision_tower(vision, torch.float32, torch.device("cpu"))
    convert(shards, out, store="features", tower=tower, tower_name=vision.model, progress=False)
    return out


def test_a_run_on_features_follows_one_on_frames(models, features, two_ranks, tmp_path):
    """Same batches in the same order and so, but for the rounding to bfloat16, the same losses,
    also in validation and over both stages."""
    train(0, *arguments(models, features, tmp_path / "run"))
    ours, theirs = metrics(tmp_path / "run"), metrics(two_ranks)
    assert [(r["stage"], r["kind"], r["step"]) for r in ours] == [(r["stage"], r["kind"], r["step"]) for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3), a
    assert any(a["loss"] != b["loss"] for a, b in zip(ours, theirs))


def test_features_of_another_pooling_are_refused_before_training(models, features, tmp_path):
    done = train(0, *arguments(models, features, tmp_path / "run", "vision.pool=2"), expect=2)
    assert "vision.pool 1, but the experiment has 2" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "store, settings, needed",
    [
        ("frames", [], True),
        ("features", [], False),
        ("features", ["training.evaluate_every=5"], True),  # captions of black frames
    ],
)
def test_when_training_loads_the_tower(store, settings, needed):
    assert needs_tower(load_experiment("e1", settings), [SimpleNamespace(store=store)]) is needed
