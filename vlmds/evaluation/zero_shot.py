"""Evaluation of a model that vlmds did not train, by its captions of a packed dataset.

The clips, their spans, the choice of frames and the prompt are those of a run's evaluation. A stopped evaluation
goes on with the missing clips, on any number of ranks.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlmds.console.progress import log_line, phase
from vlmds.data.dataset import Dataset, open_dataset
from vlmds.data.exact_reader import Unreadable, read_exactly
from vlmds.data.loader import Sample, SampleReader
from vlmds.distributed import ranks
from vlmds.distributed.watchdog import doing
from vlmds.errors import InputError
from vlmds.evaluation.outside import outside_folder, outside_record, outside_settings, refuse_other
from vlmds.evaluation.outside_record import MODEL, write_outside
from vlmds.evaluation.results import save_results, scored
from vlmds.evaluation.scoring import ClipText, evaluated_positions, read_texts
from vlmds.experiments.schema import DataConfig
from vlmds.files import write
from vlmds.inference.options import GenerationOptions
from vlmds.inference.video_captioner import choose_device
from vlmds.inference.zero_shot import SIDE, ZeroShotCaptioner, without_bars
from vlmds.models.outside import OutsideModel, outside_model
from vlmds.runs.rank_jsonl import RankJsonl
from vlmds.video.fit import fit_of


def evaluate_model(
    model: str,
    *,
    data: str,
    name: str | None = None,
    split: str | None = None,
    output: Path | None = None,
    clips: int | None = None,
    batch_size: int = 8,
    num_frames: int | None = None,
    prompt: str | None = None,
    dtype: str = "bfloat16",
    generation: GenerationOptions = GenerationOptions(),
    device: str | None = None,
    again: bool = False,
) -> Path:
    """Caption a split with another model and score the captions, on all ranks that the launcher started; returns the
    folder of the results.

    Args:
        model: folder, or name on the hub (``owner/name``, ``owner/name@revision``).
        name: in comparisons (default: the last part of the model's name). output: default: runs/NAME.
        num_frames: of each clip (default: those of a frames store, else ``data.num_frames``).
        prompt: of clips without one of their own (default: ``data.prompt``).
        again: repeat a finished evaluation, or replace one with other settings.

    Raises:
        InputError: no such model, data or split; a model that takes no pictures; a features store.
    """
    if "RANK" in os.environ:
        device = str(ranks.init_distributed())
    name = name or Path(model.partition("@")[0]).name
    folder = outside_folder(name, output)
    config = DataConfig(path=data)
    dataset = open_dataset(config)
    split = dataset.choose_split(split)
    reader = _reader(dataset, split, num_frames or config.num_frames, num_frames is not None)
    prompt = prompt or config.prompt
    found = outside_model(model)
    settings: dict[str, Any] = outside_settings(dataset, split, clips) | {
        "model": found.name,
        "revision": found.revision,
        "dtype": dtype,
        "prompt": prompt,
        "num_frames": reader.num_frames,
        "generation": asdict(generation),
    }
    place = folder / "evaluation" / split
    if ranks.on_main(lambda: _prepare(folder, name, place, found, settings, again)):
        return folder
    captioner = ZeroShotCaptioner(found.folder, found.name, choose_device(device), dtype, generation)
    texts = read_texts(reader, evaluated_positions(len(reader), clips))
    if ranks.rank_and_world()[0] == 0:
        log_line(
            f"vlmds: {found.name}: a clip's frames are given as {'a video' if captioner.takes_videos else 'pictures'}"
        )
    for text in {text.prompt or prompt for text in texts}:
        captioner.check_prompt(text)
    _evaluate(place, settings, captioner, reader, texts, prompt, batch_size)
    return folder


def _reader(dataset: Dataset, split: str, num_frames: int, given: bool) -> SampleReader:
    """Of frames whose longer side has SIDE pixels; of a frames store as they are stored."""
    meta = dataset.meta
    if dataset.store == "features":
        raise InputError(f"{dataset.root}: a features store has no pictures; give the packed videos, or a frames store")
    if dataset.store == "frames":
        if given and num_frames != meta["num_frames"]:
            raise InputError(f"--num-frames {num_frames}: {dataset.root} has {meta['num_frames']} frames of each clip")
        fit = fit_of(meta.get("resizer")) or "crop"
        return SampleReader(dataset, split, meta["num_frames"], meta["image_size"], shuffle=False, fit=fit)
    return SampleReader(dataset, split, num_frames, SIDE, shuffle=False, fit="pad")


def _prepare(folder: Path, name: str, place: Path, model: OutsideModel, settings: dict[str, Any], again: bool) -> bool:
    """Prepare the folder; True if it has a finished evaluation with these settings."""
    record = outside_record(folder, name, MODEL, model.name, revision=model.revision, licence=model.licence)
    refuse_other(place, settings, again)
    parts = _parts(place)
    if again:
        for path in place.glob("parts/*"):
            path.unlink()
        for name in ("metrics.json", "predictions.jsonl"):
            (place / name).unlink(missing_ok=True)
    elif (place / "metrics.json").is_file():
        return True
    parts.path.parent.mkdir(parents=True, exist_ok=True)
    write_outside(folder, record)
    write(place / "settings.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    return False


def _evaluate(
    place: Path,
    settings: dict[str, Any],
    captioner: ZeroShotCaptioner,
    reader: SampleReader,
    texts: Sequence[ClipText],
    prompt: str,
    batch_size: int,
) -> None:
    """Caption the clips that are missing, and write the results."""
    started, parts = time.perf_counter(), _parts(place)
    # Rank 0 alone reads the finished clips: another rank may have begun to write by then.
    finished = ranks.on_main(lambda: [record["position"] for record in parts.read()])
    todo = [text for text in texts if text.position not in set(finished)]
    captioned, seconds = _caption_share(captioner, reader, todo, parts, prompt, batch_size)
    device = ranks.device_name(captioner.device)
    counts, times, memory, devices = zip(
        *ranks.gather((captioned, seconds, _peak_gib(captioner.device), device)), strict=True
    )

    def finish() -> None:
        records = {record["position"]: record for record in parts.read()}
        read = [text for text in texts if "caption" in records.get(text.position, ())]
        if not read:
            raise InputError(f"{place}: no clip of the split could be read")
        bad = [record for record in records.values() if "unreadable" in record]
        result, lines = scored(read, [records[text.position]["caption"] for text in read])
        result["unreadable"] = len(bad)
        result["frames_as"] = "video" if captioner.takes_videos else "pictures"
        result["timing"] = {
            "seconds": round(time.perf_counter() - started, 1),
            "ranks": ranks.rank_and_world()[1],
            "resumed": bool(finished),
            # Of this start: clips, and seconds of the model, both added up over the ranks.
            "captioned": sum(counts),
            "captioning_seconds": round(sum(times), 3),
            "memory_gib": round(max(memory), 2),
            "batch_size": batch_size,
            "devices": sorted({*devices}),
        }
        save_results(place, settings, result, lines, bad)

    with phase("computing the metrics"):
        ranks.on_main(finish)


def _caption_share(
    captioner: ZeroShotCaptioner,
    reader: SampleReader,
    todo: Sequence[ClipText],
    parts: RankJsonl,
    prompt: str,
    batch_size: int,
) -> tuple[int, float]:
    """Caption this rank's share, written batch by batch; (clips, seconds of the model)."""
    rank, world = ranks.rank_and_world()
    mine = {text.position: text for text in todo[rank::world]}
    captioned, seconds = 0, 0.0
    with parts.appender(rank) as file, phase("evaluating", len(todo), "clips", left=True) as progress:
        for items in read_exactly(reader, list(mine), batch_size, DataConfig().num_workers):
            doing("captioning", [item.key for item in items])
            samples = [item for item in items if isinstance(item, Sample)]
            begun = time.perf_counter()
            made = (
                captioner.captions(
                    [_frames(reader, sample) for sample in samples],
                    [mine[sample.position].prompt or prompt for sample in samples],
                    [mine[sample.position].duration for sample in samples],
                )
                if samples
                else []
            )
            captioned, seconds = captioned + len(samples), seconds + time.perf_counter() - begun
            records: list[dict[str, Any]] = [
                {"position": item.position, "key": item.key, "unreadable": item.reason}
                for item in items
                if isinstance(item, Unreadable)
            ]
            records += [
                {"position": sample.position, "key": sample.key, "caption": caption}
                for sample, caption in zip(samples, made, strict=True)
            ]
            file.add(records)
            progress.done = min(progress.done + len(records) * world, len(todo))
            doing("waiting for clips to be read")
    return captioned, seconds


def _frames(reader: SampleReader, sample: Sample) -> np.ndarray:
    """The clip's frames without the bars of padding, uint8 [F, 3, H, W]."""
    assert sample.frames is not None  # of a features store, which is refused
    row = reader.row(sample.position)
    return without_bars(sample.frames, row.width, row.height) if reader.fit == "pad" else sample.frames


def _parts(place: Path) -> RankJsonl:
    return RankJsonl(place / "parts" / "00000.jsonl", "", ".jsonl")


def _peak_gib(device: torch.device) -> float:
    """Of the GPU's memory, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
