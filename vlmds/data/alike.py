"""Checks that packed datasets fit together and fit an experiment, and `vlmds pack` commands that fix it.

Only what dataset.json says is compared. In a command, a word in capitals stands for what only the
user knows, such as the place of the manifest.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlmds.console.text import counted
from vlmds.data.index import ShardIndex
from vlmds.errors import InputError
from vlmds.video.fit import FIT, RESIZERS, fit_of
from vlmds.video.jpeg import QUALITY
from vlmds.video.sampling import SAMPLER

if TYPE_CHECKING:
    from vlmds.experiments.schema import VisionConfig

CONVERSIONS = (("video", "frames"), ("video", "features"), ("frames", "features"))
"""(store, store that can be made from it)"""
_SAMPLING = ("sampler", "resizer")
_SHAPE = ("num_frames", "image_size")


def sampling_of(meta: dict[str, Any], fit: str) -> dict[str, Any]:
    """How the frames of a store are chosen and fitted: as dataset.json (meta) says if they are stored; by
    this vlmds with this fit if they are decoded from videos."""
    if meta["store"] == "video":
        return {"sampler": SAMPLER, "resizer": RESIZERS[fit]}
    return {name: meta[name] for name in _SAMPLING}


def check_alike(parts: Sequence[ShardIndex], key: str = "data") -> None:
    """Raise InputError, naming both and the command that converts one, unless all parts of a blend
    are of the same store and have the same frames. key: of the blend's section, for messages."""
    for number, part in enumerate(parts[1:], 1):
        first = parts[0].meta
        names = ["store", "sampler"]  # the frames of videos are fitted when they are read
        if "video" not in (part.store, parts[0].store):
            names.append("resizer")
        if part.store == parts[0].store != "video":
            names += _SHAPE
        differing = [name for name in names if part.meta.get(name) != first.get(name)]
        if part.store == parts[0].store == "features" and not same_tower(part.meta, first):
            differing.append("vision")
        if not differing:
            continue
        shown = [_described(meta, differing) for meta in (part.meta, first)]
        raise InputError(
            f"{key}.blend: {part.root} has {shown[0]}, but {parts[0].root} has {shown[1]}; {_fix(parts, number, key)}"
        )


def check_frames(index: ShardIndex, num_frames: int, image_size: int, fit: str) -> None:
    """Raise InputError, naming the command that fixes it, if a frames or features store was packed
    with another number of frames or fit than the experiment's, or a frames store with another size.
    Features of another size are of another tower, which vlmds.data.features checks."""
    if index.store == "video":
        return
    wanted = {"num_frames": num_frames}
    if index.store == "frames":
        wanted["image_size"] = image_size
    if index.meta["resizer"] != RESIZERS[fit]:
        recorded = fit_of(index.meta["resizer"])
        origin, command, _ = remade(index, {**index.meta, **wanted, "resizer": RESIZERS[fit]})
        raise InputError(
            f"{index.root}: packed with fit {recorded or index.meta['resizer']}, but the experiment has data.fit "
            f"{fit}; make it again from its {origin}: {command}" + (f", or set data.fit={recorded}" if recorded else "")
        )
    for name, want in wanted.items():
        if index.meta[name] != want:
            origin, command, _ = remade(index, {**index.meta, **wanted})
            other = f"set data.num_frames={index.meta[name]}" if name == "num_frames" else "choose another vision.model"
            raise InputError(
                f"{index.root}: packed with {name} {index.meta[name]}, but the "
                f"experiment needs {want}; make it again from its {origin}: "
                f"{command}, or {other}"
            )


