"""A still picture at inference: one frame, with the tokens of training."""

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.clips import picture, write_animation, write_manifest, write_video
from tests.inference.test_video_captioner import made
from vlmds.captioning.pipeline import caption_records
from vlmds.data.dataset import open_dataset
from vlmds.data.loader import SampleReader
from vlmds.inference.generation import GenerationOptions
from vlmds.inference.video_captioner import VideoCaptioner
from vlmds.packing.pack import pack

GREEDY = GenerationOptions(max_new_tokens=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A picture, an animation of one frame and a clip."""
    folder = tmp_path_factory.mktemp("pictures")
    Image.fromarray(picture(3, 64, 48)).save(folder / "a.png")
    write_animation(folder / "b.gif", [3000])
    write_video(folder / "c.mp4", frames=9)
    return folder


@pytest.mark.parametrize("exp", ["e1", "e3", "e5", "e7"])
def test_frames_and_tokens_are_those_of_training(models, folder, tmp_path, exp):
    videos = [str(folder / name) for name in ("a.png", "b.gif", "c.mp4")]
    rows = [{"video": video, "caption": "글"} for video in videos]
    pack(write_manifest(tmp_path / "m.jsonl", rows), tmp_path / "out", num_frames=tiny.FRAMES, progress=False)
    reader = SampleReader(open_dataset(tmp_path / "out"), "train", tiny.FRAMES, tiny.SIDE, shuffle=False)
    samples = [reader.load(position) for position in range(3)]
    made(models, tmp_path / exp, exp)
    captioner = VideoCaptioner.from_pretrained(tmp_path / exp, device="cpu")
    projector, seen = captioner.model.captioner.projector, []
    trained = [
        captioner.builder.training("글", None, projector.tokens_of(len(sample.frames) * projector.patches))
        for sample in samples
    ]
    original = captioner.model.captioner.generate

    def generate(features, input_ids, *more, **options):
        seen.append((len(features[0]), input_ids[0].tolist()))
        return original(features, input_ids, *more, **options)

    captioner.model.captioner.generate = generate
    assert [len(sample.frames) for sample in samples] == [1, 1, tiny.FRAMES]
    for sample, frames in zip(samples, captioner.frames(videos, workers=1), strict=True):
        assert np.array_equal(frames, sample.frames)
    alone = [next(captioner.caption([video], GREEDY, workers=1)) for video in videos]
    records = list(caption_records(captioner, videos, GREEDY, batch_size=1, workers=1))
    assert [record["caption"] for record in records] == alone
    for (features, ids), sample, sequence in zip(seen, samples * 2, trained * 2, strict=True):
        assert features == len(sample.frames) * projector.patches
        assert ids == sequence.input_ids[: len(ids)] and sequence.labels[len(ids)] != sequence.labels[0]
    assert list(captioner.caption(videos, GREEDY, workers=1)) == alone  # one batch of pictures and clips
    windows = list(caption_records(captioner, videos[1:2], GREEDY, window=1.0, workers=1))
    assert [record["caption"] for record in windows] == [alone[1]] * 3  # a picture that is shown for 3 s
