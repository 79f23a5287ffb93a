"""The projectors: shapes, parameters, frame order."""

import pytest
import torch

from vlmds.errors import InputError
from vlmds.experiments import schema
from vlmds.models.projectors import PROJECTORS, build_projector

FRAMES, PATCHES, VISION, LLM = 4, 9, 12, 16
SMALL = {"width": 16, "num_queries": 5, "num_heads": 2}
KINDS = list(schema.PROJECTORS)


def kinds_with(key):
    return [kind for kind, section in schema.PROJECTORS.items() if key in section.model_fields]


def build(kind, **options):
    """A small projector of this type."""
    section = schema.PROJECTORS[kind]
    values = {key: value for key, value in (SMALL | options).items() if key in section.model_fields}
    torch.manual_seed(0)
    return build_projector(section(type=kind, **values), VISION, LLM, FRAMES, PATCHES).eval()


def reversed_frames(features):
    return features.unflatten(-2, (FRAMES, PATCHES)).flip(-3).flatten(-3, -2)


def test_every_configuration_has_its_class():
    assert KINDS == list(PROJECTORS)


@pytest.mark.parametrize("kind", KINDS)
def test_unbatched_equals_batched(kind):
    projector = build(kind)
    features = torch.randn(3, FRAMES * PATCHES, VISION)
    tokens = projector(features)
    assert tokens.shape == (3, projector.num_tokens, LLM)
    torch.testing.assert_close(projector(features[1]), tokens[1])


@pytest.mark.parametrize("kind", kinds_with("temporal_embedding"))
def test_frame_order_matters_only_with_temporal_embedding(kind):
    features = torch.randn(2, FRAMES * PATCHES, VISION)
    ordered = build(kind)
    # The embedding starts small; a trained one is larger. Enlarge it so the effect is plain.
    ordered.frame_time.data *= 50
    assert (ordered(features) - ordered(reversed_frames(features))).abs().max() > 1e-2
    plain = build(kind, temporal_embedding=False)
    torch.testing.assert_close(plain(features), plain(reversed_frames(features)))


def test_wrong_feature_shape_is_refused():
    with pytest.raises(ValueError, match="features are"):
        build("linear")(torch.randn(2, 5, VISION))


def test_heads_must_divide_the_llm_width_when_width_is_null():
    with pytest.raises(InputError, match="num_heads: 3 does not divide"):
        build("perceiver", width=None, num_heads=3)


@pytest.mark.parametrize("kind", kinds_with("width"))
def test_full_width_form_has_no_output_linear(kind):
    projector = build(kind, width=None)
    assert isinstance(projector.output_proj, torch.nn.Identity)
