"""Crop, pad and stretch: to the pixel, and as transformers' image processors do."""

from typing import get_args

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from vlmds.experiments.schema import DataConfig
from vlmds.packing.shards import PackOptions
from vlmds.video.fit import FIT, PAD_COLOUR, RESIZERS, fit_of, resize_frames

WIDE = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(1, 2, 4, 3) * 10  # 4 x 2 pixels
TALL = WIDE.transpose(0, 2, 1, 3)


def by_rows(frames):
    """uint8 [1, 3, S, S] -> [S, S, 3]"""
    return frames[0].transpose(1, 2, 0)


def test_crop_keeps_the_centre():
    assert np.array_equal(by_rows(resize_frames(WIDE, 2, "crop")), WIDE[0, :, 1:3])
    assert np.array_equal(by_rows(resize_frames(TALL, 2, "crop")), TALL[0, 1:3])


def test_pad_keeps_every_pixel_between_bars_of_clips_mean():
    square = by_rows(resize_frames(WIDE, 4, "pad"))
    assert np.array_equal(square[1:3], WIDE[0])
    assert (square[[0, 3]] == PAD_COLOUR).all() and PAD_COLOUR == (122, 116, 104)
    square = by_rows(resize_frames(TALL, 4, "pad"))
    assert np.array_equal(square[:, 1:3], TALL[0]) and (square[:, [0, 3]] == PAD_COLOUR).all()
    odd = by_rows(resize_frames(WIDE[:, :, :3], 3, "pad"))  # the larger bar is at the end
    assert np.array_equal(odd[:2], WIDE[0, :, :3]) and (odd[2] == PAD_COLOUR).all()


def test_stretch_resizes_both_sides():
    square = by_rows(resize_frames(WIDE, 4, "stretch"))
    assert np.array_equal(square, np.asarray(Image.fromarray(WIDE[0]).resize((4, 4), Image.Resampling.BICUBIC)))
    assert np.array_equal(by_rows(resize_frames(WIDE, 2, "stretch"))[:, :, 0].argsort(), [[0, 1], [0, 1]])


def test_square_frames_are_the_same_under_each():
    frames = np.random.default_rng(0).integers(0, 256, (3, 50, 50, 3), dtype=np.uint8)
    crop, pad, stretch = (resize_frames(frames, 33, fit) for fit in ("crop", "pad", "stretch"))
    assert np.array_equal(crop, pad) and np.array_equal(crop, stretch)


@pytest.mark.parametrize(
    "height, width", [(48, 64), (64, 48), (50, 50), (1080, 1920), (101, 67), (333, 500), (17, 400), (33, 31)]
)
@pytest.mark.parametrize("size", [32, 33, 336])
@pytest.mark.parametrize("fit", RESIZERS)
def test_they_equal_the_image_processors(height, width, size, fit):
    frames = np.random.default_rng(height * width).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    square = {"height": size, "width": size}
    options = dict(crop_size=square, do_rescale=False, do_normalize=False)
    processor = {
        "crop": lambda: CLIPImageProcessorPil(size={"shortest_edge": size}, **options),
        "pad": lambda: LlavaImageProcessorPil(size={"shortest_edge": size}, do_pad=True, **options),
        "stretch": lambda: CLIPImageProcessorPil(size=square, **options),
    }[fit]()
    assert np.array_equal(resize_frames(frames, size, fit), np.stack(processor(list(frames))["pixel_values"]))


def test_names():
    assert [fit_of(RESIZERS[fit]) for fit in RESIZERS] == list(RESIZERS) == ["crop", "pad", "stretch"]
    assert fit_of("another") is None
    kinds = get_args(DataConfig.model_fields["fit"].annotation)
    assert DataConfig().fit == PackOptions.fit == FIT == "pad" and kinds == tuple(RESIZERS)
