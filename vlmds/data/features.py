"""The features store: the frozen tower's patch features of every sample, computed once.

A sample's member `key.safetensors` contains one tensor, "features": bfloat16 [F·P, width], P feature
vectors for each of the F frames in order; F is 1 for a still picture. dataset.json records under "vision"
which tower made them. Features of another tower, layer or pooling are refused: their shape alone may not show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vlmds.data.alike import remade, tower_keys
from vlmds.data.index import ShardIndex
from vlmds.errors import InputError, SampleError

if TYPE_CHECKING:
    from vlmds.data.dataset import Dataset
    from vlmds.experiments.schema import Experiment, VisionConfig
    from vlmds.models.vision import VisionTower

EXTENSION = "safetensors"
TENSOR = "features"


def encode_features(features: Tensor) -> bytes:
    """Features [F·P, width] of any float dtype, as a member of a shard."""
    return save({TENSOR: features.to("cpu", torch.bfloat16).contiguous()})


def decode_features(members: dict[str, bytes], meta: dict[str, Any], still: bool = False) -> Tensor:
    """A sample's features, bfloat16 [F·P, width].

    members: the sample's, {extension: bytes}. meta: dataset.json. still: a still picture, of which F is 1; stores
    of version 2 have the features of num_frames copies of it. Raises SampleError if their shape is not the one in
    dataset.json.
    """
    try:
        features = load(members[EXTENSION])[TENSOR]
    except (KeyError, SafetensorError) as error:
        raise SampleError(f"features cannot be read: {error}") from error
    patches, width = meta["vision"]["patches"], meta["vision"]["width"]
    clip, picture = (meta["num_frames"] * patches, width), (patches, width)
    if features.dtype != torch.bfloat16 or tuple(features.shape) not in ((clip, picture) if still else (clip,)):
        wanted = list(picture if still else clip)
        raise SampleError(f"features are {features.dtype} {list(features.shape)}, not torch.bfloat16 {wanted}")
    # A copy: what is handed to another process is the whole storage.
    return features[:patches].clone() if still and tuple(features.shape) != picture else features


def bytes_per_sample(num_frames: int, patches: int, width: int) -> int:
    """Bytes of a sample's features (two for each number), without the file's header."""
    return 2 * num_frames * patches * width


def describe_tower(tower: VisionTower, model: str) -> dict[str, Any]:
    """The tower, as dataset.json records it under "vision". model: as the user named it."""
    return {
        "model": model,
        "fingerprint": tower.fingerprint(),
        "feature_layer": tower.feature_layer,
        "pool": tower.pool,
        "patches": tower.patches,
        "width": tower.hidden_size,
    }


def needs_tower(experiment: Experiment, datasets: Sequence[Dataset | None]) -> bool:
    """Whether training loads the vision tower: not if all data is stored features, unless
    ``training.evaluate_every`` makes it caption black frames. datasets: None counts as one of frames."""
    frames = any(dataset is None or dataset.store != "features" for dataset in datasets)
    return frames or experiment.training.evaluate_every is not None


def check_feature_keys(index: ShardIndex | Dataset, experiment: Experiment) -> None:
    """Raise InputError if stored features are of another layer or pooling than the experiment's.
    Other stores pass. No weights are read."""
    if index.store != "features":
        return
    recorded = index.meta["vision"]
    for name in ("feature_layer", "pool"):
        if recorded[name] != getattr(experiment.vision, name):
            raise InputError(
                f"{index.root}: its features were made with vision.{name} {recorded[name]}, but "
                f"the experiment has {getattr(experiment.vision, name)}; "
                f"{_with_tower(index, experiment.vision)}, or set vision.{name}={recorded[name]}"
            )


def check_features(index: ShardIndex | Dataset, experiment: Experiment, tower: VisionTower | None = None) -> None:
    """Check that stored features are those of the experiment's tower; other stores pass.

    The experiment's keys are compared first, without reading weights. Then the loaded weights are
    hashed, not their files: the tower's file format does not matter.

    Args:
        index: a packed dataset, or a blend, whose parts are of one tower. tower: the experiment's,
            if it is loaded; otherwise it is loaded onto the CPU for this check.

    Raises:
        InputError: names both towers.
    """
    if index.store != "features":
        return
    check_feature_keys(index, experiment)
    vision, recorded = experiment.vision, index.meta["vision"]
    if tower is None:
        from vlmds.models.vision import load_vision_tower

        tower = load_vision_tower(vision, torch.bfloat16, torch.device("cpu"))
    if tower.fingerprint() != recorded["fingerprint"]:
        raise InputError(
            f"{index.root}: its features are of the tower {recorded['model']} "
            f"({recorded['fingerprint'][:12]}), but vision.model {vision.model} is another one "
            f"({tower.fingerprint()[:12]}); {_with_tower(index, vision)}, or set vision.model to "
            "that tower"
        )


def _with_tower(index: ShardIndex | Dataset, vision: VisionConfig) -> str:
    """The command that makes the features again with the experiment's tower."""
    first = index if isinstance(index, ShardIndex) else index.parts[0]
    origin, command, _ = remade(first, {**first.meta, "vision": tower_keys(vision)})
    return f"make them again from the {origin}: {command}"
