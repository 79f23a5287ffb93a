"""`vlmds plan`: the size, memory, steps and data of an experiment, at full size and without weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from vlmds.console.text import counted, size_text
from vlmds.data.alike import converted, tower_keys
from vlmds.data.coverage import coverage_lines
from vlmds.data.dataset import Dataset, open_given, stages_with
from vlmds.data.features import needs_tower
from vlmds.data.index import SampleRow
from vlmds.data.stored import read_description
from vlmds.errors import InputError, SampleError
from vlmds.experiments.schedule import accumulation_steps, describe_batch, stage_steps
from vlmds.experiments.schema import Experiment, StageConfig
from vlmds.models.assemble import MetaModels, meta_models
from vlmds.models.captioner import IGNORE, VISUAL, Captioner
from vlmds.models.fetch import presence
from vlmds.models.language import load_tokenizer
from vlmds.models.sequences import SequenceBuilder
from vlmds.models.trainable import freeze
from vlmds.planning.cards import find_card
from vlmds.planning.memory import USABLE, checkpoint_bytes, outside_bytes, stage_memory
from vlmds.planning.prices import cheapest, needs, prices
from vlmds.planning.propose import predicted_rate, proposal_table, proposals
from vlmds.planning.start_checks import check_experiment, check_initial, sequence_builder, training_reader
from vlmds.runs.initial import InitialProjector, initial_projector
from vlmds.video.fit import RESIZERS
from vlmds.video.sampling import sample_times

CORES_PER_GPU = 8.0
ASSUMED_CARD = "h100"
"""The card whose predicted rate is used if the rate is unknown: a fast one, as its number of cores
is enough for slower ones too."""
EXAMPLE_CAPTION = "한 남자가 공원에서 강아지와 산책하고 있습니다."


def plan_experiment(
    experiment: Experiment,
    gpus: int = 1,
    samples_per_second: float | None = None,
    cores_per_gpu: float = CORES_PER_GPU,
    gpu: str | None = None,
) -> str:
    """The report: parameters, visual tokens, memory, steps per stage, the cost of each store, one
    sample with its loss mask.

    Args:
        gpus: number of ranks.
        samples_per_second: training speed of one GPU, if it is known.
        cores_per_gpu: CPU cores that may decode for one GPU.
        gpu: name of a card, to propose settings for it.

    Raises:
        InputError: an unknown card, no dataset at data.path, and what :func:`meta_models` and
            :func:`check_experiment` refuse, as training does.
    """
    for name, value in (
        ("--gpus", gpus),
        ("--samples-per-second", samples_per_second),
        ("--cores-per-gpu", cores_per_gpu),
    ):
        if value is not None and value <= 0:
            raise InputError(f"{name}: {value} must be more than 0")
    card = find_card(gpu) if gpu else None
    datasets = open_given(experiment)
    stored = not any(dataset is None or dataset.store != "features" for dataset in datasets)
    model = meta_models(experiment)
    initial = initial_projector(experiment)
    check_experiment(experiment, model, datasets, gpus, initial)
    if initial is not None:
        check_initial(initial, experiment, datasets)
    sections = [
        _heading(experiment),
        _presence(experiment, initial),
        _parameters(experiment, model),
        _memory(experiment, model, gpus, datasets),
    ]
    found = proposals(experiment, model, card, gpus, stored) if card else []
    if card:
        sections.append(proposal_table(found, card, gpus, experiment))
    rate, how = samples_per_second, "given"
    if rate is None and card and found:
        rate, how = found[0].rate, f"predicted for the fastest settings on {card.name}"
    hours = rate  # unknown with an assumed card
    if rate is None:
        freeze(model.captioner, experiment.stages[-1])
        assumed = find_card(ASSUMED_CARD)
        rate = predicted_rate(experiment, model, assumed, 0, stored)
        how = f"predicted on {assumed.name}; give --gpu, or --samples-per-second if you know it"
    return "\n\n".join(
        [
            *sections,
            _schedule(experiment, datasets, gpus, hours),
            *(_stores(experiment, model, dataset, rate, how, cores_per_gpu) for dataset in stages_with(datasets)),
            *(
                _sample(experiment, model, dataset, numbers[0] if len(stages_with(datasets)) > 1 else None)
                for dataset, numbers in stages_with(datasets).items()
            ),
        ]
    )


def _heading(experiment: Experiment) -> str:
    precision = "NF4" if experiment.llm.load_in_4bit else experiment.llm.dtype
    return (
        f"{experiment.name}: {experiment.vision.model} -> {experiment.projector.type} -> "
        f"{experiment.llm.model} ({precision}) with {experiment.peft.type.upper()}"
    )


def _presence(experiment: Experiment, initial: InitialProjector | None) -> str:
    """The models: on this machine, or how much is to be downloaded; and the projector that the run starts from."""
    lines = ["models"]
    for section in (experiment.vision, experiment.llm):
        found = presence(section)
        lines.append(f"  {section.model}: {found.text}")
    if initial is not None:
        lines.append(f"  {initial}")
    return "\n".join(lines)


def _parameters(experiment: Experiment, model: MetaModels) -> str:
    adapter = sum(p.numel() for n, p in model.captioner.llm.named_parameters() if "lora_" in n)
    parts: dict[str, tuple[int, str]] = {  # name: (parameters, name in a stage's `train`)
        "vision": (_count(model.tower), ""),
        "projector": (_count(model.captioner.projector), "projector"),
        "llm": (_count(model.captioner.llm) - adapter, ""),
        experiment.peft.type: (adapter, "peft"),
    }
    stages = experiment.stages
    lines = [f"{'part':<12}{'parameters':>16}" + "".join(f"{'trained in ' + s.name:>26}" for s in stages)]
    trained = [_trained(stage, model.captioner) for stage in stages]
    for name, (count, section) in parts.items():
        cells = "".join(f"{t.get(section, 0):>26,}" for t in trained)
        lines.append(f"{name:<12}{count:>16,}{cells}")
    projector = model.captioner.projector
    frames = f"{projector.num_frames} frames x {projector.patches} patches"
    lines.append("")
    lines.append(
        f"visual tokens per clip: {projector.num_tokens:,}  ({frames}"
        f" = {projector.num_frames * projector.patches:,} features)"
    )
    return "\n".join(lines)


def _trained(stage: StageConfig, captioner: Captioner) -> dict[str, int]:
    """Trainable parameters in a stage, by their names in its `train`."""
    freeze(captioner, stage)
    return {
        "projector": sum(p.numel() for p in captioner.projector.parameters() if p.requires_grad),
        "peft": sum(p.numel() for p in captioner.llm.parameters() if p.requires_grad),
    }


def _memory(experiment: Experiment, model: MetaModels, gpus: int, datasets: Sequence[Dataset | None]) -> str:
    """Bytes per GPU and stage, by part, and the size of a checkpoint."""
    tower = model.tower if needs_tower(experiment, datasets) else None
    columns, checkpoints = [], []
    for stage in experiment.stages:
        freeze(model.captioner, stage)
        columns.append(stage_memory(experiment, stage, model.captioner, tower, gpus))
        checkpoints.append(checkpoint_bytes(experiment, model.captioner))
    training = experiment.training
    every = training.activation_checkpointing
    recompute = {True: "full", False: "no", "auto": "full (auto takes less where it fits)"}.get(
        every, f"every {every}th layer's"
    )
    ranks = "1 GPU" if gpus == 1 else f"each of {gpus} GPUs"
    lines = [f"{f'memory of {ranks}':<28}" + "".join(f"{s.name:>12}" for s in experiment.stages)]
    # A stage may lack a part, such as DoRA's norms where it has no adapter.
    rows = {
        part: [column.get(part, 0) for column in columns]
        for part in dict.fromkeys(part for column in columns for part in column)
    }
    rows |= {"sum": [sum(column.values()) for column in columns], "checkpoint on disk": checkpoints}
    for name, sizes in rows.items():
        lines.append(f"{name:<28}" + "".join(f"{size_text(size):>12}" for size in sizes))
    lines.append(
        f"assumes ZeRO-2, micro-batch {training.micro_batch}, {recompute} activation checkpointing, "
        f"captions of {experiment.data.max_caption_tokens} tokens;"
    )
    lines.append("gradient buckets reuse the activations' memory, only the excess is counted; activations, logits and")
    outside = "CUDA's context and workspaces" if gpus == 1 else ("CUDA's context, workspaces and NCCL's communicators")
    lines.append(f"CLIP forward are estimates; {outside} (assumed: {size_text(outside_bytes(gpus))}) and")
    lines.append(f"fragmentation (assumed: {1 - USABLE:.0%}) come on top")
    return "\n".join(lines)


def _stores(
    experiment: Experiment, model: MetaModels, dataset: Dataset | None, rate: float, how: str, cores: float
) -> str:
    """The cost of each store, and the cheapest that keeps the GPUs busy."""
    vision: Any = model.tower.config
    projector = model.captioner.projector
    found = prices(
        dataset.parts if dataset else [],
        projector.num_frames,
        vision.image_size,
        projector.patches,
        vision.hidden_size,
        experiment.data.fit,
    )
    samples = sum(map(dataset.count, dataset.splits)) if dataset else None
    rows = needs(found, rate, samples)
    of = counted(samples, "sample") if samples is not None else "per 10,000 samples"
    own = f" of {dataset.key}" if dataset and dataset.key != "data" else ""
    lines = [
        f"stores{own} at {rate:.3g} samples/s per GPU ({how})",
        f"{'store':<22}{'a sample':>12}{of:>22}{'core-ms a sample':>18}{'cores a GPU':>13}{'read a GPU':>14}  figures",
    ]
    for need in rows:
        total = need.total if need.total is not None else 10_000 * need.price.bytes
        lines.append(
            f"{need.price.name:<22}{size_text(need.price.bytes):>12}{size_text(total):>22}"
            f"{1e3 * need.price.seconds:>18.2f}{need.cores:>13.2f}{size_text(need.read) + '/s':>14}"
            f"  {need.price.origin}"
        )
    best = cheapest(rows, cores)
    if dataset is None:
        lines.append("which store is best depends on the data: pass --data DIR")
    elif best is None:
        lines.append(f"no store keeps a GPU busy with {cores:g} cores per GPU")
    else:
        store = best.price.store
        lines.append(f"cheapest store that keeps the GPUs busy with {cores:g} cores per GPU: {store}")
        if store != dataset.store:
            like = {
                "store": store,
                "num_frames": projector.num_frames,
                "image_size": vision.image_size,
                "resizer": RESIZERS[experiment.data.fit],
                "vision": tower_keys(experiment.vision),
            }
            for number, part in enumerate(dataset.parts):
                command, out = converted(part, like)
                use = f"name {out} in {dataset.key}.blend.{number}.path"
                if dataset.weights is None:
                    use = f"pass --data {out}" if dataset.key == "data" else f"name {out} in {dataset.key}.path"
                lines += [f"  {command}", f"  then {use}"]
    return "\n".join(lines)


def _schedule(experiment: Experiment, datasets: Sequence[Dataset | None], gpus: int, rate: float | None) -> str:
    """Global batch, steps and hours of each stage, and the data. rate: samples a second on one GPU, if
    it is known. Raises InputError if the GPUs cannot share the global batch."""
    lines = [describe_batch(experiment, gpus)]
    batch = experiment.training.micro_batch * accumulation_steps(experiment, gpus, None) * gpus
    for stage, dataset in zip(experiment.stages, datasets, strict=True):
        steps = stage.steps
        length = counted(stage.steps, "step") if stage.steps else counted(stage.epochs or 0, "epoch")
        if dataset and not stage.steps:
            samples = dataset.count("train")
            steps = stage_steps(stage, samples, batch)
            length += f" of {counted(samples, 'sample')} = {counted(steps, 'step')}"
        if steps and rate:
            length += f", about {steps * batch / (rate * gpus) / 3600:,.1f} h"
        lines.append(f"stage {stage.name}: trains {' and '.join(stage.train)}, lr {stage.lr:g}, {length}")
    for dataset in stages_with(datasets):
        if dataset is None:
            lines.append("steps of stages given in epochs need the data: pass --data DIR")
            continue
        lines.append(_splits(dataset))
        lines += coverage_lines(dataset.parts, experiment.data.num_frames, experiment.data.fit)
    return "\n".join(lines)


def _splits(dataset: Dataset) -> str:
    counts = ", ".join(f"{split} {dataset.count(split):,}" for split in dataset.splits)
    return f"{dataset.key}: {dataset.root} ({dataset.store} store; {counts})"


def _sample(experiment: Experiment, model: MetaModels, dataset: Dataset | None, number: int | None) -> str:
    """One sample as the model sees it, with the positions that have loss: the first that training
    reads, or an example without data. number: of the stage, if the stages' data differs."""
    stage = experiment.stages[number or 0].name
    experiment = experiment.for_stage(stage)
    lines, caption, prompt, still = ["sample: an example"], EXAMPLE_CAPTION, None, False
    if dataset is not None:
        try:
            row, described = _first_sample(experiment, model, dataset, number or 0)
        except SampleError as error:
            return f"sample: the first of split train cannot be read: {error}"
        lines = [f"sample: {row.key}, the first that {'training' if number is None else f'stage {stage}'} reads"]
        caption, prompt, still = described["captions"][0], described.get("prompt"), described.get("still") is True
        times = sample_times(1 if still else experiment.data.num_frames, *row.span)
        lines.append(f"  frames at {', '.join(f'{t:.2f}' for t in times)} s")
    try:
        tokenizer = load_tokenizer(experiment.llm, local_files_only=True)
    except InputError:
        if dataset is not None:
            lines += [f"  prompt   {prompt or experiment.data.prompt!r}", f"  caption  {caption!r}"]
        return "\n".join(
            [
                *lines,
                f"  tokens are not shown, the tokenizer of {experiment.llm.model} "
                "is not on this machine (its files are enough, weights are not needed)",
            ]
        )
    projector = model.captioner.projector
    visual = projector.tokens_of(projector.patches) if still else projector.num_tokens
    return "\n".join(lines + _tokens(sequence_builder(experiment, tokenizer, model.captioner), caption, prompt, visual))


