"""The fitting of frames to the vision tower's square."""

import numpy as np
from PIL import Image

RESIZER = "pil-bicubic-shortest-edge-centre-crop"


def resize_frames(frames: np.ndarray, size: int) -> np.ndarray:
    """Shortest edge to `size` (PIL bicubic), then the centre size × size.

    frames: uint8 [F, H, W, 3]. Returns uint8 [F, 3, size, size], exactly what transformers'
    CLIPImageProcessorPil gives before it rescales and normalises.
    """
    height, width = frames.shape[1:3]
    long = int(size * max(height, width) / min(height, width))
    new_width, new_height = (size, long) if width <= height else (long, size)
    left, top = (new_width - size) // 2, (new_height - size) // 2
    out = np.empty((len(frames), 3, size, size), np.uint8)
    for i, frame in enumerate(frames):
        image = Image.fromarray(frame).resize((new_width, new_height), Image.Resampling.BICUBIC)
        out[i] = np.asarray(image)[top : top + size, left : left + size].transpose(2, 0, 1)
    return out
