"""`vlmds plan --gpu`: micro-batch, accumulation and activation checkpointing for a card at the same
global batch, with memory and speed predicted from shapes.

Speed is a roofline (Williams et al., CACM 52(4), 2009): a pass over the LLM takes its operations at
EFFICIENCY of the card's peak, or the reading of its weights where that is longer, as it is for few
tokens; NF4 weights are also unpacked in each pass. The host runs ahead of the GPU: a micro-batch
takes as long as the GPU's work, CLIP's included, or the host's (:func:`host_seconds`), whichever is
longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlmds.console.text import counted, size_text
from vlmds.errors import InputError
from vlmds.experiments.schema import Experiment
from vlmds.models.assemble import MetaModels
from vlmds.models.trainable import freeze
from vlmds.planning.cards import Card
from vlmds.planning.flops import sample_flops
from vlmds.planning.memory import (
    TEXT_POSITIONS,
    llm_bytes,
    outside_bytes,
    quantised,
    recompute_interval,
    stage_memories,
)

EFFICIENCY = 0.45
"""Share of a card's peak that long matrix products reach in training. Assumed."""
UNPACKING = 0.5 + 2 + 2
"""Bytes moved for each NF4 weight in a pass: read, written in bfloat16, read again."""
LAUNCH_SECONDS = 5e-6
"""Of the host, to start a kernel. Assumed."""
LAYER_KERNELS = 100
"""Kernels of one layer of the LLM with LoRA in one pass; counted: 102 forward, 136 backward in e7."""
LINEAR_SECONDS = 75e-6
"""Of the host, for one 4-bit Linear with its adapter in one pass beyond launching kernels: Python, PEFT
and bitsandbytes. Assumed; `vlmds bench train` measures it on a GPU."""
CAPTION_POSITIONS = 24


@dataclass(frozen=True)
class Proposal:
    """Settings that fit a card. micro_batch, accumulation: of one GPU. every: activation checkpointing
    of no layer (0) or every n-th. memory: bytes at the peak. rate: samples a second on one GPU,
    predicted."""

    in_4bit: bool
    micro_batch: int
    accumulation: int
    every: int
    memory: float
    rate: float

    @property
    def settings(self) -> str:
        """As values of --set."""
        checkpointing = {0: "false", 1: "true"}.get(self.every, str(self.every))
        return (
            f"llm.load_in_4bit={str(self.in_4bit).lower()} "
            f"training.micro_batch={self.micro_batch} "
            f"training.gradient_accumulation={self.accumulation} "
            f"training.activation_checkpointing={checkpointing}"
        )


def proposals(
    experiment: Experiment, model: MetaModels, card: Card, gpus: int, stored_features: bool
) -> list[Proposal]:
    """The settings that fit the card, for NF4 and whole weights; the fastest first, of equally fast
    ones that with the largest micro-batch. The last stage is predicted, which takes most memory.

    Raises:
        InputError: the GPUs cannot share the global batch.
    """
    training, stage = experiment.training, experiment.stages[-1]
    batch = training.global_batch or training.micro_batch * training.gradient_accumulation * gpus
    if batch % gpus:
        raise InputError(
            f"training.global_batch: {batch} cannot be shared by {counted(gpus, 'GPU')}; change it or --gpus"
        )
    share = batch // gpus
    freeze(model.captioner, stage)
    found = []
    for in_4bit in (True, False):
        for micro_batch in (n for n in range(1, share + 1) if share % n == 0):
            changed = experiment.model_copy(
                update={
                    "llm": experiment.llm.model_copy(update={"load_in_4bit": in_4bit}),
                    "training": training.model_copy(update={"micro_batch": micro_batch}),
                }
            )
            tower = None if stored_features else model.tower
            memories = stage_memories(changed, stage, model.captioner, tower, gpus)
            every = recompute_interval(memories, card.memory - outside_bytes(gpus))
            if every is not None:
                found.append(
                    Proposal(
                        in_4bit,
                        micro_batch,
                        share // micro_batch,
                        every,
                        sum(memories[every].values()),
                        predicted_rate(changed, model, card, every, stored_features),
                    )
                )
    return sorted(found, key=lambda p: (-round(p.rate, 2), -p.micro_batch))


