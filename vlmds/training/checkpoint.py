"""The format of checkpoints: the trainables in fp32, their Adam moments, and the stage's progress.

    checkpoints/align-0000200/
        rank-00000.safetensors ...   the content of each rank's ZeRO-2 partition, cut by parameter
        checkpoint.json              written last: the state, and size and sha256 of each file

A tensor is named ``exp_avg/projector.net.weight/4096``: what it is, of which parameter, from which
element on. Names instead of flat partitions make a checkpoint loadable at any world size; frozen
weights are not in it. A folder gets its name only when all of it is on disk: the newest folder that
passes its checksums is the latest checkpoint, and no pointer to it can be wrong.

This module is the format; :mod:`vlmds.training.saver` writes in the background of the training.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmds.console.progress import log_line, phase
from vlmds.distributed.ranks import on_main, together
from vlmds.errors import InputError
from vlmds.files import publish_folder, refresh_listing, remove_folder, sha256_of, sync_file
from vlmds.training.ema import WeightAverage
from vlmds.training.engine import Engine

VERSION = 1
WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "ema"  # there if training.ema_decay is set
SHARED_SECONDS = 30.0  # after which a missing file of another node is not on a shared disk


@dataclass(frozen=True)
class _Fragment:
    """The part of a parameter in this rank's partition, from element ``start`` on."""

    name: str
    start: int
    group: int
    flat: nn.Parameter  # the partition of its group, fp32
    place: slice  # in flat


def fragments_to_save(engine: Engine, average: WeightAverage | None) -> dict[str, Tensor]:
    """This rank's tensors under the names they have in a checkpoint: views, not copies."""
    tensors = {}
    for fragment in _fragments(engine):
        for kind, flat in _flats(engine, fragment, average).items():
            tensors[f"{kind}/{fragment.name}/{fragment.start}"] = flat[fragment.place]
    return tensors


def write_part(temporary: Path, rank: int, tensors: dict[str, Tensor]) -> dict:
    """Write a rank's file and flush it to disk; returns its entry in checkpoint.json.

    Raises:
        OSError, SafetensorError: disk full, and the like.
    """
    temporary.mkdir(parents=True, exist_ok=True)
    path = temporary / f"rank-{rank:05d}.safetensors"
    save_file(tensors, path)
    sync_file(path)
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def publish(temporary: Path, folder: Path, state: dict, entries: list[dict]) -> None:
    """Give the files of all ranks the name that makes them a checkpoint.

    Args:
        state: JSON values that ``read_state`` gives back.

    Raises:
        OSError: disk full, and the like; or a rank's file is not here.
    """
    for entry in entries:
        _wait_for(temporary / entry["file"], entry["bytes"])
    meta = {"version": VERSION, "state": state, "files": entries}
    (temporary / "checkpoint.json").write_text(json.dumps(meta, ensure_ascii=False))
    publish_folder(temporary, folder)


def _wait_for(path: Path, size: int) -> None:
    """Wait until another node's file is visible: on a network drive it may be late. On a local disk of
    that node it never is. Raises OSError."""
    deadline = time.monotonic() + SHARED_SECONDS
    os.listdir(path.parent)  # NFS forgets with it that a name was not there
    while not path.is_file() or path.stat().st_size != size:
        if time.monotonic() > deadline:
            raise OSError(f"{path.name} is not in {path.parent}; put --output on a file system that all nodes share")
        time.sleep(0.1)
        os.listdir(path.parent)


def prune(root: Path, stage: str, keep: int) -> None:
    """Remove a stage's checkpoints but the newest ``keep`` and the one of the best score."""
    folders = checkpoints(root, stage)
    scores = {
        folder: score for folder in reversed(folders) if (score := _score(folder)) is not None and math.isfinite(score)
    }
    best = max(scores, key=lambda folder: scores[folder]) if scores else None  # of equal ones the first
    for folder in folders[keep:]:
        if folder != best:
            remove_folder(folder)


