"""`vlmds plan`: what an experiment will be, at full size and without weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, CLIPVisionModel

from vlmds.config import Experiment
from vlmds.data.dataset import Dataset, open_dataset
from vlmds.data.prompt import SequenceBuilder
from vlmds.errors import InputError
from vlmds.models.assemble import experiment_projector
from vlmds.models.captioner import IGNORE, VISUAL, Captioner
from vlmds.models.language import add_adapter, load_tokenizer
from vlmds.models.pretrained import published_or_loaded_config
from vlmds.models.vision import vision_half
from vlmds.training.stages import freeze, stage_steps

EXAMPLE_CAPTION = "한 남자가 공원에서 강아지와 산책하고 있습니다."


@dataclass
class Shapes:
    """The experiment's models on the meta device: shapes without storage. The captioner carries
    the adapter."""

    tower: nn.Module
    captioner: Captioner


def shapes(experiment: Experiment) -> Shapes:
    """Build the models without their weights.

    Raises:
        InputError: a model's configuration cannot be loaded, or parts do not fit.
    """
    vision = vision_half(published_or_loaded_config(experiment.vision.model, "vision.model"),
                         experiment.vision.model)
    language = published_or_loaded_config(experiment.llm.model, "llm.model")
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(language).requires_grad_(False)
        captioner = Captioner(experiment_projector(experiment, vision, language), llm)
        captioner.llm = add_adapter(llm, experiment.peft)
        return Shapes(CLIPVisionModel(vision), captioner)


def plan(experiment: Experiment) -> str:
    """The report: parameters, visual tokens, steps per stage, one sample with its loss mask.

    Raises:
        InputError: see :func:`shapes`; or data.path is given and holds no dataset.
    """
    model = shapes(experiment)
    sections = [_heading(experiment), _parameters(experiment, model),
                _schedule(experiment), _sample(experiment, model.captioner.projector.num_tokens)]
    return "\n\n".join(sections)


def _heading(experiment: Experiment) -> str:
    precision = "NF4" if experiment.llm.load_in_4bit else experiment.llm.dtype
    return (f"{experiment.name}: {experiment.vision.model} -> {experiment.projector.type} -> "
            f"{experiment.llm.model} ({precision}) with {experiment.peft.type.upper()}")


def _parameters(experiment: Experiment, model: Shapes) -> str:
    adapter = sum(p.numel() for n, p in model.captioner.llm.named_parameters() if "lora_" in n)
    parts = {  # name: (parameters, what a stage's `train` calls it)
        "vision": (_count(model.tower), None),
        "projector": (_count(model.captioner.projector), "projector"),
        "llm": (_count(model.captioner.llm) - adapter, None),
        experiment.peft.type: (adapter, "peft"),
    }
    stages = experiment.stages
    lines = [f"{'part':<12}{'parameters':>16}" + "".join(
        f"{'trained in ' + s.name:>26}" for s in stages)]
    trained = [_trained(stage, model.captioner) for stage in stages]
    for name, (count, section) in parts.items():
        cells = "".join(f"{t.get(section, 0):>26,}" for t in trained)
        lines.append(f"{name:<12}{count:>16,}{cells}")
    projector = model.captioner.projector
    frames = f"{projector.num_frames} frames x {projector.patches} patches"
    lines.append("")
    lines.append(f"visual tokens per clip: {projector.num_tokens:,}  ({frames}"
                 f" = {projector.num_frames * projector.patches:,} features)")
    return "\n".join(lines)


def _trained(stage, captioner: Captioner) -> dict[str, int]:
    """Trainable parameters in a stage, by what its `train` calls them."""
    freeze(captioner, stage)
    return {
        "projector": sum(p.numel() for p in captioner.projector.parameters() if p.requires_grad),
        "peft": sum(p.numel() for p in captioner.llm.parameters() if p.requires_grad),
    }


def _schedule(experiment: Experiment) -> str:
    training = experiment.training
    dataset = open_dataset(experiment.data) if experiment.data.path or experiment.data.blend else None
    batch, how = training.global_batch, "training.global_batch"
    if batch is None:
        batch = training.micro_batch * training.gradient_accumulation
        how = (f"micro_batch {training.micro_batch} x gradient_accumulation "
               f"{training.gradient_accumulation}, on one GPU")
    lines = [f"global batch: {batch} ({how})"]
    for stage in experiment.stages:
        length = f"{stage.steps:,} steps" if stage.steps else f"{stage.epochs:g} epochs"
        if dataset and not stage.steps:
            samples = dataset.count("train")
            steps = stage_steps(stage, samples, batch)
            length += f" of {samples:,} samples = {steps:,} steps"
        lines.append(f"stage {stage.name}: trains {' and '.join(stage.train)}, lr {stage.lr:g}, "
                     f"{length}")
    if dataset is None:
        lines.append("steps of stages given in epochs need the data: pass --data DIR")
    else:
        lines.append(_splits(dataset))
    return "\n".join(lines)


def _splits(dataset: Dataset) -> str:
    counts = ", ".join(f"{split} {dataset.count(split):,}" for split in dataset.splits)
    return f"data: {dataset.root} ({dataset.store} store; {counts})"


def _sample(experiment: Experiment, visual_tokens: int) -> str:
    """One sample as the model sees it, run by run of equal kind, with where loss falls."""
    try:
        tokenizer = load_tokenizer(experiment.llm.model, local_files_only=True)
    except InputError:
        return (f"sample: not shown, the tokenizer of {experiment.llm.model} is not on this machine "
                "(tokenizer files are enough, weights are not needed)")
    builder = SequenceBuilder(tokenizer, experiment.data.prompt, visual_tokens,
                              experiment.data.max_caption_tokens)
    sequence = builder.training(EXAMPLE_CAPTION)
    runs: list[tuple[str, list[int]]] = []
    for token, label in zip(sequence.input_ids, sequence.labels, strict=True):
        kind = "visual" if token == VISUAL else "loss" if label != IGNORE else "-"
        if not runs or runs[-1][0] != kind:
            runs.append((kind, []))
        runs[-1][1].append(token)
    lines = [f"sample: {len(sequence.input_ids):,} positions; loss falls on the lines marked 'loss'"]
    for kind, tokens in runs:
        text = "(visual tokens)" if kind == "visual" else repr(builder.tokenizer.decode(tokens))
        lines.append(f"  {kind:<7}{len(tokens):>6,}  {text}")
    return "\n".join(lines)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
