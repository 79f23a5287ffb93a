"""Features ahead of the training: in the order of the micro-batches, for any timing."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.training.launch import arguments, metrics, train
from tests.training.test_training import assert_same_weights, weights
from vlmds.models.assemble import Model
from vlmds.models.captioner import Captioner
from vlmds.models.vision import VisionTower
from vlmds.training import overlap
from vlmds.training.overlap import FeaturesAhead

CPU = torch.device("cpu")
AHEAD = Path(__file__).with_name("ahead.py")


def made(device):
    torch.manual_seed(0)
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
        )
    )
    tower = VisionTower(clip, [0.5] * 3, [0.5] * 3, -1, 8, 1).to(device)
    captioner = Captioner(torch.nn.Linear(64, 8).to(device), torch.nn.Identity())
    return Model(tower, captioner, None, 56)


def group(number, count):
    torch.manual_seed(number)
    return [{"frames": torch.randint(256, (2, 3, 3, 56, 56), dtype=torch.uint8)} for _ in range(count)]


class Watched:
    """Stands in for a Model and for the data: notes in `log` what is read, computed and trained."""

    def __init__(self, batches):
        self.log, self._batches = [], batches

    def features(self, batch):
        self.log.append(f"clip {batch['number']}")
        return torch.tensor(batch["number"])

    def reading(self):
        for batch in self._batches:
            self.log.append(f"read {batch['number']}")
            yield batch

    def train(self, ahead, count):
        """A step; the numbers of its micro-batches."""
        taken = ahead.group(count)
        for batch, features in zip(taken, ahead.features(taken)):
            assert int(features) == batch["number"]
            self.log.append(f"train {batch['number']}")
        return [batch["number"] for batch in taken]


def numbered(count, **more):
    return [{"number": number, **more.get(f"at_{number}", {})} for number in range(count)]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_features_are_those_of_their_micro_batch(monkeypatch, count, ahead):
    monkeypatch.setattr(overlap, "runs_ahead", lambda device: ahead)
    model, batches = made("cpu"), group(1, 3 * count)
    reading = FeaturesAhead(model, CPU, batches)
    for step in range(3):
        taken = reading.group(count)
        assert [id(batch) for batch in taken] == [id(batch) for batch in batches[step * count : (step + 1) * count]]
        given = list(reading.features(taken))
        assert len(given) == count
        for batch, features in zip(taken, given, strict=True):
            assert torch.equal(features, model.features(batch))


def test_on_a_cpu_nothing_is_read_or_computed_before_it_is_asked_for():
    watched = Watched(numbered(3))
    ahead = FeaturesAhead(watched, CPU, watched.reading())
    assert [watched.train(ahead, 2), watched.train(ahead, 2)] == [[0, 1], [2]]
    assert watched.log == ["read 0", "read 1", "clip 0", "train 0", "clip 1", "train 1", "read 2", "clip 2", "train 2"]


def test_clip_is_one_micro_batch_ahead_also_over_the_border_of_a_step(monkeypatch):
    monkeypatch.setattr(overlap, "runs_ahead", lambda device: True)
    watched = Watched(numbered(4))
    ahead = FeaturesAhead(watched, CPU, watched.reading())
    assert [watched.train(ahead, 2), watched.train(ahead, 2)] == [[0, 1], [2, 3]]
    assert watched.log == [
        "read 0",
        "read 1",
        "clip 0",
        "clip 1",
        "train 0",
        "read 2",
        "clip 2",
        "train 1",
        "read 3",
        "clip 3",
        "train 2",
        "train 3",
    ]
    watched = Watched(numbered(3))  # one a step
    ahead = FeaturesAhead(watched, CPU, watched.reading())
    assert [watched.train(ahead, 1) for _ in range(3)] == [[0], [1], [2]]
    assert watched.log == ["read 0", "clip 0", "read 1", "clip 1", "train 0", "read 2", "clip 2", "train 1", "train 2"]
    assert ahead.group(1) == []


def test_what_could_not_be_read_ahead_waits_for_its_step(monkeypatch):
    monkeypatch.setattr(overlap, "runs_ahead", lambda device: True)
    watched = Watched(numbered(2, at_1={"failure": "cannot be read"}))
    ahead = FeaturesAhead(watched, CPU, watched.reading())
    assert watched.train(ahead, 1) == [0]
    assert watched.log == ["read 0", "clip 0", "read 1", "train 0"]
    assert ahead.group(1) == [{"number": 1, "failure": "cannot be read"}]


@pytest.mark.distributed
def test_running_ahead_changes_nothing_over_kill_stop_and_resume(models, shards, two_ranks, tmp_path):
    """Against the run without it, bit for bit: every step's data, losses, weights and ledger. One
    micro-batch a step, so that every one is read while the step before is trained on."""
    run, notes = tmp_path / "run", tmp_path / "notes"
    args = arguments(models, shards, run)

    def start(expect, **fault):
        notes.unlink(missing_ok=True)
        more = {"VLMDS_TEST_FAULT": json.dumps(fault)} if fault else {}
        train(2, *args, expect=expect, script=AHEAD, VLMDS_TEST_AHEAD=str(notes), **more)
        return notes.read_text()

    assert start(None, kind="kill", rank=1, call=5).startswith("ccfcfcfcf")
    assert start(3, kind="signal", name="SIGTERM", rank=1, call=5).startswith("ccfcf")
    noted = start(0)
    assert noted.startswith("ccf") and noted.count("c") == noted.count("f")
    assert metrics(run) == metrics(two_ranks)
    assert_same_weights(weights(run), weights(two_ranks))
    assert not (run / "ledger.jsonl").exists()


@pytest.mark.gpu
def test_a_stream_of_its_own_changes_nothing():
    """While the current stream computes, and its memory is used again and again."""
    device = torch.device("cuda:0")
    model = made(device)
    batches = [{"frames": b["frames"].pin_memory()} for b in group(0, 80)]
    expected = [model.features(batch).clone() for batch in batches]
    torch.cuda.synchronize()
    ahead = FeaturesAhead(model, device, batches)
    for step in range(20):
        for number, features in enumerate(ahead.features(ahead.group(4))):
            kept = features * 1.0  # reads it in the current stream
            load = torch.randn(2048, 2048, device=device)
            for _ in range(20):
                load = (load @ load).clamp(-1, 1)
            del load, features
            assert torch.equal(kept, expected[4 * step + number])
