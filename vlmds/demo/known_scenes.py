"""Scenes of the known-truth sweep: five tasks, their captions, the parser of captions, and the splits.

Each task asks for one thing that only the video shows (`answer`). The scenes of the tasks order and later
come in sets: clips that a limited model cannot tell apart, with different answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from vlmds.demo.clips import COLOURS, SHAPES, final_consonant, subject, towards

TASKS = ("control", "order", "later", "counting", "detail")
KNOWN_SHAPES = ("circle", "square", "triangle", "cross")  # that differ also at 14 pixels
NUMBERS = {1: "한", 2: "두", 3: "세", 4: "네", 5: "다섯"}
PAIRS = tuple(product(COLOURS, KNOWN_SHAPES))
"""All colours with all shapes."""


@dataclass(frozen=True)
class Scene:
    """What a caption names, by names of `COLOURS` and `KNOWN_SHAPES`.

    order: colour and shape come first, then other_colour and other_shape. later: the shape becomes
    other_colour. counting: so many of them. detail: a small dot of other_colour. "" and 1: not of the task.
    """

    task: str
    colour: str
    shape: str
    other_colour: str = ""
    other_shape: str = ""
    number: int = 1

    @property
    def answer(self) -> tuple:
        """What the task asks for."""
        return {
            "control": (self.colour, self.shape),
            "order": (self.colour, self.shape, self.other_colour, self.other_shape),
            "later": (self.other_colour,),
            "counting": (self.number,),
            "detail": (self.other_colour,),
        }[self.task]


# --- captions ---------------------------------------------------------------------------------


def colour_noun(colour: str) -> str:
    """The colour as a noun: 빨간색, 초록색."""
    korean = COLOURS[colour][0]
    return korean if korean.endswith("색") else korean + "색"


def topic(word: str) -> str:
    """`word` with the topic particle: 원은, 십자가는."""
    return word + ("은" if final_consonant(word) else "는")


def caption(scene: Scene) -> str:
    """The sentence that describes a scene."""
    colour, shape = COLOURS[scene.colour][0], SHAPES[scene.shape]
    if scene.task == "control":
        return f"{colour} {subject(shape)} 있습니다."
    if scene.task == "order":
        other = f"{COLOURS[scene.other_colour][0]} {subject(SHAPES[scene.other_shape])}"
        return f"먼저 {colour} {subject(shape)} 나오고 다음에 {other} 나옵니다."
    if scene.task == "later":
        return f"{colour} {subject(shape)} {towards(colour_noun(scene.other_colour))} 변합니다."
    if scene.task == "counting":
        return f"{colour} {subject(shape)} 모두 {NUMBERS[scene.number]} 개 있습니다."
    return f"{colour} {shape} 안에 {COLOURS[scene.other_colour][0]} 점이 있습니다."


def _patterns() -> dict[str, re.Pattern]:
    colour = "|".join(korean for korean, _ in COLOURS.values())
    noun = "|".join(map(colour_noun, COLOURS))
    shape = "|".join(SHAPES[name] for name in KNOWN_SHAPES)
    number = "|".join(NUMBERS.values())
    thing = f"(?P<colour>{colour}) (?P<shape>{shape})"
    other = f"(?P<other_colour>{colour}) (?P<other_shape>{shape})"
    texts = {
        "control": f"{thing}[이가] 있습니다",
        "order": f"먼저 {thing}[이가] 나오고 다음에 {other}[이가] 나옵니다",
        "later": f"{thing}[이가] (?P<other_colour>{noun})(?:으로|로) 변합니다",
        "counting": f"{thing}[이가] 모두 (?P<number>{number}) 개 있습니다",
        "detail": f"{thing} 안에 (?P<other_colour>{colour}) 점이 있습니다",
    }
    return {task: re.compile(text + r"\.?") for task, text in texts.items()}


_PATTERNS = _patterns()
_NAMES = {korean: name for name, (korean, _) in COLOURS.items()} | {colour_noun(name): name for name in COLOURS}
_NAMES |= {SHAPES[name]: name for name in KNOWN_SHAPES}
_COUNTS = {korean: number for number, korean in NUMBERS.items()}


def parse(text: str) -> Scene | None:
    """The scene that a caption describes, also with a wrong particle; None: not a sentence of these tasks."""
    plain = " ".join(text.split())
    for task, pattern in _PATTERNS.items():
        if found := pattern.fullmatch(plain):
            words = found.groupdict()
            number = _COUNTS[words.pop("number")] if "number" in words else 1
            return Scene(task, number=number, **{key: _NAMES[word] for key, word in words.items()})
    return None


def right(text: str, truth: Scene) -> bool:
    """Whether a caption gives the answer that the scene's task asks for."""
    found = parse(text)
    return found is not None and found.task == truth.task and found.answer == truth.answer


