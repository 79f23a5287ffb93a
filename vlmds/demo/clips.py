"""The demo's videos: one shape moves in one direction, described by a Korean sentence.

Every clip is a real H.264 file. Colour, shape and direction, which the caption names, are independent
of size, place, speed, background, noise, length and frame rate, which it does not name: only the
video determines the caption. The combinations of the validation split are not in training, so a model
that only recalls training captions gets them wrong.
"""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

COLOURS = {  # name: (Korean, RGB)
    "red": ("빨간", (225, 40, 40)),
    "blue": ("파란", (45, 90, 240)),
    "yellow": ("노란", (240, 220, 40)),
    "green": ("초록색", (40, 190, 70)),
    "purple": ("보라색", (175, 60, 225)),
    "white": ("하얀", (245, 245, 245)),
}
SHAPES = {"circle": "원", "square": "사각형", "triangle": "삼각형", "star": "별", "cross": "십자가", "ring": "고리"}
DIRECTIONS = {  # name: (Korean, (x, y) with y pointing down)
    "up": ("위", (0, -1)),
    "down": ("아래", (0, 1)),
    "left": ("왼쪽", (-1, 0)),
    "right": ("오른쪽", (1, 0)),
}

SIDES = (64, 72, 80, 88, 96)  # pixels; even, as 4:2:0 video wants
FRAME_RATES = (10, 12, 15, 24)
SECONDS = (1.0, 3.0)
SHAPE_SIZE = (0.34, 0.44)  # of the frame's side
TRAVEL = (0.30, 0.36)  # of the frame's side, first frame to last; short, so that starts overlap


@dataclass(frozen=True)
class Attributes:
    """The values that a caption names; "" for one that it does not name."""

    colour: str
    shape: str
    direction: str


@dataclass(frozen=True)
class Scene:
    """A clip before rendering. Lengths are in pixels, `start` is the shape's first corner."""

    attributes: Attributes
    side: int
    shape_size: int
    angle: float
    start: tuple[float, float]
    travel: float
    tint: tuple[int, int, int]
    background: tuple[int, int, int]
    gradient: float
    noise: float
    frames: int
    fps: int


# --- words -----------------------------------------------------------------------------------


def final_consonant(word: str) -> int:
    """The index of the last syllable's final consonant: 0 for none, 8 for ㄹ."""
    offset = ord(word[-1]) - ord("가")
    if not 0 <= offset <= ord("힣") - ord("가"):
        raise ValueError(f"{word!r} does not end in a Hangul syllable")
    return offset % 28


def subject(word: str) -> str:
    """`word` as a subject: 별이, 고리가."""
    return word + ("이" if final_consonant(word) else "가")


def towards(word: str) -> str:
    """`word` as a goal of motion: 왼쪽으로, 위로; 로 follows a vowel or ㄹ."""
    return word + ("로" if final_consonant(word) in (0, 8) else "으로")


def caption(attributes: Attributes) -> str:
    """The sentence that describes a clip."""
    colour, _ = COLOURS[attributes.colour]
    direction, _ = DIRECTIONS[attributes.direction]
    return f"{colour} {subject(SHAPES[attributes.shape])} {towards(direction)} 움직입니다."


_COLOUR_WORDS = {korean: name for name, (korean, _) in COLOURS.items()}
_SHAPE_WORDS = {korean + p: name for name, korean in SHAPES.items() for p in ("이", "가")}
_DIRECTION_WORDS = {k + p: name for name, (k, _) in DIRECTIONS.items() for p in ("로", "으로")}


def parse_caption(text: str) -> Attributes:
    """The attributes that `text` names, the first of each kind, also with a wrong particle."""
    words = text.split()
    tables = (_COLOUR_WORDS, _SHAPE_WORDS, _DIRECTION_WORDS)
    return Attributes(*(next((t[w] for w in words if w in t), "") for t in tables))


def combinations() -> tuple[list[Attributes], list[Attributes]]:
    """(train, held out): all 144 combinations, 24 of them held out.

    The held-out ones form a Latin pattern: each value is held out equally often, and no pair of
    values loses more than one of its combinations, so training shows every pair.
    """
    train: list[Attributes] = []
    held_out: list[Attributes] = []
    indexed = product(enumerate(COLOURS), enumerate(SHAPES), enumerate(DIRECTIONS))
    for (i, colour), (j, shape), (k, direction) in indexed:
        group = held_out if (i + j + k) % 6 == 0 else train
        group.append(Attributes(colour, shape, direction))
    return train, held_out


# --- pictures --------------------------------------------------------------------------------


