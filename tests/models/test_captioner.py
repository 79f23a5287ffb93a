"""The captioner against the textbook form: full logits, attention mask, explicit loop."""

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from vlmds.experiments.schema import LinearProjector
from vlmds.inference.generation import GenerationOptions, generation_config
from vlmds.models.captioner import IGNORE, VISUAL, Captioner
from vlmds.models.projectors import build_projector


@pytest.fixture
def captioner():
    torch.manual_seed(0)
    llm = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
    )
    projector = build_projector(LinearProjector(type="linear"), 8, 32, num_frames=2, patches=3)
    return Captioner(projector, llm).eval()


def rows():
    torch.manual_seed(1)
    ids = torch.randint(0, 100, (2, 16))
    ids[:, 1:7] = VISUAL
    labels = ids.clone()
    labels[:, :9] = IGNORE
    labels[1, 12:] = IGNORE  # the second row is padded from 12 on
    return torch.randn(2, 6, 8), ids, labels


def test_loss_equals_full_logits_with_mask(captioner):
    features, ids, labels = rows()
    embeds = torch.stack(
        [
            torch.cat(
                [
                    captioner.llm.get_input_embeddings()(row[:1]),
                    captioner.projector(f),
                    captioner.llm.get_input_embeddings()(row[7:]),
                ]
            )
            for row, f in zip(ids, features, strict=True)
        ]
    )
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    logits = captioner.llm(inputs_embeds=embeds, attention_mask=mask).logits
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    )
    torch.testing.assert_close(captioner(features, ids, labels), expected)


def test_every_visual_token_gets_a_gradient(captioner):
    features, ids, labels = rows()
    features.requires_grad_()
    captioner(features, ids, labels).backward()
    assert (features.grad.abs().sum(-1) > 0).all()


def test_visual_tokens_are_placed_as_by_a_mask(captioner):
    """Bit for bit, forward and backward, where rows have them at other places, too."""
    torch.manual_seed(2)
    ids = torch.randint(0, 100, (3, 16))
    for row, start in enumerate((0, 4, 10)):
        ids[row, start : start + 6] = VISUAL
    features, weights = torch.randn(3, 6, 8), torch.randn(3, 16, 32)

    def by_mask():
        visual = captioner.projector(features)
        text = captioner.llm.get_input_embeddings()(ids.clamp(min=0)).detach()
        return text.masked_scatter((ids == VISUAL).unsqueeze(-1), visual)

    found = []
    for embed in (by_mask, lambda: captioner.embed(features, ids)):
        captioner.zero_grad()
        embeds = embed()
        (embeds * weights).sum().backward()
        found.append([embeds.detach(), *(p.grad for p in captioner.projector.parameters())])
    for expected, actual in zip(*found, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("places", [range(7), range(5), [0, 1, 2, 3, 4, 6], []])
def test_other_placeholders_than_visual_tokens_are_refused(captioner, places):
    """Too many, too few, in two pieces, none: in the second row, and it is not the first's."""
    features, ids, _ = rows()
    ids[1, ids[1] == VISUAL] = 5
    ids[1, list(places)] = VISUAL
    message = rf"rows have \[6, {len(places)}\] placeholders; they must have \[6, 6\]"
    with pytest.raises(ValueError, match=message):
        captioner.embed(features, ids)


def test_captions_do_not_depend_on_the_batch(captioner):
    features, ids, _ = rows()
    pad = torch.zeros(1, 3, dtype=torch.long)
    long, short = ids[:1, :14], ids[1:, :11]
    batch = torch.cat([long, torch.cat([pad, short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :3] = 0
    for beams in (1, 3):
        config = generation_config(GenerationOptions(max_new_tokens=8, num_beams=beams), 99, 0)
        together = captioner.generate(features, batch, mask, config)
        alone = [
            captioner.generate(f[None], row, torch.ones_like(row), config)
            for f, row in ((features[0], long), (features[1], short))
        ]
        for row, single in zip(together, alone, strict=True):
            assert row[: single.shape[1]].tolist() == single[0].tolist()