def same_tower(meta: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the features of both are of one tower, whatever name it was given."""
    return meta["vision"]["fingerprint"] == other["vision"]["fingerprint"]


def tower_keys(vision: VisionConfig) -> dict[str, Any]:
    """The "vision" of a dataset.json for the experiment's tower, without what follows from weights.
    "model" is the value of `vlmds pack --vision`."""
    model = f"{vision.model}@{vision.revision}" if vision.revision else vision.model
    return {"model": model, "feature_layer": vision.feature_layer, "pool": vision.pool}


def remade(index: ShardIndex, like: dict[str, Any]) -> tuple[str, str, str]:
    """The command that replaces a frames or features store by one with other frames or features,
    made from the source of the store.

    Args:
        like: dataset.json of the new store.

    Returns:
        (the source, the `vlmds pack` command, the new dataset's place)
    """
    source = "VIDEO_STORE" if like["store"] == "features" else "MANIFEST"
    out = _beside(index, "new")
    return source.lower().replace("_", " "), _command(like, source, out), out


def converted(index: ShardIndex, like: dict[str, Any]) -> tuple[str, str]:
    """(the `vlmds pack` command that converts the dataset to the store that `like`, a dataset.json,
    describes; the new dataset's place)"""
    out = _beside(index, like["store"])
    return _command(like, str(index.root).rstrip("/"), out), out


def _beside(index: ShardIndex, word: str) -> str:
    return f"{str(index.root).rstrip('/')}-{word}"


def _command(like: dict[str, Any], source: str, out: str) -> str:
    """A `vlmds pack` command, quoted for a shell. source: a manifest or a packed dataset."""
    words = ["vlmds", "pack", source, out, "--store", like["store"]]
    if like.get("num_frames"):
        words += ["--num-frames", str(like["num_frames"])]
    if like["store"] == "frames":
        words += ["--image-size", str(like["image_size"])]
    if like.get("quality") not in (None, QUALITY):
        words += ["--quality", str(like["quality"])]
    if (fit := fit_of(like.get("resizer"))) not in (None, FIT):
        words += ["--fit", str(fit)]
    if like["store"] == "features":
        vision = like["vision"]
        words += ["--vision", vision["model"]]
        for name, default in (("feature_layer", -1), ("pool", 1)):
            if vision[name] != default:
                words += [f"--{name.replace('_', '-')}", str(vision[name])]
    return shlex.join(words)


def _fix(parts: Sequence[ShardIndex], number: int, key: str) -> str:
    """The command that makes the first part and this one alike."""
    for source, target in ((number, 0), (0, number)):
        if _convertible(parts[source].meta, parts[target].meta):
            command, out = converted(parts[source], parts[target].meta)
            return f"convert one: {command}; then name {out} in {key}.blend.{source}.path"
    old = 0 if _sampling(parts[0].meta) != [SAMPLER, RESIZERS[FIT]] else number
    origin, command, out = remade(parts[old], parts[number - old].meta)
    return f"make one again from its {origin}: {command}; then name {out} in {key}.blend.{old}.path"


def _convertible(source: dict[str, Any], target: dict[str, Any]) -> bool:
    """Whether converting the source gives a store like the target."""
    if (source["store"], target["store"]) not in CONVERSIONS:
        return False
    if source["store"] == "video":
        return target.get("sampler") == SAMPLER and fit_of(target.get("resizer")) is not None
    return all(source.get(name) == target.get(name) for name in (*_SAMPLING, *_SHAPE))


def _sampling(meta: dict[str, Any]) -> list:
    return [meta.get(name) for name in _SAMPLING]


def _described(meta: dict[str, Any], names: Sequence[str]) -> str:
    """The values of these keys, such as "a frames store, 8 frames at 336 px"."""
    parts = []
    if "store" in names:
        parts.append(f"a {meta['store']} store")
    for name in _SAMPLING:
        if name in names:
            parts.append(f"{name} {meta.get(name)!r}")
    if meta["store"] != "video" and {*names} & {"store", *_SHAPE}:
        parts.append(f"{counted(meta['num_frames'], 'frame')} at {meta['image_size']} px")
    if meta["store"] == "features" and {*names} & {"store", "vision"}:
        vision = meta["vision"]
        parts.append(
            f"features of {vision['model']}, layer {vision['feature_layer']}, pool "
            f"{vision['pool']} ({vision['fingerprint'][:12]})"
        )
    return ", ".join(parts)
