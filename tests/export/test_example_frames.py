"""The frames of an exported folder's example.py are those of vlmds, without vlmds."""

import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests import tiny
from tests.clips import MIRRORS, change_size, hold_last_frame, orient_video, rotate_video, write_animation, write_video
from vlmds.experiments.reading import load_experiment
from vlmds.export.folder import write_example
from vlmds.export.processor import image_processor
from vlmds.models.vision import load_vision_tower
from vlmds.video.decode import decode_frames
from vlmds.video.fit import RESIZERS, resize_frames
from vlmds.video.probe import probe


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    plain = write_video(folder / "plain.mp4", frames=20, bf="0")
    return [
        plain,
        write_video(folder / "h264.avi", frames=20, bf="2"),
        write_video(folder / "vfr.mkv", frames=8, times=[0, 0.1, 0.15, 0.9, 1.0, 2.0, 2.1, 2.5]),
        write_video(folder / "sar.mp4", frames=20, aspect=2),
        rotate_video(plain, folder / "turned.mp4", 90),
        orient_video(plain, folder / "mirror.mp4", MIRRORS["cclock_flip"]),
        hold_last_frame(plain, folder / "held.mp4", 9.0),
        change_size(folder / "sizes.webm", "libvpx"),
        write_animation(folder / "a.webp", [100, 500, 300]),
    ]


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_the_example_has_the_frames_of_vlmds(videos, tmp_path, fit):
    write_example(tmp_path, load_experiment("e1", [f"data.fit={fit}"]), remote=False)
    script = f"""
import runpy, sys
sys.modules["vlmds"] = None
import numpy as np
example = runpy.run_path({str(tmp_path / "example.py")!r})
np.savez({str(tmp_path / "frames.npz")!r}, *(np.stack(example["read_frames"](video, 48)) for video in sys.argv[1:]))
"""
    subprocess.run([sys.executable, "-I", "-c", script, *map(str, videos)], check=True, timeout=300)
    number = runpy.run_path(str(tmp_path / "example.py"))["NUM_FRAMES"]
    with np.load(tmp_path / "frames.npz") as found:
        for video, frames in zip(videos, found.values(), strict=True):
            expected = resize_frames(decode_frames(video, probe(video), number), 48, fit)
            assert np.array_equal(frames.transpose(0, 3, 1, 2), expected), video.name


def test_the_image_processor_fits_as_vlmds_does(tmp_path):
    vision = load_experiment("e1", tiny.settings(tiny.make_models(tmp_path))).vision
    tower = load_vision_tower(vision, torch.float32, torch.device("cpu"))
    frames = np.random.default_rng(0).integers(0, 256, (2, 40, 70, 3), dtype=np.uint8)
    for fit in RESIZERS:
        found = image_processor(tower, fit)(list(frames), return_tensors="pt")["pixel_values"]
        fitted = torch.from_numpy(resize_frames(frames, tiny.SIDE, fit))
        torch.testing.assert_close(found, (fitted / 255 - tower.mean) / tower.std, rtol=0, atol=1e-5)
