"""The pre-training texts of the demo's language model.

In the demo a frozen language model must caption from visual tokens, which are mixtures: one token
means "yellow, star, rather left, early" at once. A large language model can read such input; a tiny
one has to learn it. So its pre-training texts are conversations whose user turn has *observations*
of an imagined clip, with several words at one position, mixed by weight:

    처음 0.9 끝 0.1 · 노란 · 별 · 좌 0.8 우 0.2 · 상 0.5 하 0.5

and whose assistant turn answers from them; motion has to be inferred from places over time. All
combinations of attributes are equally frequent: the texts give no information about a real clip.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from vlmds.demo.clips import COLOURS, DIRECTIONS, SHAPE_SIZE, SHAPES, TRAVEL, Attributes, caption, subject, towards
from vlmds.experiments.schema import DataConfig

LEFT, RIGHT, TOP, BOTTOM, START, END, NOTHING = "좌", "우", "상", "하", "처음", "끝", "·"
PROMPT = DataConfig().prompt
FRAMES = 8
IGNORE = -100

Bag = list[tuple[str, float]]
"""The words at one position, with their weights."""


def describe_place(colour: str, shape: str, x: float, y: float) -> str:
    """A still's description, such as "빨간 별 좌 상"; x and y in 0…1, in thirds."""
    across = (LEFT, "가운데", RIGHT)[min(int(x * 3), 2)]
    down = (TOP, "가운데", BOTTOM)[min(int(y * 3), 2)]
    return f"{COLOURS[colour][0]} {SHAPES[shape]} {across} {down}"


def conversations(attributes: Attributes) -> list[tuple[str, str]]:
    """(question, answer) pairs about a clip; the first is the captioning task."""
    colour, direction = COLOURS[attributes.colour][0], DIRECTIONS[attributes.direction][0]
    shape = SHAPES[attributes.shape]
    return [
        (PROMPT, caption(attributes)),
        ("무엇이 보입니까?", f"{colour} {shape}입니다."),
        ("어디로 움직입니까?", f"{towards(direction)} 움직입니다."),
    ]


def sentences(attributes: Attributes) -> list[str]:
    """Sentences in several forms about one clip."""
    colour, direction = COLOURS[attributes.colour][0], DIRECTIONS[attributes.direction][0]
    shape = SHAPES[attributes.shape]
    return [answer for _, answer in conversations(attributes)] + [
        f"{towards(direction)} 움직이는 {colour} {shape}입니다.",
        f"영상에 {colour} {subject(shape)} 있습니다.",
    ]


def all_sentences() -> list[str]:
    """Every text of the demo, for the tokenizer's training."""
    texts = [LEFT, RIGHT, TOP, BOTTOM, START, END, NOTHING, "user\n", "assistant\n", "\n\n"]
    texts += [*SHAPES.values(), *(k for t in (COLOURS, DIRECTIONS) for k, _ in t.values())]
    for names in product(COLOURS, SHAPES, DIRECTIONS):
        attributes = Attributes(*names)
        texts += sentences(attributes)
        texts += [question for question, _ in conversations(attributes)]
    texts += [
        describe_place(colour, shape, x / 3, y / 3)
        for colour, shape, x, y in product(COLOURS, SHAPES, range(3), range(3))
    ]
    return texts


