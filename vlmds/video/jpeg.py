"""The encoding of pictures as JPEG, and its qualities."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

QUALITY = 95
"""Of the frames store, unless `vlmds pack --quality` says otherwise."""
SHOWN_QUALITY = 75
"""Of pictures in pages and reports."""


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """uint8 [3, H, W] as a JPEG. quality: 1 ... 100, as libjpeg counts."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def encode_jpegs(images: np.ndarray, quality: int) -> dict[str, bytes]:
    """uint8 [F, 3, H, W] as the members {extension: bytes} of a frames store."""
    return {f"{i}.jpg": encode_jpeg(image, quality) for i, image in enumerate(images)}


def data_uri(image: np.ndarray) -> str:
    """uint8 [3, H, W] as a data: URI for an <img>."""
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(image, SHOWN_QUALITY)).decode()
