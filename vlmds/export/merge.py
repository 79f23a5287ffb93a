"""Folding of an adapter into the language model's weights."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from vlmds.console.progress import phase
from vlmds.errors import InputError
from vlmds.experiments.schema import Experiment
from vlmds.models.artifact import check_artifact_tower, load_artifact, read_artifact
from vlmds.models.assemble import Model, load_model
from vlmds.models.hashes import weights_sha256
from vlmds.runs.folder import check_base_weights
from vlmds.runs.lineage import base_files, tokenizer_sha256


def unquantised(experiment: Experiment) -> Experiment:
    """The experiment with its language model in ``llm.dtype`` instead of NF4, on any machine's
    attention."""
    llm = experiment.llm.model_copy(update={"load_in_4bit": False, "attention": "auto"})
    return experiment.model_copy(update={"llm": llm})


def load_unmerged(artifact: Path, experiment: Experiment, device: torch.device) -> Model:
    """The artifact's model on the base weights in ``llm.dtype``, never in NF4, in evaluation mode.

    Raises:
        InputError: the base weights or the tower are not those that the artifact was trained with.
    """
    check_base(artifact, experiment)
    model = load_model(unquantised(experiment), device)
    load_artifact(artifact, model.captioner)
    assert model.tower is not None  # None only where features are stored
    check_artifact_tower(artifact, experiment, model.tower)
    model.captioner.to(device).eval().requires_grad_(False)
    return model


def check_base(artifact: Path, experiment: Experiment) -> None:
    """Raise :class:`InputError`, naming the file, unless the pretrained models here are, byte for
    byte, those that the artifact's lineage records."""
    recorded = read_artifact(artifact).meta["lineage"].get("weights")
    if recorded is None:
        return
    found = weights_sha256(base_files(experiment))
    found["llm/tokenizer"] = tokenizer_sha256(experiment.llm)
    try:
        check_base_weights(recorded, found, experiment, artifact)
    except InputError as error:
        wrong = str(error).partition(";")[0]
        raise InputError(f"{wrong}; restore it, or name the right folder with --set") from None


@torch.no_grad()
def merge_adapter(llm: PeftModel) -> PreTrainedModel:
    """Fold the LoRA or DoRA adapter into the base weights, in place; returns the plain model.

    Each weight is computed in float32 and rounded once to its dtype, layer by layer: no second
    copy of the model is needed.

    Raises:
        InputError: a merged weight is not finite.
    """
    layers = {name: module for name, module in llm.named_modules() if isinstance(module, LoraLayer)}
    with phase("folding the adapter in", unit="layers") as shown:
        for name, module in shown.counting(layers.items()):
            assert isinstance(module, nn.Module)  # LoraLayer is a mixin
            dtype = module.get_base_layer().get_parameter("weight").dtype
            module.float()
            try:
                module.merge(safe_merge=True)
            except ValueError:
                raise InputError(
                    f"{name}: folding the adapter in gives no finite weights; the adapter is damaged or has diverged"
                ) from None
            module.to(dtype)
    return llm.unload()
