"""How many copies of videos packing finds, and how many unrelated videos it takes for copies.

    python -m tests.manual.near_duplicates [VIDEO …]

Makes clips (panned textures with the spectrum of photographs, with objects that move), changed copies of
each, and compares all by the hashes of packing. With VIDEO also 2-second clips of these. Prints for each
change and each threshold the share of copies that are missed, and for unrelated clips the share of pairs
that would be reported. Takes minutes.
"""

import sys
import tempfile
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations, islice
from pathlib import Path

import av
import numpy as np
from PIL import Image

from vlmds.packing.near_duplicates import ALIKE, Hashed, distances
from vlmds.video.decode import decode_frames
from vlmds.video.frame_hash import FRAMES, hash_frames, read_hashes
from vlmds.video.probe import probe

CLIPS, FPS, SECONDS, SIZE = 60, 15, 2, (180, 320)
THRESHOLDS = (4, 6, 8, 10, 12, 14, 16, 18)


def resized(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(f).resize((width, height), Image.Resampling.BICUBIC)) for f in frames])


def cropped(share: float) -> Callable[[np.ndarray], np.ndarray]:
    def crop(frames: np.ndarray) -> np.ndarray:
        height, width = frames.shape[1:3]
        top, left = round(height * share / 2), round(width * share / 2)
        return frames[:, top : height - top, left : width - left]

    return crop


def scaled(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda frames: resized(frames, *(round(side * factor) for side in frames.shape[1:3]))


def trimmed(share: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda frames: frames[: round(len(frames) * (1 - share))]


COPIES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int]] = {
    "crf 30": (lambda frames: frames, 30),
    "crf 40": (lambda frames: frames, 40),
    "half the size": (scaled(0.5), 25),
    "a third of the size, crf 35": (scaled(1 / 3), 35),
    "1.5 times the size": (scaled(1.5), 25),
    "4:3 from 16:9": (lambda frames: resized(frames, 240, 320), 25),
    "shifted by a frame": (lambda frames: frames[1:], 25),
    "every other frame": (lambda frames: frames[::2], 25),
    "mirrored": (lambda frames: frames[:, :, ::-1], 25),
    "cropped by 5%": (cropped(0.05), 25),
    "cropped by 10%": (cropped(0.10), 25),
    "brighter": (lambda frames: np.clip(frames * 1.1 + 15, 0, 255).astype(np.uint8), 25),
    "grey": (lambda frames: np.repeat(frames.mean(-1, keepdims=True).astype(np.uint8), 3, -1), 25),
    "last 10% cut off": (trimmed(0.10), 25),
    "last 30% cut off": (trimmed(0.30), 25),
    "half the size, mirrored, crf 35": (lambda frames: scaled(0.5)(frames)[:, :, ::-1], 35),
}  # fmt: skip


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A random picture whose amplitudes fall as 1/f, like those of photographs: uint8 [H, W, 3]."""
    y, x = np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width)[None] * width
    amplitude = 1 / np.maximum(np.hypot(y, x), 1)
    base = np.real(np.fft.ifft2(amplitude * np.exp(2j * np.pi * rng.random((height, width)))))
    colour = np.stack(
        [base + 0.3 * np.real(np.fft.ifft2(amplitude * np.exp(2j * np.pi * rng.random((height, width)))))
         for _ in range(3)], -1
    )  # fmt: skip
    colour = (colour - colour.mean()) / colour.std()
    return np.clip(rng.uniform(80, 170) + rng.uniform(25, 55) * colour, 0, 255).astype(np.uint8)


def scene(seed: int, background: int | None = None) -> np.ndarray:
    """A panned texture with three objects that move: uint8 [F, H, W, 3]."""
    height, width = SIZE
    pan = np.random.default_rng(seed if background is None else background)
    wide, speed = texture(pan, 2 * height, 2 * width), pan.uniform(-1, 1, 2) * (background is None)
    rng = np.random.default_rng(seed)
    objects = [
        (texture(rng, int(rng.integers(30, 90)), int(rng.integers(30, 90))), rng.uniform(0, 1, 2), rng.uniform(-0.02, 0.02, 2))
        for _ in range(3)
    ]  # fmt: skip
    frames = []
    for i in range(FPS * SECONDS):
        top, left = (int(s / 2 * (1 + v * i / (FPS * SECONDS))) for s, v in zip(SIZE, speed))
        frame = wide[top : top + height, left : left + width].copy()
        for sprite, place, motion in objects:
            y, x = (np.clip(place + motion * i, 0, 1) * (np.array(SIZE) - sprite.shape[:2])).astype(int)
            frame[y : y + sprite.shape[0], x : x + sprite.shape[1]] = sprite
        frames.append(frame)
    return np.stack(frames)


def clips_of(video: str) -> list[np.ndarray]:
    """Spans of a video, two seconds each, at most 480 pixels wide."""
    info = probe(video)
    clips = []
    for start in islice(np.arange(0, info.duration - SECONDS, 2 * SECONDS), 4):
        clips.append(decode_frames(video, info, FPS * SECONDS, float(start), float(start) + SECONDS))
    return [scaled(480 / clip.shape[2])(clip) if clip.shape[2] > 480 else clip for clip in clips]


def hashes(frames: np.ndarray, crf: int, path: Path) -> str:
    """As packing gets them, from the frames encoded as H.264."""
    height, width = (side // 2 * 2 for side in frames.shape[1:3])
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": str(crf), "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, FPS)
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return hash_frames(decode_frames(str(path), probe(str(path)), 8))


def apart(one: str, other: str) -> int:
    """The distance of two clips by their hashes."""
    if not one or not other:
        return 64
    tables = [np.resize(read_hashes(text), FRAMES)[None] for text in (one, other)]
    counts = [np.array([len(text) // 16]) for text in (one, other)]
    return int(distances(tables[0], counts[0], tables[1], counts[1])[0])


def unfound(plain: list[str], copies: list[str]) -> int:
    """Copies within ALIKE that packing's search does not find."""
    search = Hashed()
    for split, clips in (("train", plain), ("val", copies)):
        for i, text in enumerate(clips):
            search.add(split, {"key": str(i), "source": f"{split}{i}", "frame_hashes": text})
    found = {pair.samples for pair in search.find()[0]}
    return sum(
        apart(a, b) <= ALIKE and (f"train/{i}", f"val/{i}") not in found for i, (a, b) in enumerate(zip(plain, copies))
    )