def predicted_rate(experiment: Experiment, model: MetaModels, card: Card, every: int, stored_features: bool) -> float:
    """Samples a second on one GPU of this kind; communication is not counted."""
    size = experiment.training.micro_batch
    positions = model.captioner.projector.num_tokens + TEXT_POSITIONS
    flops = sample_flops(model, positions, CAPTION_POSITIONS, stored_features=stored_features)
    speed = card.flops * EFFICIENCY
    weights = llm_bytes(experiment, model.captioner.llm)
    unpacking = 0.0
    if experiment.llm.load_in_4bit:
        whole = experiment.model_copy(update={"llm": experiment.llm.model_copy(update={"load_in_4bit": False})})
        unpacking = UNPACKING * llm_bytes(whole, model.captioner.llm) / 2 / card.bandwidth
    share = passes(every) - 2
    seconds = size * (flops.clip + flops.projector + flops.head) / speed
    for part, operations in ((1.0, flops.recomputed), (1.0, flops.llm - flops.recomputed), (share, flops.recomputed)):
        seconds += part * (max(size * operations / speed, weights / card.bandwidth) + unpacking)
    return size / max(seconds, host_seconds(experiment, model, passes(every)))


def passes(every: int) -> float:
    """Passes over the LLM in a micro-batch: forward, backward, and the recomputed share of a forward
    pass. every: activation checkpointing of no layer (0) or every n-th."""
    return 2 + (1 / every if every else 0.0)


def host_seconds(experiment: Experiment, model: MetaModels, count: float, linear: float = LINEAR_SECONDS) -> float:
    """Seconds of the host for `count` passes over the LLM, for any size of the micro-batch. linear:
    seconds for each 4-bit Linear."""
    llm: Any = model.captioner.llm
    launching = LAUNCH_SECONDS * LAYER_KERNELS * llm.config.num_hidden_layers
    linears = len(quantised(llm)) if experiment.llm.load_in_4bit else 0
    return count * (launching + linears * linear)


def proposal_table(found: list[Proposal], card: Card, gpus: int, current: Experiment, most: int = 10) -> str:
    """The proposals as a table for a terminal: of each precision the fastest ``most``."""
    if not found:
        return f"{card.name}: nothing fits {card.memory / 1e9:.0f} GB with any micro-batch"
    lines = [
        f"on {card.name} ({card.memory / 1e9:.0f} GB), {gpus} of them, at the same global batch:",
        f"{'weights':<9}{'micro-batch':>12}{'accumulation':>14}{'checkpointing':>15}"
        f"{'memory':>12}{'samples/s a GPU':>17}",
    ]
    shown = [p for in_4bit in (True, False) for p in [q for q in found if q.in_4bit == in_4bit][:most]]
    for p in shown:
        every = {0: "none", 1: "all layers"}.get(p.every, f"1 in {p.every}")
        precision = "NF4" if p.in_4bit else current.llm.dtype.replace("bfloat16", "bf16")
        lines.append(
            f"{precision:<9}{p.micro_batch:>12}{p.accumulation:>14}{every:>15}"
            f"{size_text(p.memory):>12}{p.rate:>17.2f}{'  <- fastest' if p == found[0] else ''}"
        )
    own = [p for p in found if p.in_4bit == current.llm.load_in_4bit]
    if own:
        lines.append(f"fastest with the weights of the experiment: --set {own[0].settings}")
    if not found[0].in_4bit and current.llm.load_in_4bit and own:
        lines.append(
            f"unquantised weights would be {found[0].rate / own[0].rate:.2f} times as fast: --set {found[0].settings}"
        )
    lines.append(
        f"predicted from the model's shapes, assuming {EFFICIENCY:.0%} of the card's peak and "
        f"{1e6 * LINEAR_SECONDS:.0f} µs of host time for each 4-bit Linear in a pass;"
    )
    lines.append("vlmds bench train measures both")
    return "\n".join(lines)
