"""The whole model of an experiment, as training and inference load it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from vlmds.console.progress import phase
from vlmds.experiments.schema import Experiment
from vlmds.models.captioner import Captioner, Features
from vlmds.models.fetch import fetch_models
from vlmds.models.language import add_adapter, check_vocabulary, load_language_model, load_tokenizer
from vlmds.models.pretrained import load_config, published_or_loaded_config
from vlmds.models.projectors import Projector, build_projector
from vlmds.models.vision import VisionTower, frame_side, load_vision_tower, patches_per_frame, vision_half


@dataclass
class Model:
    """The models of an experiment.

    tower: frozen, outside the engine; None where the data contains its features. captioner:
    projector and LLM, which the engine trains. image_size: side of the tower's frames in pixels.
    stored_tower: see :func:`load_model`."""

    tower: VisionTower | None
    captioner: Captioner
    tokenizer: PreTrainedTokenizerBase
    image_size: int
    stored_tower: str | None = None

    def features(self, batch: dict[str, Any]) -> Features:
        """A batch's patch features [B, F·P, vision width], on the model's device and in its dtype:
        those of the store, if the batch has "features", else its "frames" through the tower. A list, as in the
        batch, if the clips have different numbers of frames."""
        name = "features" if "features" in batch else "frames"
        if isinstance(batch[name], list):
            return [self.features({name: clip[None]})[0] for clip in batch[name]]
        weight = next(self.captioner.projector.parameters())
        if name == "features":
            return batch[name].to(weight.device, weight.dtype, non_blocking=True)
        assert self.tower is not None
        return self.tower(batch[name].to(weight.device, non_blocking=True))

    def tower_fingerprint(self) -> str:
        """Fingerprint of the tower that makes the captioner's features, loaded or not."""
        if self.stored_tower:
            return self.stored_tower
        assert self.tower is not None
        return self.tower.fingerprint()


def load_model(experiment: Experiment, device: torch.device, stored_tower: str | None = None) -> Model:
    """The pretrained parts of the experiment and a fresh projector, without an adapter. All ranks of
    a job call it alike; what is missing on this machine is downloaded.

    Args:
        stored_tower: fingerprint of the tower whose features the data contains, which the caller has
            checked (:func:`vlmds.data.features.check_features`); then no tower is loaded.

    Raises:
        InputError: a part cannot be loaded, or parts do not fit each other.
    """
    experiment = fetch_models(experiment)
    dtype = getattr(torch, experiment.llm.dtype)
    tokenizer = load_tokenizer(experiment.llm)
    vision = vision_half(load_config(experiment.vision), experiment.vision.model)
    tower = None if stored_tower else load_vision_tower(experiment.vision, dtype, device)
    llm = load_language_model(experiment.llm, device, experiment.training.micro_batch)
    check_vocabulary(llm, tokenizer, experiment.llm.model)
    torch.manual_seed(experiment.training.seed)  # every rank draws the same projector
    projector = experiment_projector(experiment, vision, llm.config)
    return Model(tower, Captioner(projector.to(device, dtype), llm), tokenizer, frame_side(vision)[0], stored_tower)


def experiment_projector(experiment: Experiment, vision: CLIPVisionConfig, llm: PretrainedConfig) -> Projector:
    """A fresh projector between these two models."""
    return build_projector(
        experiment.projector,
        vision.hidden_size,
        llm.hidden_size,
        experiment.data.num_frames,
        patches_per_frame(vision, experiment.vision.pool),
    )


@dataclass
class MetaModels:
    """The experiment's models on the meta device: shapes without storage. The captioner carries
    the adapter."""

    tower: nn.Module
    captioner: Captioner


@phase("sizing the models")
def meta_models(experiment: Experiment) -> MetaModels:
    """Build the models without their weights.

    Raises:
        InputError: a model's configuration cannot be loaded, or parts do not fit.
    """
    vision = vision_half(published_or_loaded_config(experiment.vision), experiment.vision.model)
    language = published_or_loaded_config(experiment.llm)
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(language).requires_grad_(False)
        captioner = Captioner(experiment_projector(experiment, vision, language), llm)
        captioner.llm = add_adapter(llm, experiment.peft)
        return MetaModels(CLIPVisionModel(vision), captioner.to(getattr(torch, experiment.llm.dtype)))
