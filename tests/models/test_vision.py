"""The vision tower: its features, pooling, and models that are refused."""

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests import tiny
from vlmds.errors import InputError
from vlmds.experiments.reading import load_experiment
from vlmds.models.assemble import load_model
from vlmds.models.vision import VisionTower, load_vision_tower, patches_per_frame

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
SHAPE = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=42, patch_size=7
)  # 6 x 6 patches


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return CLIPVisionModel(CLIPVisionConfig(**SHAPE))


@pytest.fixture(scope="module")
def frames():
    values = np.random.RandomState(0).randint(0, 256, (2, 3, 3, 42, 42)).astype(np.uint8)
    return torch.from_numpy(values)


@pytest.mark.parametrize("layer", [-1, -2])
def test_features_are_clips_patch_tokens(clip, frames, layer):
    tower = VisionTower(clip, MEAN, STD, layer, frames_per_call=4)
    pixels = (frames[1, 2].float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        hidden = clip(pixels[None], output_hidden_states=True).hidden_states[layer]
    features = tower(frames)
    assert features.shape == (2, 3 * 36, 16)
    torch.testing.assert_close(features[1, 2 * 36 :], hidden[0, 1:])


@pytest.mark.parametrize("pool", [1, 2, 3, 6])
def test_pooling_averages_squares_of_the_grid(clip, frames, pool):
    grid = VisionTower(clip, MEAN, STD)(frames).view(2, 3, 6, 6, 16)
    pooled = VisionTower(clip, MEAN, STD, pool=pool)(frames)
    side = 6 // pool
    assert pooled.shape == (2, 3 * side * side, 16)
    for row in range(side):
        for column in range(side):
            square = grid[:, :, row * pool : (row + 1) * pool, column * pool : (column + 1) * pool]
            torch.testing.assert_close(pooled.view(2, 3, side, side, 16)[:, :, row, column], square.mean((2, 3)))


def test_a_pool_that_does_not_divide_is_refused_with_both_numbers(clip, tmp_path):
    with pytest.raises(InputError, match=r"vision\.pool: 4 does not divide 6.*1, 2, 3, 6"):
        patches_per_frame(clip.config, 4)
    models = tiny.make_models(tmp_path)
    experiment = load_experiment("e1", [*tiny.settings(models), "vision.pool=3"])
    with pytest.raises(InputError, match=r"vision\.pool: 3 does not divide 2"):
        load_model(experiment, torch.device("cpu"))


def test_pooling_shrinks_the_visual_tokens(tmp_path):
    models = tiny.make_models(tmp_path)
    for exp, tokens in (("e1", tiny.FRAMES), ("e7", 4)):
        extra = tiny.RESAMPLER if exp == "e7" else []
        experiment = load_experiment(exp, [*tiny.settings(models), *extra, "vision.pool=2"])
        model = load_model(experiment, torch.device("cpu"))
        frames = torch.zeros(1, tiny.FRAMES, 3, tiny.SIDE, tiny.SIDE, dtype=torch.uint8)
        assert model.captioner.projector(model.tower(frames)).shape[:2] == (1, tokens)
        assert model.captioner.projector.num_tokens == tokens


def test_a_fingerprint_changes_with_all_that_changes_features(clip):
    prints = {
        "same": VisionTower(clip, MEAN, STD).fingerprint(),
        "layer": VisionTower(clip, MEAN, STD, -2).fingerprint(),
        "pool": VisionTower(clip, MEAN, STD, pool=2).fingerprint(),
        "mean": VisionTower(clip, STD, STD).fingerprint(),
        "std": VisionTower(clip, MEAN, MEAN).fingerprint(),
    }
    torch.manual_seed(1)
    prints["weights"] = VisionTower(CLIPVisionModel(CLIPVisionConfig(**SHAPE)), MEAN, STD).fingerprint()
    other = CLIPVisionModel(CLIPVisionConfig(**{**SHAPE, "num_attention_heads": 4}))
    other.load_state_dict(clip.state_dict())
    prints["heads"] = VisionTower(other, MEAN, STD).fingerprint()
    assert len(set(prints.values())) == len(prints)


def test_a_fingerprint_does_not_depend_on_how_the_tower_is_loaded(tmp_path):
    models = tiny.make_models(tmp_path)
    vision = load_experiment("e1", tiny.settings(models)).vision
    cpu = torch.device("cpu")
    towers = [load_vision_tower(vision, dtype, cpu) for dtype in (torch.float32, torch.bfloat16)]
    towers.append(load_vision_tower(vision.model_copy(update={"frames_per_call": 1}), torch.float32, cpu))
    assert len({tower.fingerprint() for tower in towers}) == 1
