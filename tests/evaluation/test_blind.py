"""Blind tests of planted models: one that depends on the order of frames, one that does not, and ones that use the
video in a share of the clips."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from tests import tiny
from vlmds.evaluation.blind import blind_tests, doubts
from vlmds.evaluation.scoring import ClipScorer, ClipText, frame_orders, swap_videos
from vlmds.experiments.reading import load_experiment
from vlmds.inference.generation import CaptionedBatch

FRAMES, TOKENS = 4, 10


class Planted(ClipScorer):
    """Loss per token: 3 with black frames, which have the feature -1. Otherwise 2, less ``worth`` times the share of
    neighbouring frames that are in order."""

    worth = 1.0

    def _log_probabilities(self, features, captions, prompts):
        frames = torch.stack(list(features)).unflatten(1, (FRAMES, -1))[:, :, 0, 0]
        ordered = (frames[:, 1:] > frames[:, :-1]).double().mean(1)
        losses = torch.where(frames[:, 0] < 0, 3.0, 2 - self.worth * ordered)
        return [(-TOKENS * loss, TOKENS) for loss in losses.tolist()]


def texts_of(count: int) -> list[ClipText]:
    return [ClipText(i, str(i), [f"{i}번 영상 {'가나다라마바사'[i % 7]}"], None, 1.0, str(i)) for i in range(count)]


@pytest.mark.parametrize("worth", [1.0, 0.0])
def test_the_share_of_the_order(models, worth):
    experiment = load_experiment("e3", tiny.settings(models))
    captioner = SimpleNamespace(projector=SimpleNamespace(num_tokens=8))
    tokenizer = AutoTokenizer.from_pretrained(models / "qwen3")
    texts = texts_of(20)
    scorer = Planted(experiment, SimpleNamespace(tokenizer=tokenizer, captioner=captioner), texts, swap_videos(texts))
    scorer.worth = worth
    scorer.__dict__["_blank_features"] = torch.full((1, 2 * FRAMES, 3), -1.0)
    features = torch.arange(FRAMES).repeat_interleave(2)[None, :, None].expand(len(texts), -1, 3).float()
    captions = [text.captions[0] for text in texts]
    records = scorer.score(texts, CaptionedBatch([], captions, features, 0.0))
    loss = blind_tests(texts, records, captions, {}, {}, {None: "네"})["loss"]
    shuffled = frame_orders(FRAMES)["frames_shuffled"]
    kept = sum(one < other for one, other in zip(shuffled, shuffled[1:])) / (FRAMES - 1)
    expected = {"blank": 3, "frames_reversed": 2, "frames_shuffled": 2 - kept * worth, "one_frame": 2}
    for name, blind in expected.items():
        share = (blind - 2 + worth) / blind
        found = [loss[name][key] for key in ("blind", "share", "share_low", "share_high")]
        assert found == pytest.approx([blind, share, share, share]), name
        assert loss[name]["clips"] == (share > 0)


def test_orders_of_frames():
    assert frame_orders(1) == {}
    assert frame_orders(2) == {"frames_reversed": [1, 0], "frames_shuffled": [1, 0], "one_frame": [1, 1]}
    for count in (3, 4, 8, 16):
        orders = frame_orders(count)
        assert orders["frames_shuffled"] not in ([*range(count)], [*range(count)][::-1])
        assert sorted(orders["frames_shuffled"]) == [*range(count)]


def evidence(clips: int, used: int, blind_loss: float = 2.0) -> dict:
    """A model that knows the video's caption in ``used`` clips; there its loss is 0.5 and, blind, ``blind_loss``.
    For the others it says the same to every video, and all losses are 2."""
    texts = texts_of(clips)
    seen = [i % (clips // used) == 0 for i in range(clips)]
    captions = [text.captions[0] if known else "번 영상" for text, known in zip(texts, seen, strict=True)]
    own = [[-5.0 if known else -20.0, TOKENS] for known in seen]
    blind = [[-TOKENS * (blind_loss if known else 2.0), TOKENS] for known in seen]
    records = [{"real": real, "blank": other} for real, other in zip(own, blind, strict=True)]
    swapped = swap_videos(texts)
    partner = {i: captions[swapped[i]] for i in range(clips)}
    return blind_tests(texts, records, captions, dict(enumerate(blind)), partner, {None: "번 영상"})


def test_a_video_used_in_two_percent_of_the_clips_is_not_enough():
    found = evidence(500, 10)
    assert found["loss"]["blank"]["low"] > 0  # significant, and yet
    assert found["loss"]["blank"]["share"] == pytest.approx(0.02 * 1.5 / 2)
    assert found["loss"]["blank"]["clips"] == pytest.approx(0.02)
    assert any("loss with black frames is not clearly worse: 1.5% (95% interval" in w for w in found["warnings"])
    few = evidence(500, 10, blind_loss=50.0)  # a large share, of a few clips
    assert few["loss"]["blank"]["share_low"] > 0.05
    assert any(
        "clips with a smaller loss than with black frames, less those with a larger one: 2.0%" in w
        for w in few["warnings"]
    )


def test_a_video_used_in_half_of_the_clips_is_enough():
    assert not doubts(evidence(500, 250))