def sample_scene(attributes: Attributes, rng: np.random.Generator) -> Scene:
    """A random scene that shows `attributes`; the shape stays inside the frame."""
    side = int(rng.choice(SIDES))
    size = round(side * rng.uniform(*SHAPE_SIZE))
    travel = side * rng.uniform(*TRAVEL)
    room = side - size

    def start(step: int) -> float:
        low, high = {-1: (travel, room), 0: (0, room), 1: (0, room - travel)}[step]
        return float(rng.uniform(low, high))

    x, y = DIRECTIONS[attributes.direction][1]
    corner = start(x), start(y)
    fps = int(rng.choice(FRAME_RATES))
    tint = np.asarray(COLOURS[attributes.colour][1]) + rng.integers(-15, 16, size=3)
    return Scene(
        attributes=attributes,
        side=side,
        shape_size=size,
        angle=float(rng.uniform(-0.25, 0.25)),
        start=corner,
        travel=float(travel),
        tint=_rgb(tint.clip(0, 255)),
        background=_rgb(rng.integers(15, 75) + rng.integers(0, 30, size=3)),
        gradient=float(rng.uniform(-30, 30)),
        noise=float(rng.uniform(2, 10)),
        frames=round(fps * rng.uniform(*SECONDS)),
        fps=fps,
    )


def _rgb(values: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in values)
    return red, green, blue


def _outline(shape: str, angle: float) -> np.ndarray:
    """A polygon's corners, float [n, 2], in a box of side 2 around the origin."""
    if shape == "cross":
        a, b = 1.0, 0.34
        corners = [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b)]
        points = np.array(corners + [(-x, -y) for x, y in corners]) * 0.95
    else:
        count = {"square": 4, "triangle": 3, "star": 10}[shape]
        turn = -math.pi / 4 if shape == "square" else -math.pi / 2
        theta = turn + 2 * math.pi * np.arange(count) / count
        radius = np.where(np.arange(count) % 2, 0.42, 1.0) if shape == "star" else 1.0
        points = np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=1)
    c, s = math.cos(angle), math.sin(angle)
    points = points @ np.array([[c, s], [-s, c]])
    return points / max(1.0, np.abs(points).max())


def shape_mask(shape: str, size: int, angle: float) -> np.ndarray:
    """The shape's coverage of its box, float32 [size, size] in 0…1, with smooth edges."""
    big = size * 6
    image = Image.new("L", (big, big), 0)
    draw = ImageDraw.Draw(image)
    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, big - 1, big - 1), fill=255)
        if shape == "ring":
            inset = big * 0.27
            draw.ellipse((inset, inset, big - inset, big - inset), fill=0)
    else:
        points = (_outline(shape, angle) + 1) * (big - 1) / 2
        draw.polygon([tuple(p) for p in points.tolist()], fill=255)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX), np.float32) / 255


def draw_frame(
    scene: Scene, mask: np.ndarray, progress: float, rng: np.random.Generator
) -> tuple[np.ndarray, tuple[int, int]]:
    """The frame at `progress` (0 first … 1 last): uint8 [side, side, 3], and the shape's corner."""
    step = DIRECTIONS[scene.attributes.direction][1]
    x, y = (round(s + d * scene.travel * progress) for s, d in zip(scene.start, step, strict=True))
    shade = np.linspace(-0.5, 0.5, scene.side, dtype=np.float32)[:, None, None] * scene.gradient
    image = np.broadcast_to(shade + np.asarray(scene.background, np.float32), (scene.side, scene.side, 3)).copy()
    inside = image[y : y + scene.shape_size, x : x + scene.shape_size]
    inside += mask[:, :, None] * (np.asarray(scene.tint, np.float32) - inside)
    image += rng.standard_normal(image.shape, dtype=np.float32) * scene.noise
    return image.clip(0, 255).astype(np.uint8), (x, y)


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """All frames of a scene, uint8 [frames, side, side, 3]."""
    mask = shape_mask(scene.attributes.shape, scene.shape_size, scene.angle)
    times = np.linspace(0, 1, scene.frames)
    return np.stack([draw_frame(scene, mask, float(t), rng)[0] for t in times])


def write_video(path: Path, frames: np.ndarray, fps: int) -> None:
    """Write uint8 [n, height, width, 3] as H.264, with one thread, which makes the bytes repeatable."""
    with av.open(str(path), "w") as container:
        options = {"preset": "ultrafast", "crf": "20", "threads": "1"}
        stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


# --- the data set ----------------------------------------------------------------------------


def make_clips(out: Path, *, train: int = 960, val: int = 96, seed: int = 0) -> Path:
    """Write `out`/clips/*.mp4 and `out`/manifest.jsonl; returns the manifest's path.

    Each clip is a pure function of (seed, split, number). The combinations of a split alternate:
    their counts differ by at most one.
    """
    out = Path(out)
    (out / "clips").mkdir(parents=True, exist_ok=True)
    jobs = []
    for split, count, combos in zip(("train", "val"), (train, val), combinations(), strict=True):
        jobs += [(split, number, combos[number % len(combos)]) for number in range(count)]

    def write(job: tuple[str, int, Attributes]) -> dict:
        split, number, attributes = job
        rng = np.random.default_rng([seed, ("train", "val").index(split), number])
        scene = sample_scene(attributes, rng)
        name = f"{split}_{number:05d}"
        write_video(out / "clips" / f"{name}.mp4", render(scene, rng), scene.fps)
        text = caption(attributes)
        return {"video": f"clips/{name}.mp4", "caption": text, "id": name, "split": split}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(write, jobs))
    manifest = out / "manifest.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    manifest.write_text("".join(lines), encoding="utf-8")
    return manifest
