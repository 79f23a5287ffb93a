"""Features come in the order of the micro-batches, whatever works beside them."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from vlmds.models.assemble import Model
from vlmds.models.captioner import Captioner
from vlmds.models.vision import VisionTower
from vlmds.training.overlap import FeaturesAhead


def made(device):
    torch.manual_seed(0)
    clip = CLIPVisionModel(CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        image_size=56, patch_size=14))
    tower = VisionTower(clip, [0.5] * 3, [0.5] * 3, -1, 8, 1).to(device)
    captioner = Captioner(torch.nn.Linear(64, 8).to(device), torch.nn.Identity())
    return Model(tower, captioner, None, 56)


def group(number, count):
    torch.manual_seed(number)
    return [{"frames": torch.randint(256, (2, 3, 3, 56, 56), dtype=torch.uint8)}
            for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_features_are_those_of_their_micro_batch(count):
    model, batches = made("cpu"), group(1, count)
    given = list(FeaturesAhead(model, torch.device("cpu"))(batches))
    assert len(given) == count
    for batch, features in zip(batches, given, strict=True):
        assert torch.equal(features, model.features(batch))


def test_on_a_cpu_nothing_is_computed_before_it_is_asked_for():
    model, asked = made("cpu"), []
    inner = model.features
    model.features = lambda batch: asked.append(1) or inner(batch)
    for number, _ in enumerate(FeaturesAhead(model, torch.device("cpu"))(group(1, 3)), 1):
        assert len(asked) == number


@pytest.mark.gpu
def test_a_stream_of_its_own_changes_nothing():
    """While the current stream computes, and its memory is used again and again."""
    device = torch.device("cuda:0")
    model = made(device)
    ahead = FeaturesAhead(model, device)
    for number in range(20):
        batches = [{"frames": b["frames"].pin_memory()} for b in group(number, 4)]
        expected = [model.features(batch).clone() for batch in batches]
        torch.cuda.synchronize()
        for want, features in zip(expected, ahead(batches), strict=True):
            kept = features * 1.0  # reads it in the current stream
            load = torch.randn(2048, 2048, device=device)
            for _ in range(20):
                load = (load @ load).clamp(-1, 1)
            del load
            assert torch.equal(kept, want)