def observe(attributes: Attributes, per_frame: int, ease: float, rng: np.random.Generator) -> list[Bag]:
    """Observations of an imagined clip: FRAMES × `per_frame` bags of words.

    The forms vary, as a projector's output may: in order of time, or shuffled with the time named;
    places named, or the motion itself; few or many empty positions; words missing or wrong. `ease`
    is the difficulty, from 1 (wide motions without gaps) to 0 (all of these variations).
    """
    x, y = _path(attributes.direction, ease, rng)
    shuffled, motion_named, place_everywhere = rng.random(3) < (0.5, 0.2, 0.4)
    keep = max(ease, rng.uniform(0.6, 1.0))
    colour, motion = COLOURS[attributes.colour][0], DIRECTIONS[attributes.direction][0]
    bags = []
    for t, time in enumerate(np.linspace(0, 2, FRAMES)):
        place = [(LEFT, 2 - 2 * x[t]), (RIGHT, 2 * x[t]), (TOP, 2 - 2 * y[t]), (BOTTOM, 2 * y[t])]
        for covered in rng.permutation(per_frame) < rng.integers(1, 5):
            bag: Bag = []
            if covered:
                names = [colour, SHAPES[attributes.shape]]
                if rng.random() > max(ease, 0.95):
                    names = _random_names(rng)
                names += [motion] if motion_named else []
                bag += [(name, 1.0) for name in names if rng.random() < keep]
            else:
                bag.append((NOTHING, 1.0))
            if (covered or place_everywhere) and not motion_named and rng.random() < keep:
                bag += place
            if shuffled:
                bag += [(START, 2 - time), (END, time)]
            bags.append(bag or [(NOTHING, 1.0)])
    if shuffled:
        bags = [bags[i] for i in rng.permutation(len(bags))]
    return bags


