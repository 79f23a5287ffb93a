"""Early signs that a stage does not learn from the video: what the video is worth in validation, and a
training loss that does not fall.

The worth is measured on clips that lie far apart in split val: the loss with another clip's video, less the
loss with the clip's own. A clip takes two forward passes there, and at least as much in training, so a
stage measures at most ``BUDGET`` of the clips it trains on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmds.data.loader import Batches, SampleReader
from vlmds.distributed.ranks import gather, raise_together
from vlmds.evaluation.scoring import evaluated_positions
from vlmds.models.assemble import Model
from vlmds.models.captioner import IGNORE
from vlmds.models.dora import norms_kept

FLOOR = 0.02
"""Nats per caption token below which the video counts as unused."""
BUDGET = 0.01
"""Largest share of a stage's training samples that its measurements may take."""
MIN_CLIPS, MAX_CLIPS = 8, 64
"""Clips of one measurement; with fewer than the first there is none."""
MIN_WINDOW, MIN_FALL = 20, 0.01
"""Steps of the windows in which training losses are compared; the fall that is expected, as a share."""

CAUSES = {
    "en": "likely causes: a learning rate too high or too low, too few steps, or a part that is frozen or not connected",
    "ko": "가능한 원인: 학습률이 너무 높거나 낮음, 학습 스텝 부족, 동결되었거나 연결되지 않은 모듈",
}


@dataclass(frozen=True)
class VideoWorth:
    """What the video is worth, in nats per caption token, with its standard error over the clips."""

    value: float
    error: float
    clips: int

    @property
    def doubtful(self) -> bool:
        """Whether it is below the floor, or within two standard errors of 0."""
        return not self.value >= max(FLOOR, 2 * self.error)

    def warning(self) -> dict[str, str]:
        """In English ("en") and Korean ("ko")."""
        found = f"{self.value:.3f} ± {self.error:.3f}"
        return {
            "en": f"the model may not use the video: its own video is worth {found} nats/token more than another "
            f"clip's ({self.clips} clips; expected: at least {FLOOR} and two standard errors); {CAUSES['en']}",
            "ko": f"모델이 영상을 활용하지 않을 수 있습니다: 원래 영상의 기여는 토큰당 {found} nat입니다 "
            f"(클립 {self.clips}개, 기준: {FLOOR} 이상이면서 표준 오차의 2배 이상). {CAUSES['ko']}",
        }


def checked_step(total: int, validate_every: int, share: float) -> int:
    """The first validation after ``share`` of the stage's ``total`` steps."""
    return min(math.ceil(share * total / validate_every) * validate_every or validate_every, total)


def clips_to_measure(step: int, total: int, global_batch: int, validate_every: int, share: float | None) -> int:
    """How many clips the validation after ``step`` measures; 0 is none. A stage too short to do it in every
    validation within the budget does it in the one of :func:`checked_step` only."""
    if share is None:
        return 0
    budget = BUDGET * total * global_batch
    each = int(budget / math.ceil(total / validate_every))
    if each < MIN_CLIPS:
        each = int(budget) if step == checked_step(total, validate_every, share) else 0
    return min(each, MAX_CLIPS) if each >= MIN_CLIPS else 0


@torch.no_grad()
def video_worth(
    model: Model,
    reader: SampleReader,
    collate: Callable[[list], dict],
    *,
    clips: int,
    batch_size: int,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    activity: Callable[[int, int], None] = lambda number, count: None,
) -> VideoWorth | None:
    """Measure it on all ranks together; None with fewer than two clips whose captions differ. The model's mode and
    the random state do not change, and the result does not depend on the number of ranks.

    Args:
        reader: unshuffled, of split val. collate: see :func:`vlmds.data.loader.training_collate`.
        clips: evenly spaced. batch_size: at least two are used. activity: called before each batch.

    Raises:
        InputError: on all ranks, if a batch cannot be read.
    """
    positions = evaluated_positions(len(reader), clips)
    count = max(1, len(positions) // max(2, batch_size))
    # The clips of a batch lend each other their videos: far apart, they are of different sources.
    batches = [positions[number::count] for number in range(count)][rank::world_size]
    pairs: list[tuple[float, int]] = []
    failures = []
    captioner, was_training = model.captioner, model.captioner.training
    captioner.eval()
    try:
        with torch.random.fork_rng(devices=[]), norms_kept():  # a DataLoader draws from the CPU's generator
            for number, batch in enumerate(Batches(reader, batches, collate, num_workers), 1):
                activity(number, len(batches))
                if "failure" in batch:
                    failures.append(batch["failure"])
                    break
                pairs += _gains(model, batch)
    finally:
        captioner.train(was_training)
    everyone = gather((pairs, failures))
    raise_together(sum(bool(failed) for _, failed in everyone), failures)
    return summarised([pair for found, _ in everyone for pair in found])


def summarised(pairs: list[tuple[float, int]]) -> VideoWorth | None:
    """From the gain in nats and the caption tokens of each clip."""
    n, tokens = len(pairs), sum(count for _, count in pairs)
    if n < 2:
        return None
    value = math.fsum(gain for gain, _ in pairs) / tokens  # fsum: the order of the ranks does not matter
    squares = math.fsum((gain - value * count) ** 2 for gain, count in pairs)
    return VideoWorth(value, math.sqrt(squares * n / (n - 1)) / tokens, n)


def _gains(model: Model, batch: dict) -> list[tuple[float, int]]:
    """(gain in nats, caption tokens) of each clip with the next one's video; clips with the same caption as the
    next one are left out."""
    features, ids, labels = model.features(batch), batch["input_ids"], batch["labels"]
    if not isinstance(features, Tensor):  # clips and still pictures cannot lend each other their visual tokens
        return []
    sums = []
    for seen in (features, features.roll(-1, 0)):
        losses, rows = model.captioner.token_losses(seen, ids, labels)
        totals = torch.zeros(len(ids), dtype=torch.float64)
        sums.append(totals.index_add_(0, rows.cpu(), losses.double().cpu()))
    differ = (labels != labels.roll(-1, 0)).any(1)
    tokens = (labels != IGNORE).sum(1)
    return list(zip((sums[1] - sums[0])[differ].tolist(), tokens[differ].tolist(), strict=True))


def stalled(records: Iterable[Mapping], stage: str, step: int, total: int) -> dict[str, str] | None:
    """A warning, in English ("en") and Korean ("ko"), if the training loss did not fall between the last two quarters
    of the stage before ``step``; None also where quarters are short or losses are missing.

    Args:
        records: of metrics.jsonl.
    """
    window = total // 4
    losses = {
        r["step"]: r["loss"] for r in records if r["kind"] == "train" and r["stage"] == stage and r["loss"] is not None
    }
    parts = [[losses[s] for s in range(end - window + 1, end + 1) if s in losses] for end in (step - window, step)]
    if window < MIN_WINDOW or min(map(len, parts)) < MIN_WINDOW:
        return None
    before, after = (torch.tensor(part, dtype=torch.float64) for part in parts)
    fall = float(before.mean() - after.mean())
    error = float((before.var() / len(before) + after.var() / len(after)).sqrt())
    if fall >= max(MIN_FALL * float(before.mean()), error):
        return None
    first, last = f"{before.mean():.4f}", f"{after.mean():.4f}"
    return {
        "en": f"the training loss stands still: {first} in the {window} steps to {step - window}, {last} in those to "
        f"{step}; {CAUSES['en']}",
        "ko": f"학습 손실이 줄지 않습니다: {step - window} 스텝까지 {window} 스텝의 평균 {first}, {step} 스텝까지 {last}. "
        f"{CAUSES['ko']}",
    }
