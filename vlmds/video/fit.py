"""The fitting of frames to the vision tower's square: crop, pad or stretch."""

import numpy as np
from PIL import Image

RESIZERS = {
    "crop": "pil-bicubic-shortest-edge-centre-crop",
    "pad": "pil-bicubic-pad-to-square",
    "stretch": "pil-bicubic-stretch",
}
"""Fit -> its name in dataset.json, run.json and artifact.json."""
FIT = "pad"
PAD_COLOUR = (122, 116, 104)  # the mean colour of CLIP's training pictures, as LLaVA pads


def fit_of(resizer: str | None) -> str | None:
    """The fit with this name in RESIZERS; None for another program's."""
    return next((fit for fit, name in RESIZERS.items() if name == resizer), None)


def resize_frames(frames: np.ndarray, size: int, fit: str = FIT) -> np.ndarray:
    """Frames of any shape as squares, by PIL's bicubic filter.

    fit: "crop" resizes the shortest edge to `size` and keeps the centre; "pad" adds bars of PAD_COLOUR
    on both sides of the short edge, then resizes; "stretch" resizes each edge to `size`. All three
    give the same pixels for square frames.
    frames: uint8 [F, H, W, 3]. Returns uint8 [F, 3, size, size], exactly what transformers'
    CLIPImageProcessorPil (pad: LlavaImageProcessorPil) gives before it rescales and normalises.
    """
    height, width = frames.shape[1:3]
    new_width = new_height = size
    if fit == "crop":
        long = int(size * max(height, width) / min(height, width))
        new_width, new_height = (size, long) if width <= height else (long, size)
    left, top = (new_width - size) // 2, (new_height - size) // 2
    out = np.empty((len(frames), 3, size, size), np.uint8)
    for i, frame in enumerate(frames):
        image = Image.fromarray(frame)
        if fit == "pad" and width != height:
            image = _padded(image, size)
        image = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
        out[i] = np.asarray(image)[top : top + size, left : left + size].transpose(2, 0, 1)
    return out


def _padded(image: Image.Image, size: int) -> Image.Image:
    """The picture with bars that make it a square. PIL resizes across before it resizes down; of a wide
    picture this does the first part, to `size` columns, without the bars: the result is the same, sooner."""
    side = max(image.size)
    if image.width == side:
        image = image.resize((size, image.height), Image.Resampling.BICUBIC)
        square = Image.new("RGB", (size, side), PAD_COLOUR)
    else:
        square = Image.new("RGB", (side, side), PAD_COLOUR)
    square.paste(image, ((square.width - image.width) // 2, (side - image.height) // 2))
    return square
