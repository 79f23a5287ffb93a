"""Configuration and weights of an exported model, in transformers' form."""

from __future__ import annotations

import copy
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig

from vlmds.models.sequences import SequenceBuilder


def named(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """The module's weights, with the prefix before their names."""
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def nameless(config: PretrainedConfig) -> PretrainedConfig:
    """A copy without the path that the model was loaded from, which may be private."""
    config = copy.deepcopy(config)
    config._name_or_path = ""
    return config


def write_model(folder: Path, config: PretrainedConfig, weights: dict[str, Tensor], builder: SequenceBuilder) -> None:
    """Write config.json, generation_config.json (as `vlmds caption` generates by default) and
    model*.safetensors, in shards of 5 GB."""
    config.save_pretrained(folder)
    GenerationConfig(
        do_sample=False, max_new_tokens=128, eos_token_id=builder.eos_token_id, pad_token_id=builder.pad_token_id
    ).save_pretrained(folder)
    if config.tie_word_embeddings:  # the input embedding stands for both
        weights.pop("language_model.lm_head.weight")
    save_torch_state_dict(weights, folder, max_shard_size="5GB", metadata={"format": "pt"})
