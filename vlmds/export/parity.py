"""Comparison of an exported model's logits with those of the original model."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmds.console.progress import phase
from vlmds.console.text import counted
from vlmds.data.dataset import open_dataset
from vlmds.data.loader import SampleReader
from vlmds.errors import InputError, SampleError
from vlmds.evaluation.scoring import evaluated_positions
from vlmds.experiments.schema import Experiment
from vlmds.export.processor import user_message
from vlmds.inference.generation import GenerationOptions, generate_captions
from vlmds.models.assemble import Model
from vlmds.models.captioner import IGNORE
from vlmds.models.sequences import SequenceBuilder, TokenSequence

CLIPS = 8


@dataclass(frozen=True)
class Probe:
    """One input for both models. frames: uint8 [F, 3, S, S]. sequence: prompt and caption."""

    frames: np.ndarray
    prompt: str | None
    sequence: TokenSequence


@dataclass(frozen=True)
class Parity:
    """Over all caption tokens of all probes. max_diff: largest absolute difference of a logit.
    top1: share of the tokens at which both models predict the same token. kl: mean
    KL(before || after) of the next-token distributions, in nats."""

    source: str
    clips: int
    tokens: int
    max_diff: float
    top1: float
    kl: float

    def __str__(self) -> str:
        return (
            f"max |logit difference| {self.max_diff:.3g}, same top-1 token {self.top1:.2%}, "
            f"KL {self.kl:.3g} nats ({counted(self.tokens, 'caption token')} of "
            f"{counted(self.clips, 'clip')}, {self.source})"
        )


def make_probes(experiment: Experiment, model: Model) -> tuple[list[Probe], str]:
    """(probes, their source): clips of the run's validation split with their captions where the data
    can be read, else random frames with the model's own captions. The model card quotes the source,
    so it contains no paths."""
    builder = SequenceBuilder(
        model.tokenizer,
        experiment.data.prompt,
        model.captioner.projector.num_tokens,
        experiment.data.max_caption_tokens,
    )
    try:
        samples, split = _dataset_samples(experiment, model.image_size)
    except (InputError, SampleError, OSError) as error:
        with phase("captions of random frames"):
            probes = [
                Probe(frames, None, builder.training(caption or "?"))
                for frames, caption in _random_clips(experiment, model, builder)
            ]
        print(f"vlmds: the logits are compared on random frames: {error}", file=sys.stderr)
        return probes, "random frames, because the run's data could not be read"
    projector = model.captioner.projector
    return [
        Probe(
            s.frames,
            s.prompt,
            builder.training(s.caption, s.prompt, projector.tokens_of(len(s.frames) * projector.patches)),
        )
        for s in samples
    ], f"split {split} of the run's data"


def _dataset_samples(experiment: Experiment, image_size: int):
    dataset = open_dataset(experiment.data)
    if dataset.store == "features":
        raise InputError(f"{dataset.root} contains features, not frames")
    split = "val" if "val" in dataset.splits else dataset.splits[0]
    reader = SampleReader(
        dataset,
        split,
        experiment.data.num_frames,
        image_size,
        shuffle=False,
        decode_seconds=experiment.data.decode_seconds,
        fit=experiment.data.fit,
    )
    return [reader.load(p) for p in evaluated_positions(len(reader), CLIPS)], split


@torch.no_grad()
def _random_clips(experiment, model, builder):
    shape = (experiment.data.num_frames, 3, model.image_size, model.image_size)
    options = GenerationOptions(max_new_tokens=16)
    for seed in range(CLIPS):
        frames = np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)
        features = model.features({"frames": torch.from_numpy(frames[None])})
        yield frames, generate_captions(model, builder, features, [None], options)[0]


@torch.no_grad()
def captioner_logits(model: Model, probe: Probe, device: torch.device) -> Tensor:
    """Logits at the caption tokens, float32 [tokens, vocabulary] on the CPU."""
    ids = torch.tensor([probe.sequence.input_ids], device=device)
    features = model.features({"frames": torch.from_numpy(probe.frames[None])})
    return (
        model.captioner.llm(
            inputs_embeds=model.captioner.embed(features, ids),
            use_cache=False,
            logits_to_keep=supervised(probe.sequence).to(device),
        )
        .logits.float()
        .cpu()
    )


def supervised(sequence: TokenSequence) -> Tensor:
    """The positions that predict a caption token: bool [1, L]."""
    labels = torch.tensor([sequence.labels])
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE) != IGNORE


@torch.no_grad()
def folder_logits(
    folder: Path, probes: list[Probe], builder: SequenceBuilder, device: torch.device, remote: bool
) -> Iterator[Tensor]:
    """As :func:`captioner_logits` of each probe, by the model and processor that transformers loads
    from an exported folder.

    Raises:
        InputError: a prompt contains the image token.
    """
    options = {"trust_remote_code": True} if remote else {}
    processor = AutoProcessor.from_pretrained(folder, **options)
    model = AutoModelForImageTextToText.from_pretrained(folder, **options)
    model.to(device).eval()  # type: ignore[arg-type]  # their decorator loses self
    for probe in probes:
        text = processor.apply_chat_template(
            user_message(probe.prompt or builder.prompt, len(probe.frames)), add_generation_prompt=True
        )
        images = [Image.fromarray(np.ascontiguousarray(f.transpose(1, 2, 0))) for f in probe.frames]
        inputs = processor(images=images, text=text, return_tensors="pt").to(device)
        caption = [i for i in probe.sequence.labels if i != IGNORE]
        ids = torch.cat([inputs["input_ids"], torch.tensor([caption], device=device)], dim=1)
        if ids.shape[1] != len(probe.sequence.input_ids):
            raise InputError(
                f"the prompt {probe.prompt!r} of a clip contains {processor.image_token}, which stands for "
                "a visual token; remove it from the data"
            )
        logits = model(
            input_ids=ids,
            pixel_values=inputs["pixel_values"],
            use_cache=False,
            logits_to_keep=supervised(probe.sequence).to(device),
        ).logits
        yield logits.float().cpu()


def compare_logits(before: Sequence[Tensor], after: Iterable[Tensor], source: str) -> Parity:
    """before, after: logits of each probe by the two models, float32 [tokens, vocabulary]."""
    difference = kl = 0.0
    same = tokens = 0
    with phase("logits after folding", unit="clips") as shown:
        for ours, theirs in zip(shown.counting(before), after, strict=True):
            difference = max(difference, (ours - theirs).abs().max().item())
            same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            a, b = (F.log_softmax(x.double(), dim=-1) for x in (ours, theirs))
            kl += float((a.exp() * (a - b)).sum())
            tokens += len(ours)
    return Parity(
        source, len(before), tokens, difference, same / tokens, max(kl / tokens, 0.0)
    )  # rounding can take it below