# --- splits -----------------------------------------------------------------------------------


def scenes_of(task: str) -> list[Scene]:
    """Every scene of a task."""
    found = []
    for colour, shape in PAIRS:
        scene = Scene(task, colour, shape)
        others = [name for name in COLOURS if name != colour]
        if task == "control":
            found.append(scene)
        elif task == "counting":
            found += [replace(scene, number=number) for number in NUMBERS]
        elif task == "order":
            found += [replace(scene, other_colour=c, other_shape=s) for c, s in PAIRS if (c, s) != (colour, shape)]
        else:
            found += [replace(scene, other_colour=other) for other in others]
    return found


def held_out(scene: Scene) -> bool:
    """Whether the scene is of split val, as a third is. These form a Latin pattern over colours and shapes, shifted
    from task to task: a pair that one task holds out is in the training clips of the others. All scenes of a
    set are of the same split."""
    colours, total = list(COLOURS), 0
    pairs = [(scene.colour, scene.shape)]
    if scene.task == "order":
        pairs.append((scene.other_colour, scene.other_shape))
    for colour, shape in pairs:
        total += colours.index(colour) + KNOWN_SHAPES.index(shape)
    return (total + TASKS.index(scene.task)) % 3 == 0


def indistinguishable(scene: Scene) -> tuple[Scene, ...]:
    """The set of a scene: scenes that differ only in what a limited model does not get.

    order: both orders, which are the same to a model without time. later: all later colours, which are the same to
    a model of the first half. The other tasks have no limited model: the scene alone.
    """
    if scene.task == "order":
        swapped = Scene("order", scene.other_colour, scene.other_shape, scene.colour, scene.shape)
        return scene, swapped
    if scene.task == "later":
        return tuple(replace(scene, other_colour=name) for name in COLOURS if name != scene.colour)
    return (scene,)


def chance(task: str) -> float:
    """The largest share of answers that a model gets right which gives the same answer to all clips of a set; for a
    task without sets, of guessing the task's answer."""
    return {
        "control": 1 / len(PAIRS), "order": 1 / 2, "later": 1 / (len(COLOURS) - 1), "counting": 1 / len(NUMBERS),
        "detail": 1 / (len(COLOURS) - 1),
    }[task]  # fmt: skip


def sets_of_split(task: str, split: str, clips: int, seed: int) -> list[tuple[Scene, ...]]:
    """Sets of about `clips` clips of a task, every scene about equally often, in a random order.

    Args:
        clips: rounded down to whole sets.
    """
    sets = {frozenset(indistinguishable(s)): indistinguishable(s) for s in scenes_of(task)}
    chosen = [own for own in sets.values() if held_out(own[0]) == (split == "val")]
    rng = np.random.default_rng([seed, TASKS.index(task), split == "val"])
    order: list[int] = []
    size = len(chosen[0])
    while len(order) < clips // size:
        order += rng.permutation(len(chosen)).tolist()
    return [chosen[number] for number in order[: clips // size]]


def distinct_captions(scenes: Sequence[Scene]) -> int:
    return len({caption(scene) for scene in scenes})
