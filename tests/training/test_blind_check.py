"""The early warnings of a stage: a model that does not use the video, and a loss that stands still."""

import json

import numpy as np
import pytest
import torch

from tests import tiny
from tests.training.launch import arguments, metrics, train
from tests.training.test_training import assert_same_weights, weights
from vlmds.data.loader import Sample, training_collate
from vlmds.experiments.reading import load_experiment
from vlmds.models.assemble import load_model
from vlmds.models.language import add_adapter
from vlmds.models.sequences import SequenceBuilder
from vlmds.training.blind_check import checked_step, clips_to_measure, stalled, summarised, video_worth

SAYINGS = ("빨간 원이 왼쪽으로 움직입니다", "파란 별이 오른쪽으로 움직입니다")


class Split:
    """A split val of black and white clips, in turns, each with its caption."""

    frames = [np.full((tiny.FRAMES, 3, tiny.SIDE, tiny.SIDE), value, np.uint8) for value in (0, 255)]

    def __len__(self):
        return 24

    def load(self, position):
        kind = position * len(SAYINGS) // len(self)
        return Sample(str(position), position, self.frames[kind], [SAYINGS[kind]], SAYINGS[kind], None)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A model that says to each of the two clips what it should."""
    models = tiny.make_models(tmp_path_factory.mktemp("models"), speaking=True)
    experiment = load_experiment("e3", tiny.settings(models))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = load_model(experiment, torch.device("cpu"))
        model.captioner.llm = add_adapter(model.captioner.llm, experiment.peft)
        prompt = experiment.data.prompt
        tiny.teach(model, prompt, [(frames, None, text) for frames, text in zip(Split.frames, SAYINGS, strict=True)])
    builder = SequenceBuilder(model.tokenizer, prompt, model.captioner.projector.num_tokens)
    return model, training_collate(builder)


def test_a_model_that_uses_the_video_gains_from_it_and_one_that_cannot_see_it_is_reported(taught, monkeypatch):
    model, collate = taught
    model.captioner.train()
    state = torch.random.get_rng_state()
    worth = {size: video_worth(model, Split(), collate, clips=16, batch_size=size) for size in (2, 4)}
    assert model.captioner.training and torch.equal(state, torch.random.get_rng_state())
    assert worth[2].clips == 16  # of a batch of two, one is from each half of the split
    assert worth[4].clips == 8  # others have the next clip's caption
    assert all(not found.doubtful and found.value > 0.5 for found in worth.values()), worth
    see = type(model).features
    monkeypatch.setattr(type(model), "features", lambda self, batch: see(self, batch) * 0)
    blind = video_worth(model, Split(), collate, clips=16, batch_size=2)
    assert blind.doubtful and blind.value == pytest.approx(0, abs=1e-6)
    assert "its own video is worth 0.000 ± 0.000 nats/token" in blind.warning()["en"].replace("-0.000", "0.000")


def test_the_worth_does_not_depend_on_the_ranks(taught, monkeypatch):
    model, collate = taught
    alone = video_worth(model, Split(), collate, clips=20, batch_size=4)
    shares = []
    monkeypatch.setattr("vlmds.training.blind_check.gather", lambda value: shares.append(value) or [value])
    for rank in (0, 1):
        video_worth(model, Split(), collate, clips=20, batch_size=4, rank=rank, world_size=2)
    assert summarised([pair for pairs, _ in reversed(shares) for pair in pairs]) == alone


def test_worth_and_its_error():
    found = summarised([(0.0, 2), (4.0, 2)])
    assert (found.value, found.error, found.clips) == (1.0, 1.0, 2)
    assert found.doubtful  # not two standard errors from 0
    assert not summarised([(1.0, 2), (1.1, 2)]).doubtful and summarised([(0.03, 2), (0.03, 2)]).doubtful
    assert summarised([(1.0, 2)]) is None


@pytest.mark.parametrize("total, global_batch, every", [(6, 4, 4), (400, 8, 200), (1000, 64, 50), (900, 16, 7)])
def test_measurements_take_at_most_one_percent_of_the_samples(total, global_batch, every):
    steps = sorted({*range(every, total + 1, every), total})
    clips = {step: clips_to_measure(step, total, global_batch, every, 0.5) for step in steps}
    assert sum(clips.values()) <= 0.01 * total * global_batch
    assert clips[checked_step(total, every, 0.5)] >= 8 or total * global_batch < 800
    assert not clips_to_measure(steps[0], total, global_batch, every, None)


def test_a_loss_that_stands_still():
    def records(loss):
        return [{"kind": "train", "stage": "align", "step": s, "loss": loss(s)} for s in range(1, 101)]

    still = stalled(records(lambda s: 3 + (-1) ** s), "align", 50, 100)
    assert (
        still["en"].startswith("the training loss stands still: 2.9600 in the 25 steps to 25, 3.0400 in those to 50")
        and "학습 손실이 줄지 않습니다" in still["ko"]
    )
    assert stalled(records(lambda s: 3 - s / 100), "align", 50, 100) is None
    assert stalled(records(lambda s: 3.0)[30:], "align", 50, 100) is None  # too few are known
    assert stalled(records(lambda s: 3.0), "align", 20, 40) is None  # too short to decide


BLIND = """
import sys
from vlmds.cli import main
from vlmds.models.assemble import Model
from vlmds.training import blind_check
blind_check.MIN_CLIPS = 2  # of three
features = Model.features
Model.features = lambda self, batch: features(self, batch) * 0
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.distributed
def test_a_stage_that_cannot_learn_is_reported_and_otherwise_unchanged(models, shards, tmp_path):
    """Without features, at a rate that changes nothing: two warnings, once each, and the same training."""
    script = tmp_path / "blind.py"
    script.write_text(BLIND)
    slow = ["stages.0.steps=80", "stages.0.lr=1e-9", "training.validate_every=20", "training.checkpoint_every=80"]
    runs = {}
    for name, share in (("checked", "0.5"), ("unchecked", "null")):
        words = arguments(models, shards, tmp_path / name, *slow, f"training.blind_check={share}")
        done = train(2, *words, script=script)
        runs[name] = metrics(tmp_path / name)
        for warning in ("the model may not use the video", "the training loss stands still"):
            assert done.stdout.count(f"WARNING: align step 40/80: {warning}") == (name == "checked"), done.stdout
    worth = ("video_worth", "video_worth_error", "video_worth_clips")
    [measured] = [r for r in runs["checked"] if "video_worth" in r]
    assert (measured["stage"], measured["step"], measured["video_worth_clips"]) == ("align", 40, 3)
    warnings = [r for r in runs["checked"] if r["kind"] == "warning"]
    assert len(warnings) == 2 and all(r["ko"] and r["step"] == 40 for r in warnings), json.dumps(warnings)
    plain = [{k: v for k, v in r.items() if k not in worth} for r in runs["checked"] if r["kind"] != "warning"]
    assert plain == runs["unchecked"]
    assert_same_weights(weights(tmp_path / "checked"), weights(tmp_path / "unchecked"))