def _path(direction: str, ease: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """x and y of a shape's middle in each frame, 0…1, float64 [FRAMES] each."""
    travel = ease * 0.6 + (1 - ease) * rng.uniform(*TRAVEL)
    size = sum(SHAPE_SIZE) / 2
    path = []
    for step in DIRECTIONS[direction][1]:
        start = rng.uniform(size / 2, 1 - size / 2 - travel * abs(step))
        along = start + travel * abs(step) * np.linspace(0, 1, FRAMES)
        path.append(along[::-1] if step < 0 else along)
    return path[0], path[1]


def _random_names(rng: np.random.Generator) -> list[str]:
    return [rng.choice([korean for korean, _ in COLOURS.values()]), rng.choice(list(SHAPES.values()))]


@dataclass
class Batch:
    """One batch of lessons; K words at most share a position.

    ids int64 [B, L, K] and weights float32 [B, L, K]: the words of each position, weight 0 = none;
    noisy bool [B, L]: observations; labels int64 [B, L]: the next token, −100 = no loss.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    noisy: torch.Tensor
    labels: torch.Tensor

    def embed(self, embedding: nn.Embedding, ease: float = 0.0) -> torch.Tensor:
        """Embeddings [B, L, width]; observations get noise and a random scale, because a
        projector's tokens are never exactly the words' embeddings."""
        mixed = (embedding(self.ids) * self.weights[..., None]).sum(dim=2)
        rms = embedding.weight.detach().pow(2).mean().sqrt()
        size = (len(mixed), 1, 1)
        noise = torch.randn_like(mixed) * rms * torch.rand(size) * 0.7 * (1 - ease)
        scale = torch.exp(torch.empty(size).uniform_(-0.7, 2.5))
        return torch.where(self.noisy[..., None], (mixed + noise) * scale, mixed)


class Lessons:
    """An endless source of batches, a pure function of the seed.

    Args:
        tokenizer: any tokenizer with a chat template and "<|video_pad|>".
        texts: more sentences to learn, as plain text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], seed: int):
        self.tokenizer = tokenizer
        self.texts = list(texts)
        self.rng = np.random.default_rng([seed, 2])
        self.pad: Any = tokenizer.convert_tokens_to_ids("<|video_pad|>")
        self.cache: dict[str, list[int]] = {}

    def draw(self, positions: int, ease: float) -> Batch:
        """Lessons of about `positions` positions in all; one in six is plain text, the others are
        conversations. `ease` 1 … 0: see `observe`."""
        odds = np.array([0.25, 0.25, 0.25, 0.15, 0.1]) * (1 - ease) ** np.arange(5)
        per_frame = int(self.rng.choice([1, 2, 4, 8, 16], p=odds / odds.sum()))
        lessons = []
        for number in range(max(6, positions // (FRAMES * per_frame + 24))):
            plain = number % 6 == 0
            lessons.append(self._plain() if plain else self._conversation(per_frame, ease))
        return self._collate(lessons)

    def _attributes(self) -> Attributes:
        names = (COLOURS, SHAPES, DIRECTIONS)
        return Attributes(*(list(table)[self.rng.integers(len(table))] for table in names))

    def _sentence(self) -> str:
        return str(self.rng.choice(sentences(self._attributes())))

    def _ids(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self.cache[text]

    def _plain(self) -> tuple[list, list[bool], list[int]]:
        """Sentences in a row, all supervised: (positions, noisy, labels)."""
        if self.texts and self.rng.random() < 0.5:
            text = self.texts[self.rng.integers(len(self.texts))]
        else:
            text = "\n".join(self._sentence() for _ in range(3))
        ids = self._ids(text) + [self.tokenizer.eos_token_id]
        return [[(i, 1.0)] for i in ids], [False] * len(ids), ids[1:] + [IGNORE]

    def _conversation(self, per_frame: int, ease: float) -> tuple[list, list[bool], list[int]]:
        """Observations and a question. Supervised are the answer and, after two frames, the motion at
        every observation, which few words of an answer name."""
        attributes = self._attributes()
        kind = int(self.rng.choice(3, p=[0.6, 0.1, 0.3]))
        question, answer = conversations(attributes)[kind]
        bags = observe(attributes, per_frame, ease, self.rng)
        return self._compose(question, answer, bags, DIRECTIONS[attributes.direction][0], 2 * per_frame)

    def _compose(
        self, question: str, answer: str, bags: list[Bag], hint: str = "", seen: int = 0
    ) -> tuple[list, list[bool], list[int]]:
        """A conversation about observations. hint: a word that is supervised at every observation but the first
        `seen`; "": none."""
        video = "<|video_pad|>"
        if self.rng.random() < 0.5:
            video = f"<|vision_start|>{video}<|vision_end|>"
        turn = [{"role": "user", "content": video + question}]
        text: Any = self.tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        ids = self._ids(text)
        at = ids.index(self.pad)
        mixed = [[(i, w) for word, w in bag for i in self._ids(word)] for bag in bags]
        ending = self._ids(answer) + [self.tokenizer.eos_token_id]
        plain = [[(i, 1.0)] for i in ids[at + 1 :] + ending]
        positions = [[(i, 1.0)] for i in ids[:at]] + mixed + plain
        noisy = [False] * at + [True] * len(mixed) + [False] * len(plain)
        seen = seen if hint else len(mixed)
        supervised = self._ids(hint)[:1] if hint else [IGNORE]
        labels = [IGNORE] * (at + seen) + supervised * (len(mixed) - seen)
        labels += [IGNORE] * (len(plain) - len(ending) - 1) + ending + [IGNORE]
        return positions, noisy, labels

    def _collate(self, lessons: list[tuple[list, list[bool], list[int]]]) -> Batch:
        length = max(len(positions) for positions, _, _ in lessons)
        widest = max(len(bag) for positions, _, _ in lessons for bag in positions)
        ids = np.zeros((len(lessons), length, widest), np.int64)
        weights = np.zeros(ids.shape, np.float32)
        noisy = np.zeros(ids.shape[:2], bool)
        labels = np.full(ids.shape[:2], IGNORE, np.int64)
        for row, (positions, is_noisy, answers) in enumerate(lessons):
            for column, bag in enumerate(positions):
                for k, (token, weight) in enumerate(bag):
                    ids[row, column, k], weights[row, column, k] = token, weight
            noisy[row, : len(is_noisy)] = is_noisy
            labels[row, : len(answers)] = answers
        return Batch(*(torch.from_numpy(a) for a in (ids, weights, noisy, labels)))
