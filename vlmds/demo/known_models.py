"""What the tiny models of the known-truth sweep learn before they are frozen: the things on every patch, and
sentences with observations of all five tasks (see `observations`)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from vlmds.demo import observations
from vlmds.demo.clips import COLOURS, SHAPES
from vlmds.demo.known_clips import FRAMES, LATER, SIDE, Thing, background_of, noisy, still, things
from vlmds.demo.known_scenes import KNOWN_SHAPES, NUMBERS, TASKS, Scene, caption, colour_noun, scenes_of
from vlmds.demo.observations import END, NOTHING, START, Bag, Lessons
from vlmds.demo.pretrain import PATCH, Subject

DOT = "점"
NONE = len(COLOURS)  # class of a patch without a thing


@dataclass
class KnownFrames:
    """pixels uint8 [n, 3, side, side]; colour, dot int64 [n, g·g]: index in COLOURS or NONE; shape int64 [n, g·g]:
    index in KNOWN_SHAPES, or their number for none; number int64 [n]: of things, 1 to 5; texts: one description a
    frame."""

    pixels: torch.Tensor
    colour: torch.Tensor
    shape: torch.Tensor
    dot: torch.Tensor
    number: torch.Tensor
    texts: list[str]


def draw_known_frames(count: int, image_size: int, seed: int) -> KnownFrames:
    """Frames of random scenes of the tasks control, counting and detail. Order and later have the stills of control."""
    if image_size != SIDE:
        raise ValueError(f"image_size {image_size}: these scenes are {SIDE} pixels wide")
    rng = np.random.default_rng([seed, 11])
    tables = [scenes_of(task) for task in ("control", "counting", "detail")]
    pixels, labels, numbers, texts = [], [], [], []
    for _ in range(count):
        table = tables[int(rng.choice(3, p=[0.3, 0.3, 0.4]))]
        scene = table[int(rng.integers(len(table)))]
        shown = things(scene, rng)
        frame = noisy([still(background_of(rng), shown)], rng)[0]
        pixels.append(frame.transpose(2, 0, 1))
        labels.append(_labels(scene, shown))
        numbers.append(scene.number)
        texts.append(" ".join([COLOURS[scene.colour][0], SHAPES[scene.shape], NUMBERS[scene.number]]))
    colour, shape, dot = torch.from_numpy(np.stack(labels)).unbind(dim=1)
    return KnownFrames(torch.from_numpy(np.stack(pixels)), colour, shape, dot, torch.tensor(numbers), texts)


def _labels(scene: Scene, shown: list[Thing]) -> np.ndarray:
    """Colour, shape and dot of every patch: int64 [3, g·g]."""
    grid = SIDE // PATCH
    found = np.full((3, grid * grid), NONE, np.int64)
    found[1] = len(KNOWN_SHAPES)
    for thing in shown:
        x, y = thing.corner
        canvas = np.zeros((SIDE, SIDE), np.float32)
        canvas[y : y + len(thing.mask), x : x + len(thing.mask)] = thing.mask
        share = np.asarray(Image.fromarray(canvas).resize((grid, grid), Image.Resampling.BOX)).reshape(-1)
        if scene.task == "detail" and thing is shown[-1]:
            found[2][share > 0.02] = list(COLOURS).index(scene.other_colour)
        else:
            found[0][share > 0.1] = list(COLOURS).index(scene.colour)
            found[1][share > 0.1] = KNOWN_SHAPES.index(scene.shape)
    return found


class KnownHead(nn.Module):
    """A linear head on every patch token: colour, shape and dot of the patch, and how many things the frame has;
    training only."""

    def __init__(self, width: int):
        super().__init__()
        self.sizes = (NONE + 1, len(KNOWN_SHAPES) + 1, NONE + 1, len(NUMBERS))
        self.linear = nn.Linear(width, sum(self.sizes))

    def loss(self, patches: torch.Tensor, frames: KnownFrames, rows: torch.Tensor) -> torch.Tensor:
        """patches [B, g·g, width], exactly what a projector will get; rows int64 [B]."""
        colour, shape, dot, number = self.linear(patches).split(self.sizes, dim=-1)
        counted = (frames.number[rows] - 1)[:, None].expand(number.shape[:2])
        total = F.cross_entropy(number.flatten(0, 1), counted.flatten()) / 2
        for logits, truth in ((colour, frames.colour), (shape, frames.shape), (dot, frames.dot)):
            total = total + F.cross_entropy(logits.flatten(0, 1), truth[rows].flatten())
        return total


# --- the language model ----------------------------------------------------------------------------


def known_sentences() -> list[str]:
    """Every caption and word of the tasks, for the tokenizer's training."""
    texts = observations.all_sentences() + [DOT, *NUMBERS.values(), *map(colour_noun, COLOURS)]
    for task in TASKS:
        scenes = scenes_of(task)
        texts += [caption(scene) for scene in scenes[:: max(1, len(scenes) // 150)]]
    texts += [" ".join(words) for words in product((k for k, _ in COLOURS.values()), SHAPES.values(), NUMBERS.values())]
    return texts


def observe(scene: Scene, per_frame: int, rng: np.random.Generator) -> list[Bag]:
    """Observations of an imagined clip: FRAMES × `per_frame` bags of words, in order of time, or shuffled with the
    time named. The number is named, or has to be counted."""
    shuffled, number_named = rng.random(2) < (0.5, 0.6 if per_frame >= 8 else 1.0)
    counting = scene.task == "counting"
    some = int(rng.integers(max(1, per_frame // 3), per_frame + 1))
    covered = rng.permutation(per_frame) < (scene.number if counting and per_frame >= 8 else some)
    dots = rng.permutation(np.flatnonzero(covered))[: max(1, per_frame // 8)]
    bags = []
    for frame, time in enumerate(np.linspace(0, 2, FRAMES)):
        colour, shape = _shown(scene, frame)
        for place in range(per_frame):
            bag: Bag = []
            if covered[place]:
                bag += [(word, 1.0) for word in (COLOURS[colour][0], SHAPES[shape]) if rng.random() < 0.9]
                if scene.task == "detail" and place in dots:
                    bag += [(DOT, 1.0), (colour_noun(scene.other_colour), 1.0)]
            if number_named and scene.task in ("counting", "control") and rng.random() < 0.7:
                bag.append((NUMBERS[scene.number], 1.0))
                if counting:
                    bag.append(("모두", 0.5))
            bag = bag or [(NOTHING, 1.0)]
            if shuffled:
                bag = [*bag, (START, 2 - time), (END, time)]
            bags.append(bag)
    return [bags[i] for i in rng.permutation(len(bags))] if shuffled else bags


def _shown(scene: Scene, frame: int) -> tuple[str, str]:
    """Colour and shape in a frame."""
    if scene.task == "order" and frame >= FRAMES // 2:
        return scene.other_colour, scene.other_shape
    if scene.task == "later" and frame >= LATER:
        return scene.other_colour, scene.shape
    return scene.colour, scene.shape


_TABLES = [scenes_of(task) for task in TASKS]


class KnownLessons(Lessons):
    """Lessons about scenes of all tasks, each task equally often."""

    def _scene(self) -> Scene:
        table = _TABLES[int(self.rng.integers(len(_TABLES)))]
        return table[int(self.rng.integers(len(table)))]

    def _sentence(self) -> str:
        return caption(self._scene())

    def _conversation(self, per_frame: int, ease: float) -> tuple[list, list[bool], list[int]]:
        scene = self._scene()
        bags = observe(scene, per_frame, self.rng)
        hint, frames = _hint(scene)
        return self._compose(observations.PROMPT, caption(scene), bags, hint, frames * per_frame)


def _hint(scene: Scene) -> tuple[str, int]:
    """A word that follows from the observations, and the number of frames that it takes."""
    if scene.task == "counting":
        return NUMBERS[scene.number], 2
    if scene.task in ("control", "order"):
        return COLOURS[scene.colour][0], 2 if scene.task == "control" else LATER
    return colour_noun(scene.other_colour), 2 if scene.task == "detail" else LATER + 1


KNOWN = Subject("known", known_sentences, draw_known_frames, KnownHead, KnownLessons)
"""Of `vlmds sweep --demo --known`."""