def _score(folder: Path) -> float | None:
    """A checkpoint's score. A damaged one has none: it is removed when it is old."""
    try:
        return read_state(folder)["score"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove_unfinished(root: Path) -> None:
    """Remove what a killed run was writing; to be called while no process writes."""
    for folder in root.glob(".*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)


def temporary_name(folder: Path) -> Path:
    """The folder a checkpoint is written to before it has its name."""
    return folder.with_name(f".{folder.name}.tmp")


@phase("loading the checkpoint")
def load_checkpoint(folder: Path, engine: Engine, average: WeightAverage | None) -> None:
    """Load a checkpoint's weights and moments into an engine of any world size; all ranks call it.

    Raises:
        InputError: on every rank, if a parameter of the engine is not, or not wholly, in the
            checkpoint.
    """
    together(lambda: _load(folder, engine, average))
    engine.optimizer.update_lp_params()


def _load(folder: Path, engine: Engine, average: WeightAverage | None) -> None:
    """This rank's part of :func:`load_checkpoint`."""
    refresh_listing(folder / "checkpoint.json")  # another machine has just written it, or may have
    meta = json.loads((folder / "checkpoint.json").read_text())
    pieces: dict[tuple[str, str], list[tuple[int, int, Path, str]]] = {}
    for entry in meta["files"]:
        with safe_open(folder / entry["file"], "pt") as file:
            for key in file.keys():  # noqa: SIM118  # it cannot be iterated over
                kind, name, start = key.split("/")
                length = file.get_slice(key).get_shape()[0]
                pieces.setdefault((kind, name), []).append((int(start), length, folder / entry["file"], key))
    optimizer = engine.optimizer.optimizer
    steps = torch.tensor(float(meta["state"]["optimizer_steps"]))
    for fragment in _fragments(engine):
        values = optimizer.state[fragment.flat]
        if "step" not in values:
            fused = optimizer.defaults.get("fused")
            values["step"] = steps.to(fragment.flat.device) if fused else steps.clone()
            values.update({moment: torch.zeros_like(fragment.flat) for moment in MOMENTS})
        for kind, flat in _flats(engine, fragment, average).items():
            found = pieces.get((kind, fragment.name), [])
            if _fill(flat[fragment.place], fragment.start, found):
                raise InputError(
                    f"{folder}: {kind} of {fragment.name} is not wholly there; "
                    "was the checkpoint made by another experiment?"
                )


def optimizer_steps(engine: Engine) -> int:
    """Optimizer steps taken, as Adam's bias correction counts them."""
    optimizer = engine.optimizer.optimizer
    states = [optimizer.state[flat] for flat in engine.optimizer.single_partition_of_fp32_groups]
    return int(states[0]["step"]) if states[0] else 0


def latest_checkpoint(root: Path, stage: str) -> tuple[Path, dict] | None:
    """The newest valid checkpoint of a stage and its state, the same on every rank; rank 0 reports
    damaged ones, which are skipped."""

    def newest() -> tuple[Path, dict] | None:
        for folder in checkpoints(root, stage):
            problem = check(folder)
            if problem is None:
                return folder, read_state(folder)
            log_line(f"vlmds: {folder}: damaged checkpoint passed over: {problem}")
        return None

    return on_main(newest)


def checkpoint_name(stage: str, step: int) -> str:
    return f"{stage}-{step:07d}"


def checkpoints(root: Path, stage: str) -> list[Path]:
    """A stage's checkpoint folders, newest first."""
    return sorted((p for p in root.glob(f"{stage}-*") if p.name[len(stage) + 1 :].isdigit()), reverse=True)


@phase("checking the checkpoint")
def check(folder: Path) -> str | None:
    """Why the checkpoint cannot be used, or None."""
    try:
        meta = json.loads((folder / "checkpoint.json").read_text())
        if meta["version"] != VERSION:
            return f"format version {meta['version']}, this vlmds reads {VERSION}"
        for entry in meta["files"]:
            path = folder / entry["file"]
            if path.stat().st_size != entry["bytes"]:
                return f"{path.name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if sha256_of(path) != entry["sha256"]:
                return f"{path.name} does not have the sha256 of checkpoint.json"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def read_state(folder: Path) -> dict:
    return json.loads((folder / "checkpoint.json").read_text())["state"]


def _flats(engine: Engine, fragment: _Fragment, average: WeightAverage | None) -> dict[str, Tensor]:
    """Kind of tensor -> the flat partition of the fragment's group with that kind."""
    values = engine.optimizer.optimizer.state[fragment.flat]
    flats = {WEIGHT: fragment.flat.data, **{moment: values[moment] for moment in MOMENTS}}
    if average is not None:
        flats[AVERAGE] = average.flats[fragment.group]
    return flats


def _fragments(engine: Engine) -> Iterator[_Fragment]:
    """The pieces of parameters in this rank's partitions, in the order of the parameter groups."""
    names = {id(p): name for name, p in engine.module.named_parameters()}
    zero = engine.optimizer
    groups = zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)
    for group, (flat, params) in enumerate(groups):
        for param in params:
            mapping = param._hp_mapping  # type: ignore[attr-defined]  # set by DeepSpeed
            if mapping is not None:  # else the whole parameter is another rank's
                place = mapping.hp_fragment_address
                yield _Fragment(
                    names[id(param)],
                    mapping.lp_fragment_address.start,
                    group,
                    flat,
                    slice(place.start, place.start + place.numel),
                )


def _fill(target: Tensor, start: int, pieces: list[tuple[int, int, Path, str]]) -> int:
    """Copy elements [start, start + len(target)) from the pieces. Returns how many were not found."""
    end, missing = start + len(target), len(target)
    for first, length, path, key in pieces:
        low, high = max(start, first), min(end, first + length)
        if low < high:
            with safe_open(path, "pt") as file:
                piece = file.get_slice(key)[low - first : high - first]
            target[low - start : high - start].copy_(piece)
            missing -= high - low
    return missing
