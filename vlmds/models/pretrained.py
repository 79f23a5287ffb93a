"""Loading pretrained parts by hub name or local folder, with errors a user can act on."""

from __future__ import annotations

import contextlib
import logging
import warnings
from pathlib import Path

from transformers import AutoConfig, CLIPVisionConfig, PretrainedConfig, Qwen3Config
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from vlmds.errors import InputError
from vlmds.progress import phase

# The shapes of the two models that the packaged experiments name, as published in their
# config.json. `vlmds plan` and the full-size tests use them where the hub cannot be reached.
PUBLISHED_SHAPES: dict[str, PretrainedConfig] = {
    "openai/clip-vit-large-patch14-336": CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14, projection_dim=768,
    ),
    "Qwen/Qwen3-8B": Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=40960, tie_word_embeddings=False, rope_theta=1000000.0,
    ),
}


@contextlib.contextmanager
def loading(key: str, name: str):
    """Turn the many ways in which ``from_pretrained`` fails into one :class:`InputError`."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{key}: cannot load {name}: {reason[:300]}") from error


def load_weights(model_class, name: str, key: str, **options):
    """``model_class.from_pretrained(name, **options)``, but a weight that is missing or does not have
    the shape of config.json is an error, never a random initialisation.

    Raises:
        InputError: names ``key``, and for a wrong shape both shapes.
    """
    quantised = "" if options.get("quantization_config") is None else " and quantising"
    with loading(key, name), counted_phase(f"loading{quantised} {key} {name}", "tensors"):
        model, report = model_class.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    for weight, found, expected in sorted(report["mismatched_keys"]):
        raise InputError(f"{key}: {name}: {weight} has shape {list(found)} in the weights, but "
                         f"{list(expected)} by its config.json; the two are of different models")
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(f"{key}: {name}: its weights lack {missing[0]}"
                         + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""))
    return model


@contextlib.contextmanager
def counted_phase(what: str, unit: str):
    """A :func:`phase` in which transformers' progress bars count, instead of on the screen."""
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


def load_config(name: str, key: str) -> PretrainedConfig:
    """The model configuration of a hub name or local folder; no weights are read.

    Raises:
        InputError: nothing loadable there; names ``key``, the experiment's key for it.
    """
    if looks_local(name) and not (Path(name) / "config.json").is_file():
        raise InputError(f"{key}: {name} is not a model folder (no config.json in it)")
    with loading(key, name):
        return AutoConfig.from_pretrained(name)


def published_or_loaded_config(name: str, key: str) -> PretrainedConfig:
    """As :func:`load_config`, but never asks the network for a model whose shape is known here."""
    return PUBLISHED_SHAPES.get(name) or load_config(name, key)


def hub_revision(name: str, key: str) -> str | None:
    """The commit of the hub repository ``name`` that loads on this machine; None for a folder.

    Raises:
        InputError: as :func:`load_config`.
    """
    return None if Path(name).is_dir() else getattr(load_config(name, key), "_commit_hash", None)


def weight_files(name: str, key: str) -> list[Path]:
    """The files that ``from_pretrained(name)`` takes the weights from, on this machine, sorted.

    Raises:
        InputError: there are none.
    """
    with loading(key, name):
        folder = Path(name) if Path(name).is_dir() else Path(cached_file(name, "config.json")).parent
    for pattern in ("*.safetensors", "*.bin"):
        files = sorted(folder.glob(pattern))
        if files:
            return files
    raise InputError(f"{key}: {name} has no weights (*.safetensors) in {folder}")


def looks_local(name: str) -> bool:
    """Whether ``name`` is a path: it exists, or it cannot be a hub id (``owner/name``)."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def quiet_libraries() -> None:
    """Switch off the libraries' progress bars and notices, which would bury a command's own output
    on every rank. Warnings that a user can act on become our own errors."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # peft 0.21 asks transformers 5 for an attribute under its old name.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
