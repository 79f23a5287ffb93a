"""The whole model of an experiment, as training and inference load it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from vlmds.config import Experiment
from vlmds.models.captioner import Captioner
from vlmds.models.language import check_vocabulary, load_language_model, load_tokenizer
from vlmds.models.projectors import Projector, build_projector
from vlmds.models.vision import VisionTower, load_vision_tower, patches_per_frame


@dataclass
class Model:
    """tower: frozen, outside the engine. captioner: projector and LLM, what the engine holds."""

    tower: VisionTower
    captioner: Captioner
    tokenizer: PreTrainedTokenizerBase


def load_model(experiment: Experiment, device: torch.device) -> Model:
    """The pretrained parts of the experiment and a fresh projector, without an adapter.

    Raises:
        InputError: a part cannot be loaded, or parts do not fit each other.
    """
    dtype = getattr(torch, experiment.llm.dtype)
    tokenizer = load_tokenizer(experiment.llm.model)
    tower = load_vision_tower(experiment.vision, dtype, device)
    llm = load_language_model(experiment.llm, device)
    check_vocabulary(llm, tokenizer, experiment.llm.model)
    torch.manual_seed(experiment.training.seed)  # every rank draws the same projector
    projector = experiment_projector(experiment, tower.clip.config, llm.config)
    return Model(tower, Captioner(projector.to(device, dtype), llm), tokenizer)


def experiment_projector(
    experiment: Experiment, vision: PretrainedConfig, llm: PretrainedConfig
) -> Projector:
    """A fresh projector between these two models."""
    return build_projector(
        experiment.projector, vision.hidden_size, llm.hidden_size, experiment.data.num_frames,
        patches_per_frame(vision, experiment.vision.pool),
    )
