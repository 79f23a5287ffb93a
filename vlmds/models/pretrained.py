"""Loading of pretrained parts by hub name or local folder, with errors a user can act on."""

from __future__ import annotations

import contextlib
from pathlib import Path

from transformers import AutoConfig, CLIPVisionConfig, PretrainedConfig, Qwen3Config
from transformers.utils import logging as transformers_logging

from vlmds.console.progress import phase
from vlmds.console.quiet import quietly
from vlmds.errors import InputError
from vlmds.models.fetch import config_folder
from vlmds.models.hub import ModelSection, key_of

# The shapes of the two models that the packaged experiments name, as published in their
# config.json. `vlmds plan` and the full-size tests use them where the hub cannot be reached.
PUBLISHED_SHAPES: dict[str, PretrainedConfig] = {
    "openai/clip-vit-large-patch14-336": CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    ),
    "Qwen/Qwen3-8B": Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        rope_theta=1000000.0,  # type: ignore[call-arg]  # a key of config.json that transformers converts
    ),
}


@contextlib.contextmanager
def loading(key: str, name: str):
    """Context in which a failure of ``from_pretrained`` is an :class:`InputError`, and in which it
    prints nothing: what a user can act on is an error here."""
    try:
        with quietly():
            yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{key}: cannot load {name}: {reason[:300]}") from error


def load_weights(model_class, section: ModelSection, folder: Path, **options):
    """``model_class.from_pretrained(folder)``, but a weight that is missing or does not have the shape
    of config.json is an error, never a random initialisation.

    Raises:
        InputError: names the experiment's key, and for a wrong shape both shapes.
    """
    key, name = key_of(section), section.model
    quantised = "" if options.get("quantization_config") is None else " and quantising"
    with loading(key, name), counted_phase(f"loading{quantised} {key} {name}", "tensors"):
        model, report = model_class.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    # What is saved of the model names the repository, not where its snapshot lies here.
    model.name_or_path = model.config._name_or_path = name
    for weight, found, expected in sorted(report["mismatched_keys"]):
        raise InputError(
            f"{key}: {name}: {weight} has shape {list(found)} in the weights, but "
            f"{list(expected)} by its config.json; the two are of different models"
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(
            f"{key}: {name}: its weights lack {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        )
    return model


@contextlib.contextmanager
def counted_phase(what: str, unit: str):
    """A :func:`phase` that counts what transformers' progress bars would show."""
    with phase(what, unit=unit) as shown:

        def bar(factory, args, kwargs):
            if len(args) == 1 and hasattr(args[0], "__len__"):
                return transformers_logging.EmptyTqdm(shown.counting(args[0]))
            return factory(*args, **kwargs)

        before = transformers_logging.set_tqdm_hook(bar)
        try:
            yield
        finally:
            transformers_logging.set_tqdm_hook(before)


def load_config(section: ModelSection) -> PretrainedConfig:
    """The model's configuration, for which config.json alone is downloaded if it is not here.

    Raises:
        InputError: nothing loadable there; names the experiment's key.
    """
    folder = config_folder(section)
    with loading(key_of(section), section.model):
        return AutoConfig.from_pretrained(folder)


def published_or_loaded_config(section: ModelSection) -> PretrainedConfig:
    """As :func:`load_config`, but without the network for the models of PUBLISHED_SHAPES."""
    return PUBLISHED_SHAPES.get(section.model) or load_config(section)
