"""Videos of the known-truth sweep, written without loss.

A set of clips (`known_scenes.indistinguishable`) is drawn once, so that its clips have the same pixels wherever a
limited model can see them: a clip and its swapped one have the same frames in reverse order, and the
clips of the task later are the same up to and with the middle frame. Every clip has eight frames of a quarter of a
second, all of which are sampled, and each is decoded to the pixels that it has in every other clip of its set.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from vlmds.demo.clips import COLOURS, shape_mask
from vlmds.demo.known_scenes import TASKS, Scene, caption, sets_of_split
from vlmds.files import write

SIDE = 64  # pixels
CELL = 16  # pixels; of a grid, and of CLIP's patches
FRAMES = 8
FPS = 4
LATER = 5  # first frame of the later event: the middle frame, at half of the duration, is number 4
BIG = (34, 44)  # pixels
SMALL = (13, 16)
DOT = 6


@dataclass(frozen=True)
class Thing:
    """One drawn shape. corner: x, y in pixels. mask: float32 [size, size]."""

    colour: tuple[int, int, int]
    mask: np.ndarray
    corner: tuple[int, int]


def draw_set(scenes: tuple[Scene, ...], rng: np.random.Generator) -> list[np.ndarray]:
    """The clips of a set: for each scene uint8 [FRAMES, SIDE, SIDE, 3]."""
    first = scenes[0]
    background = background_of(rng)
    if first.task == "order":
        one = still(background, [_big(first.colour, first.shape, rng)])
        other = still(background, [_big(first.other_colour, first.other_shape, rng)])
        frames = noisy([one] * (FRAMES // 2) + [other] * (FRAMES // 2), rng)
        return [frames, frames[::-1].copy()]
    if first.task == "later":
        thing = _big(first.colour, first.shape, rng)
        before = noisy([still(background, [thing])] * LATER, rng)
        clips = []
        for scene in scenes:
            after = still(background, [Thing(_tint(scene.other_colour, rng), thing.mask, thing.corner)])
            clips.append(np.concatenate([before, noisy([after] * (FRAMES - LATER), rng)]))
        return clips
    return [noisy([still(background, things(first, rng))] * FRAMES, rng)]


def things(scene: Scene, rng: np.random.Generator) -> list[Thing]:
    """What a scene shows at its beginning, in order of drawing."""
    if scene.task == "counting":
        cells = rng.permutation((SIDE // CELL) ** 2)[: scene.number]
        return [_in_cell(scene, divmod(int(cell), SIDE // CELL), rng) for cell in cells]
    big = _big(scene.colour, scene.shape, rng)
    if scene.task != "detail":
        return [big]
    middle = (big.corner[0] + len(big.mask) / 2, big.corner[1] + len(big.mask) * 0.55)
    corner = tuple(round(m - DOT / 2 + rng.uniform(-2, 2)) for m in middle)
    return [big, Thing(_tint(scene.other_colour, rng), np.ones((DOT, DOT), np.float32), (corner[0], corner[1]))]


def _big(colour: str, shape: str, rng: np.random.Generator) -> Thing:
    size = int(rng.integers(*BIG))
    x, y = rng.integers(0, SIDE - size + 1, 2)
    return Thing(_tint(colour, rng), shape_mask(shape, size, float(rng.uniform(-0.2, 0.2))), (int(x), int(y)))


def _in_cell(scene: Scene, cell: tuple[int, int], rng: np.random.Generator) -> Thing:
    size = int(rng.integers(*SMALL))
    row, column = (CELL * place + int(rng.integers(0, CELL - size + 1)) for place in cell)
    return Thing(_tint(scene.colour, rng), shape_mask(scene.shape, size, float(rng.uniform(-0.2, 0.2))), (column, row))


def _tint(colour: str, rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (np.asarray(COLOURS[colour][1]) + rng.integers(-12, 13, 3)).clip(0, 255).tolist()
    return red, green, blue


def background_of(rng: np.random.Generator) -> np.ndarray:
    """float32 [SIDE, SIDE, 3]."""
    base = rng.integers(15, 60) + rng.integers(0, 25, 3)
    shade = np.linspace(-0.5, 0.5, SIDE, dtype=np.float32)[:, None, None] * rng.uniform(-25, 25)
    return np.broadcast_to(shade + base.astype(np.float32), (SIDE, SIDE, 3)).astype(np.float32)


def still(background: np.ndarray, shown: list[Thing]) -> np.ndarray:
    """The things on the background: float32 [SIDE, SIDE, 3]."""
    image = background.copy()
    for thing in shown:
        x, y = thing.corner
        inside = image[y : y + len(thing.mask), x : x + len(thing.mask)]
        inside += thing.mask[:, :, None] * (np.asarray(thing.colour, np.float32) - inside)
    return image


def noisy(images: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """uint8 [n, SIDE, SIDE, 3], each image with noise of its own."""
    stacked = np.stack(images)
    return (stacked + rng.normal(0, 4, stacked.shape)).clip(0, 255).astype(np.uint8)


def write_lossless(path: Path, frames: np.ndarray) -> None:
    """Write uint8 [n, height, width, 3] as H.264 without loss after the conversion to 4:2:0, so that what a frame
    decodes to does not depend on the frames around it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=Fraction(FPS), options={"preset": "ultrafast", "qp": "0", "threads": "1"}
        )
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def make_known_clips(out: Path, *, train: int, val: int, seed: int = 0) -> Path:
    """Write `out`/clips/*.mp4 and `out`/manifest.jsonl; returns the manifest's path. An existing manifest of the
    same numbers is used again.

    Args:
        train, val: clips of each task, rounded down to whole sets (`known_scenes.indistinguishable`).

    The id of a clip names its task and set: val_order_00012_1 is the second clip of set 12.
    """
    out = Path(out)
    manifest, settings = out / "manifest.jsonl", json.dumps({"train": train, "val": val, "seed": seed})
    if manifest.is_file() and (out / "settings.json").read_text() == settings:
        return manifest
    (out / "clips").mkdir(parents=True, exist_ok=True)

    def write_set(job: tuple[str, str, int, tuple[Scene, ...]]) -> list[dict]:
        split, task, number, scenes = job
        rng = np.random.default_rng([seed, split == "val", TASKS.index(task), number])
        rows = []
        for place, (scene, frames) in enumerate(zip(scenes, draw_set(scenes, rng), strict=True)):
            name = f"{split}_{task}_{number:05d}_{place}"
            write_lossless(out / "clips" / f"{name}.mp4", frames)
            rows.append({"video": f"clips/{name}.mp4", "caption": caption(scene), "id": name, "split": split})
        return rows

    jobs = [
        (split, task, number, scenes)
        for split, count in (("train", train), ("val", val))
        for task in TASKS
        for number, scenes in enumerate(sets_of_split(task, split, count, seed))
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = [row for made in pool.map(write_set, jobs) for row in made]
    write(out / "settings.json", settings)
    write(manifest, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return manifest
