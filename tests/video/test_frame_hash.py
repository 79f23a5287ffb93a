"""Perceptual hashes of frames: what they share, and which frames have none."""

import numpy as np
import pytest
from PIL import Image

from tests.clips import scene
from vlmds.video.frame_hash import MIRROR, frame_distance, frame_hash, hash_frames, read_hashes


def bits(one: int, other: int) -> int:
    return int(frame_distance(np.array([one], np.uint64), np.array([other], np.uint64))[0])


def resized(frame: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))


def test_sizes_brightness_and_mirrors_share_a_hash():
    for seed in range(20):
        frame = scene(seed, frames=1)[0]
        value = frame_hash(frame)
        assert frame_hash(frame[:, ::-1]) == value
        for changed in (resized(frame, 80, 48), resized(frame, 640, 480), frame // 2 + 40):
            assert bits(frame_hash(changed), value) <= 10


def test_unrelated_pictures_do_not():
    values = [frame_hash(scene(seed, frames=1)[0]) for seed in range(40)]
    assert min(bits(a, b) for i, a in enumerate(values) for b in values[:i]) > 10


def test_the_distance_is_that_to_the_nearer_of_picture_and_mirror():
    hashes = [frame_hash(scene(seed, frames=1)[0]) for seed in range(10)]
    assert all(0 < value < 1 << 64 and value % 2 == 0 for value in hashes)
    assert all(bits(value, value ^ int(MIRROR)) == 0 and bits(value, value ^ 6) == 2 for value in hashes)


@pytest.mark.parametrize("level", [0, 16, 128, 255])
def test_frames_that_show_nothing_have_no_hash(level):
    noise = np.random.default_rng(level).integers(-3, 4, (180, 320, 3))
    dark = np.clip(level + noise, 0, 255).astype(np.uint8)
    gradient = np.repeat(np.linspace(0, level, 320)[None, :, None], 320, 0).repeat(3, 2).astype(np.uint8)
    for frame in (np.full((180, 320, 3), level, np.uint8), dark, gradient, gradient.transpose(1, 0, 2)):
        assert frame_hash(frame) is None
    assert hash_frames(np.stack([dark, dark])) == ""


def test_a_shape_on_a_plain_ground_has_no_hash():
    """It would have that of any other shape at its place."""
    frame = np.full((96, 96, 3), 30, np.uint8)
    frame[20:50, 40:75] = (240, 220, 40)
    assert frame_hash(frame) is None


def test_a_clip_has_each_hash_once_and_at_most_eight():
    frames = scene(1, frames=30)
    found = read_hashes(hash_frames(frames))
    assert found.dtype == np.uint64 and len(found) == 8
    assert found[0] == frame_hash(frames[0]) and found[-1] == frame_hash(frames[-1])
    assert len(read_hashes(hash_frames(np.stack([frames[0]] * 8)))) == 1
    assert len(read_hashes(hash_frames(frames[:3]))) == 3
