import pytest
import torch

from vlmds.errors import InputError
from vlmds.experiments.schema import CAbstractorProjector, LinearProjector, MLPProjector, PerceiverProjector
from vlmds.models.projectors import build_projector

FRAMES, PATCHES, VISION, LLM = 4, 9, 12, 16


def build(config):
    torch.manual_seed(0)
    return build_projector(config, VISION, LLM, FRAMES, PATCHES).eval()


def resampler(kind, **options):
    cls = {"cabstractor": CAbstractorProjector, "perceiver": PerceiverProjector}[kind]
    return build(cls(type=kind, width=16, num_queries=5, num_heads=2, **options))


def reversed_frames(features):
    return features.unflatten(-2, (FRAMES, PATCHES)).flip(-3).flatten(-3, -2)


@pytest.mark.parametrize("kind", ["linear", "mlp", "cabstractor", "perceiver"])
def test_unbatched_equals_batched(kind):
    simple = {"linear": LinearProjector(type="linear"), "mlp": MLPProjector(type="mlp")}
    projector = build(simple[kind]) if kind in simple else resampler(kind)
    features = torch.randn(3, FRAMES * PATCHES, VISION)
    tokens = projector(features)
    assert tokens.shape == (3, projector.num_tokens, LLM)
    torch.testing.assert_close(projector(features[1]), tokens[1])


@pytest.mark.parametrize("kind", ["cabstractor", "perceiver"])
def test_frame_order_matters_only_with_temporal_embedding(kind):
    features = torch.randn(2, FRAMES * PATCHES, VISION)
    ordered = resampler(kind)
    # The embedding starts small; a trained one is larger. Enlarge it so the effect is plain.
    ordered.frame_time.data *= 50
    assert (ordered(features) - ordered(reversed_frames(features))).abs().max() > 1e-2
    plain = resampler(kind, temporal_embedding=False)
    torch.testing.assert_close(plain(features), plain(reversed_frames(features)))


def test_wrong_feature_shape_is_refused():
    with pytest.raises(ValueError, match="features are"):
        build(LinearProjector(type="linear"))(torch.randn(2, 5, VISION))


def test_heads_must_divide_the_llm_width_when_width_is_null():
    with pytest.raises(InputError, match="num_heads: 3 does not divide"):
        build(PerceiverProjector(type="perceiver", width=None, num_heads=3))


@pytest.mark.parametrize("kind", ["cabstractor", "perceiver"])
def test_full_width_form_has_no_output_linear(kind):
    cls = {"cabstractor": CAbstractorProjector, "perceiver": PerceiverProjector}[kind]
    projector = build(cls(type=kind, width=None, num_heads=2))
    assert isinstance(projector.output_proj, torch.nn.Identity)
