"""Full-size shapes and parameter counts on the meta device: no weights, no memory."""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, CLIPVisionModel

from vlmds.experiments.reading import load_experiment
from vlmds.models.language import add_adapter
from vlmds.models.pretrained import PUBLISHED_SHAPES
from vlmds.models.projectors import build_projector
from vlmds.models.vision import VisionTower, patches_per_frame

CLIP = PUBLISHED_SHAPES["openai/clip-vit-large-patch14-336"]
QWEN = PUBLISHED_SHAPES["Qwen/Qwen3-8B"]


@functools.cache
def projector_of(name):
    with torch.device("meta"):
        return build_projector(
            load_experiment(name).projector, CLIP.hidden_size, QWEN.hidden_size, 8, patches_per_frame(CLIP)
        )


def test_clip_drops_the_class_token():
    with torch.device("meta"):
        clip = CLIPVisionModel(CLIP)
        assert clip(torch.empty(1, 3, 336, 336)).last_hidden_state.shape == (1, 577, 1024)
    with torch.device("meta"):
        frames = torch.empty(2, 8, 3, 336, 336, dtype=torch.uint8)
        for pool, patches in ((1, 576), (2, 144), (3, 64)):
            tower = VisionTower(clip, [0.5] * 3, [0.5] * 3, pool=pool)
            assert tower(frames).shape == (2, 8 * patches, 1024)


@pytest.mark.parametrize(
    ("name", "tokens", "millions", "tolerance"),
    [("e1", 4608, 4.1984, 0), ("e3", 4608, 20.979712, 0), ("e5", 64, 50, 0.1), ("e7", 64, 100, 0.1)],
)
def test_projector(name, tokens, millions, tolerance):
    projector = projector_of(name)
    assert projector.num_tokens == tokens
    assert projector(torch.empty(2, 4608, 1024, device="meta")).shape == (2, tokens, 4096)
    assert projector(torch.empty(4608, 1024, device="meta")).shape == (tokens, 4096)
    count = sum(p.numel() for p in projector.parameters())
    assert count == pytest.approx(millions * 1e6, rel=tolerance or 1e-12)


@pytest.mark.parametrize(("name", "trainable", "total"), [("e1", 43_646_976, 8_234_382_336), ("e2", 45_047_808, None)])
def test_adapter(name, trainable, total):
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(QWEN).requires_grad_(False)
        llm = add_adapter(llm, load_experiment(name).peft)
    assert sum(p.numel() for p in llm.parameters() if p.requires_grad) == trainable
    if total:
        assert sum(p.numel() for p in llm.parameters()) == total
