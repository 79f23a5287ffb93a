"""Perceptual hashes of frames, which copies of a video share whatever their encoding and size.

A hash has the signs of the 63 lowest DCT coefficients of a small grey picture, as pHash has (Zauner,
"Implementation and Benchmarking of Perceptual Image Hash Functions", 2010). Written here, as
ImageHash needs SciPy and PyWavelets for it, and knows no mirrored pictures.
"""

import numpy as np
from PIL import Image

FRAMES = 8
"""Most frames of a clip that are hashed."""
SIDE, LOW = 32, 8  # of the small picture; coefficients in each direction
COARSE = 64  # pixels that the shorter side is thinned out to, at least: averaging all of a large frame takes longer
FIRM = 8.0
"""Grey levels x SIDE that a coefficient has at least if its sign means something: compression changes it by less."""
FIRM_COEFFICIENTS = 21
"""A frame with fewer firm coefficients (black, uniform, a plain gradient) has no hash."""
EDGE, EDGES = 8, 0.2
"""A frame has no hash either unless this share of the small picture's cells differ by EDGE grey levels from the
next one. The signs of a shape on a plain ground say only where it is: unrelated drawings would share them."""

_STEPS = (2 * np.arange(SIDE) + 1) * np.arange(LOW)[:, None]
# In whole numbers, so that every machine gets the same signs.
_SCALE = 1 << 10
_BASIS = np.rint(_SCALE * np.sqrt(2 / SIDE) * np.cos(np.pi * _STEPS / (2 * SIDE))).astype(np.int64)  # [LOW, SIDE]
_BITS = np.uint64(1) << np.arange(LOW * LOW, dtype=np.uint64)
_ODD = np.tile(np.arange(LOW) % 2 == 1, (LOW, 1))  # coefficients whose sign a mirrored picture changes
MIRROR = np.bitwise_or.reduce(_BITS[_ODD.ravel()])
"""The bits that differ between the signs of a picture and of its mirror image."""
_EACH = np.uint64(0x0101010101010101)
_PAIRS, _FOURS, _BYTES = (np.uint64(mask) * _EACH for mask in (0x55, 0x33, 0x0F))


def hash_frames(frames: np.ndarray) -> str:
    """The different hashes of at most FRAMES frames, evenly chosen: 16 hexadecimal digits each.

    frames: uint8 [F, H, W, 3], RGB. Empty if no frame shows enough (see FIRM_COEFFICIENTS, EDGES).
    """
    chosen = np.unique(np.linspace(0, len(frames) - 1, FRAMES).round().astype(int))
    found = (frame_hash(frames[i]) for i in chosen)
    return "".join(dict.fromkeys(f"{value:016x}" for value in found if value is not None))


def read_hashes(text: str) -> np.ndarray:
    """What :func:`hash_frames` wrote: uint64 [N]."""
    return np.frombuffer(bytes.fromhex(text), ">u8").astype(np.uint64)


def frame_hash(frame: np.ndarray) -> int | None:
    """The 64-bit hash of a frame, uint8 [H, W, 3]; None if it does not show enough.

    A picture and its mirror image have the same one: that in which the strongest coefficient of those
    that differ is positive.
    """
    step = max(1, min(frame.shape[:2]) // COARSE)
    small = Image.fromarray(np.ascontiguousarray(frame[::step, ::step])).convert("L")
    grey = np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BOX), np.int64)
    steps = np.maximum(np.abs(np.diff(grey, axis=0))[:, :-1], np.abs(np.diff(grey, axis=1))[:-1])
    if (steps >= EDGE).mean() < EDGES:
        return None
    waves = _BASIS @ grey @ _BASIS.T
    waves[0, 0] = 0  # the brightness
    if np.count_nonzero(np.abs(waves) >= FIRM * _SCALE**2) < FIRM_COEFFICIENTS:
        return None
    odd = waves[_ODD]
    if odd[np.abs(odd).argmax()] < 0:
        waves = np.where(_ODD, -waves, waves)
    return int(np.bitwise_or.reduce(_BITS[(waves > 0).ravel()], initial=np.uint64(0)))


def frame_distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Bits that differ between hashes, of 63: uint8, in the arrays' (broadcast) shape.

    one, other: uint64. Where two coefficients are about as strong, a copy may have the hash of the mirror image;
    the lesser distance counts.
    """
    differ = one ^ other
    return np.minimum(bits(differ), bits(differ ^ MIRROR))


def bits(numbers: np.ndarray) -> np.ndarray:
    """How many bits are 1: uint8, in the shape of `numbers` (uint64)."""
    # NumPy 1 has no bitwise_count. This sums 2, 4, then 8 neighbouring bits; the product adds the eight bytes.
    numbers = numbers - ((numbers >> np.uint64(1)) & _PAIRS)
    numbers = (numbers & _FOURS) + ((numbers >> np.uint64(2)) & _FOURS)
    numbers = (numbers + (numbers >> np.uint64(4))) & _BYTES
    return ((numbers * _EACH) >> np.uint64(56)).astype(np.uint8)