def _first_sample(
    experiment: Experiment, model: MetaModels, dataset: Dataset, number: int
) -> tuple[SampleRow, dict[str, Any]]:
    """The first sample of stage ``number``: row and description. Raises SampleError."""
    reader = training_reader(experiment, model, dataset, number)
    row = reader.row(0)
    return row, read_description(reader.index_of(0).read(row))


def _tokens(builder: SequenceBuilder, caption: str, prompt: str | None, visual: int) -> list[str]:
    try:
        sequence = builder.training(caption, prompt, visual)
    except ValueError as error:
        return [f"  {caption!r}: {error}"]
    runs: list[tuple[str, list[int]]] = []
    for token, label in zip(sequence.input_ids, sequence.labels, strict=True):
        kind = "visual" if token == VISUAL else "loss" if label != IGNORE else "-"
        if not runs or runs[-1][0] != kind:
            runs.append((kind, []))
        runs[-1][1].append(token)
    lines = [f"  {len(sequence.input_ids):,} positions; only the lines marked 'loss' count for the loss"]
    for kind, tokens in runs:
        text = "(visual tokens)" if kind == "visual" else repr(builder.tokenizer.decode(tokens))
        lines.append(f"  {kind:<7}{len(tokens):>6,}  {text}")
    return lines


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
