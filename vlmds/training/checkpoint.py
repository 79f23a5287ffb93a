"""Checkpoints: the trainables in fp32, their Adam moments, and where the stage stands.

    checkpoints/align-0000200/
        rank-00000.safetensors ...   what each rank's ZeRO-2 partition holds, cut by parameter
        checkpoint.json              written last: the state, and size and sha256 of each file

A tensor is named ``exp_avg/projector.net.weight/4096``: what it is, of which parameter, from which
element on. Names instead of flat partitions make a checkpoint loadable at any world size; frozen
weights are not in it. A folder gets its name only when all in it is on disk, so the newest folder
that passes its checksums is the latest checkpoint: there is no pointer that could lie.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmds.data.index import sha256_of
from vlmds.errors import InputError
from vlmds.files import publish_folder, sync_file, temporary_folder
from vlmds.training.ranks import gather, on_main

VERSION = 1
WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Fragment:
    """The part of a parameter that this rank's partition holds, from element ``start`` on."""

    name: str
    start: int
    flat: nn.Parameter  # the partition of its group, fp32
    place: slice  # in flat


def save_checkpoint(folder: Path, engine, state: dict) -> str | None:
    """Write a checkpoint; all ranks call it.

    Args:
        folder: its final name, on a file system that all ranks share.
        state: JSON values, the same on every rank; ``load_checkpoint`` gives them back.

    Returns:
        None, or why it could not be written, the same on every rank; then nothing stands at
        ``folder`` and earlier checkpoints are untouched.
    """
    rank = dist.get_rank()
    temporary = folder.with_name(f".{folder.name}.tmp")
    problem = None
    if rank == 0:
        try:
            temporary_folder(folder)
        except OSError as error:
            problem = str(error)
    problem = _first_problem(problem)
    entry = None
    if problem is None:
        path = temporary / f"rank-{rank:05d}.safetensors"
        try:
            save_file(_tensors(engine), path)
            sync_file(path)
            entry = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
        except (OSError, SafetensorError) as error:
            problem = f"{path}: {error}"
        entries = gather(entry)
        problem = _first_problem(problem)
    if rank == 0:
        try:
            if problem is None:
                meta = {"version": VERSION, "state": state, "files": entries}
                (temporary / "checkpoint.json").write_text(json.dumps(meta, ensure_ascii=False))
                publish_folder(temporary, folder)
        except OSError as error:
            problem = str(error)
        if problem is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return _first_problem(problem)


def load_checkpoint(folder: Path, engine) -> None:
    """Put a checkpoint's weights and moments into an engine of any world size; all ranks call it.

    Raises:
        InputError: a parameter of the engine is not, or not wholly, in the checkpoint.
    """
    meta = json.loads((folder / "checkpoint.json").read_text())
    pieces: dict[tuple[str, str], list[tuple[int, int, Path, str]]] = {}
    for entry in meta["files"]:
        with safe_open(folder / entry["file"], "pt") as file:
            for key in file.keys():
                kind, name, start = key.split("/")
                length = file.get_slice(key).get_shape()[0]
                pieces.setdefault((kind, name), []).append(
                    (int(start), length, folder / entry["file"], key))
    optimizer = engine.optimizer.optimizer
    steps = torch.tensor(float(meta["state"]["optimizer_steps"]))
    for fragment in _fragments(engine):
        values = optimizer.state[fragment.flat]
        if "step" not in values:
            fused = optimizer.defaults.get("fused")
            values["step"] = steps.to(fragment.flat.device) if fused else steps.clone()
            values.update({moment: torch.zeros_like(fragment.flat) for moment in MOMENTS})
        for kind in (WEIGHT, *MOMENTS):
            target = fragment.flat.data if kind == WEIGHT else values[kind]
            found = pieces.get((kind, fragment.name), [])
            if _fill(target[fragment.place], fragment.start, found):
                raise InputError(f"{folder}: {kind} of {fragment.name} is not wholly there; "
                                 "was the checkpoint made by another experiment?")
    engine.optimizer.update_lp_params()


def optimizer_steps(engine) -> int:
    """Optimizer steps taken, as Adam's bias correction counts them."""
    optimizer = engine.optimizer.optimizer
    states = [optimizer.state[flat] for flat in engine.optimizer.single_partition_of_fp32_groups]
    return int(states[0]["step"]) if states[0] else 0


def latest_checkpoint(root: Path, stage: str) -> tuple[Path, dict] | None:
    """The newest valid checkpoint of a stage and its state, the same on every rank; damaged ones
    are named on rank 0 and passed over."""

    def newest() -> tuple[Path, dict] | None:
        for folder in checkpoints(root, stage):
            problem = check(folder)
            if problem is None:
                return folder, read_state(folder)
            print(f"vlmds: {folder}: damaged checkpoint passed over: {problem}", flush=True)
        return None

    return on_main(newest)


def checkpoint_name(stage: str, step: int) -> str:
    return f"{stage}-{step:07d}"


def checkpoints(root: Path, stage: str) -> list[Path]:
    """A stage's checkpoint folders, newest first."""
    return sorted((p for p in root.glob(f"{stage}-*") if p.name[len(stage) + 1 :].isdigit()),
                  reverse=True)


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


def _tensors(engine) -> dict[str, Tensor]:
    tensors = {}
    for fragment in _fragments(engine):
        values = engine.optimizer.optimizer.state[fragment.flat]
        for kind in (WEIGHT, *MOMENTS):
            source = fragment.flat.data if kind == WEIGHT else values[kind]
            piece = source[fragment.place].to("cpu", copy=True)  # not a view of the partition
            tensors[f"{kind}/{fragment.name}/{fragment.start}"] = piece
    return tensors


def _fragments(engine) -> Iterator[_Fragment]:
    """The pieces of parameters in this rank's partitions, in the order of the parameter groups."""
    names = {id(p): name for name, p in engine.module.named_parameters()}
    zero = engine.optimizer
    for flat, params in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True):
        for param in params:
            mapping = param._hp_mapping  # None where the whole parameter is another rank's
            if mapping is not None:
                place = mapping.hp_fragment_address
                yield _Fragment(names[id(param)], mapping.lp_fragment_address.start, flat,
                                slice(place.start, place.start + place.numel))


def _fill(target: Tensor, start: int, pieces: list[tuple[int, int, Path, str]]) -> int:
    """Copy elements [start, start + len(target)) from the pieces; how many were not found."""
    end, missing = start + len(target), len(target)
    for first, length, path, key in pieces:
        low, high = max(start, first), min(end, first + length)
        if low < high:
            with safe_open(path, "pt") as file:
                piece = file.get_slice(key)[low - first : high - first]
            target[low - start : high - start].copy_(piece)
            missing -= high - low
    return missing


def _first_problem(problem: str | None) -> str | None:
    """The first rank's problem that has one, on every rank."""
    return next((p for p in gather(problem) if p is not None), None)