def show(name: str, pairs: list[tuple[str, str]], missed: bool, note: str = "") -> np.ndarray:
    found = np.array([apart(one, other) for one, other in pairs])
    shares = [(found > limit if missed else found <= limit).mean() for limit in THRESHOLDS]
    print(f"{name:45}" + "".join(f"{share:9.3%}" for share in shares) + f"{len(found):9,}  {note}", flush=True)
    return found


def main(videos: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "v.mp4"
        kinds = {"made": [(str(seed), [scene(seed)]) for seed in range(CLIPS)]}
        if videos:
            kinds["videos"] = [(video, clips_of(video)) for video in videos]
        print(f"{'threshold':45}" + "".join(f"{limit:9}" for limit in THRESHOLDS) + "    pairs")
        for kind, sources in kinds.items():
            clips = [(source, clip) for source, group in sources for clip in group]
            plain = [hashes(clip, 18, path) for _, clip in clips]
            print(f"{kind}: {len(clips)} clips, {sum(not len(h) for h in plain)} without a hash")
            for name, (change, crf) in COPIES.items():
                copies = [hashes(change(clip), crf, path) for _, clip in clips]
                show(
                    f"missed: {name}",
                    list(zip(plain, copies)),
                    True,
                    f"{unfound(plain, copies)} of the others not found",
                )
            pairs = [(i, j) for i, j in combinations(range(len(clips)), 2) if clips[i][0] != clips[j][0]]
            found = show("reported: unrelated clips", [(plain[i], plain[j]) for i, j in pairs], False)
            print("  nearest:", [(int(found[k]), clips[pairs[k][0]][0][-30:], clips[pairs[k][1]][0][-30:]) for k in np.argsort(found)[:5]])  # fmt: skip
        fixed = [hashes(scene(seed, background=0), 18, path) for seed in range(40)]
        show("reported: one background, other objects", list(combinations(fixed, 2)), False)


if __name__ == "__main__":
    main(sys.argv[1:])
