"""Checks before a start, shared by training, the plan and the doctor. They load no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from vlmds.console.text import install_hint
from vlmds.data.alike import sampling_of
from vlmds.data.dataset import Dataset, stages_with
from vlmds.data.features import check_feature_keys
from vlmds.data.loader import SampleReader, stage_seed
from vlmds.errors import InputError
from vlmds.evaluation.metrics import METRICS, tokenizers
from vlmds.experiments.schedule import accumulation_steps
from vlmds.experiments.schema import Experiment
from vlmds.models.assemble import MetaModels
from vlmds.models.attention import FLASH, choose_attention
from vlmds.models.captioner import Captioner
from vlmds.models.hashes import weights_sha256
from vlmds.models.hub import cached_folder, weight_files
from vlmds.models.language import check_vocabulary
from vlmds.models.sequences import SequenceBuilder
from vlmds.models.trainable import freeze, parameter_groups
from vlmds.models.vision import load_vision_tower
from vlmds.runs.initial import InitialProjector, check_fits, check_pretrained


def check_experiment(
    experiment: Experiment,
    model: MetaModels,
    datasets: Sequence[Dataset | None],
    ranks: int,
    initial: InitialProjector | None = None,
) -> None:
    """Check all that needs no weights, tokenizer or other ranks: the global batch, what each stage
    trains, attention and precision, the logging, and whether the data and ``projector.init`` fit the experiment.

    Args:
        model: of :func:`vlmds.models.assemble.meta_models`, which has checked that its parts fit each
            other. Its parameters are left frozen as in the last stage.
        datasets: of each stage; None skips the checks of that data.

    Raises:
        InputError: names the key or the dataset.
    """
    accumulation_steps(experiment, ranks, None)
    for stage in experiment.stages:
        freeze(model.captioner, stage)
        if not parameter_groups(model.captioner, stage, experiment.training):
            raise InputError(f"stages: {stage.name}: nothing is trainable")
    if (name := experiment.llm.attention) in FLASH:  # as on a card that suits it
        choose_attention(name, experiment.llm.dtype, None, FLASH[name][1][0], {name})
    if experiment.logging.wandb_project and find_spec("wandb") is None:
        raise InputError(
            f"logging.wandb_project: wandb is not installed; {install_hint('track')}, or leave the key out"
        )
    present = [dataset for dataset in datasets if dataset is not None]
    for dataset in stages_with(present):
        check_data(experiment, model, dataset)
        check_same_sampling(dataset, present[0], experiment.data.fit)
    if initial is not None:
        check_fits(initial, experiment, model.captioner.projector)


def check_initial(
    initial: InitialProjector,
    experiment: Experiment,
    datasets: Sequence[Dataset | None],
    weights: Mapping[str, str] | None = None,
) -> None:
    """Check that ``projector.init`` was trained with the experiment's vision tower and language model. A model that
    is not on this machine is not compared.

    Args:
        weights: sha256 of the language model's weight files (:func:`vlmds.runs.lineage.base_weights`), if they are
            known; else they are read.

    Raises:
        InputError: names the model that differs.
    """
    vision, llm, tower = experiment.vision, experiment.llm, None
    stored = next((dataset for dataset in datasets if dataset is not None and dataset.store == "features"), None)
    if stored is not None:
        tower = stored.meta["vision"]["fingerprint"]
    elif cached_folder(vision) is not None:
        tower = load_vision_tower(vision, torch.bfloat16, torch.device("cpu")).fingerprint()
    if weights is None and (folder := cached_folder(llm)) is not None:
        weights = weights_sha256({f"llm/{path.name}": path for path in weight_files(llm, folder)})
    check_pretrained(initial, experiment, tower, weights)


def check_data(experiment: Experiment, model: MetaModels, dataset: Dataset) -> None:
    """Raise InputError unless the experiment can be trained on the data: it has split train (in all
    parts of a blend), frames or features have the model's number and size, features are of its
    layer and pooling, and it has split val if a key needs it."""
    training_reader(experiment, model, dataset)
    config: Any = model.tower.config
    check_feature_keys(dataset, experiment)
    if dataset.store == "features":
        recorded, projector = dataset.meta["vision"], model.captioner.projector
        ours = (projector.patches, config.hidden_size)
        theirs = (recorded["patches"], recorded["width"])
        if ours != theirs:
            raise InputError(
                f"{dataset.root}: its features of {recorded['model']} are {theirs[0]} x {theirs[1]} "
                f"a frame, but vision.model {experiment.vision.model} makes {ours[0]} x {ours[1]}; "
                "make them again with it, or set vision.model to that tower"
            )
    check_validation(experiment, "val" in dataset.splits, dataset.root)


def check_same_sampling(dataset: Dataset, other: Dataset, fit: str) -> None:
    """Raise InputError if the frames of two stages are sampled or resized differently. fit: of decoded videos."""
    ours, theirs = sampling_of(dataset.meta, fit), sampling_of(other.meta, fit)
    for name in ("sampler", "resizer"):
        if ours[name] != theirs[name]:
            raise InputError(
                f"{dataset.key}: {dataset.root} has {name} {ours[name]!r}, but {other.root} of another "
                f"stage has {theirs[name]!r}; pack the older one again"
            )


def training_reader(experiment: Experiment, model: MetaModels, dataset: Dataset, number: int = 0) -> SampleReader:
    """The reader of stage ``number``. Raises InputError as :class:`SampleReader`."""
    data = experiment.data
    config: Any = model.tower.config
    return SampleReader(
        dataset,
        "train",
        data.num_frames,
        config.image_size,
        seed=stage_seed(experiment.training.seed, number),
        window=data.shuffle_window,
        fit=data.fit,
    )


def sequence_builder(
    experiment: Experiment, tokenizer: PreTrainedTokenizerBase, captioner: Captioner
) -> SequenceBuilder:
    """The experiment's sequence builder, checked against the language model.

    Args:
        captioner: loaded, or on the meta device.

    Raises:
        InputError: the tokenizer has more tokens than the model or an unsuitable chat template, or
            the longest sequence does not fit the model.
    """
    data, name = experiment.data, experiment.llm.model
    check_vocabulary(captioner.llm, tokenizer, name)
    builder = SequenceBuilder(tokenizer, data.prompt, captioner.projector.num_tokens, data.max_caption_tokens)
    longest = len(builder.prompt_ids()) + data.max_caption_tokens
    most = getattr(captioner.llm.config, "max_position_embeddings", None)
    if most is not None and longest > most:
        raise InputError(
            f"data.num_frames: {captioner.projector.num_tokens:,} visual tokens, the prompt and "
            f"data.max_caption_tokens {data.max_caption_tokens} make {longest:,} positions, but "
            f"llm.model {name} takes {most:,}; use fewer frames, vision.pool, or a projector with "
            "queries"
        )
    return builder


def check_validation(experiment: Experiment, has_val: bool, data: Path | str) -> None:
    """Raise InputError, naming the key, if the settings need what this data or this installation
    lacks: split val, or the metric."""
    settings = experiment.training
    wanted = [
        name
        for name, value in (
            ("evaluate_every", settings.evaluate_every),
            ("early_stopping", settings.early_stopping),
            ("keep", settings.keep == "best"),
        )
        if value
    ]
    if wanted and not has_val:
        raise InputError(
            f"training.{wanted[0]}: needs split val, which {data} does not have; pack "
            "with --val-fraction, or leave the key out"
        )
    if settings.best_metric == "loss":
        return
    levels = [tokenizer.level for tokenizer in tokenizers()]
    known = ["loss", *(f"{metric}@{level}" for level in levels for metric in METRICS)]
    if settings.best_metric not in known:
        raise InputError(
            f"training.best_metric: {settings.best_metric!r} is no metric here; there are "
            f"{', '.join(known)} (those @morpheme need the extra korean)"
        )
