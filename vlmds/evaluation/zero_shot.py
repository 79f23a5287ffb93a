"""Evaluation of a model that vlmds did not train, by its captions of a packed dataset.

The clips, their spans, the choice of frames and the prompt are those of a run's evaluation. A stopped evaluation
goes on with the missing clips, on any number of ranks.
"""

from __future__ import annotations

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
from vlmds.data.dataset import open_dataset
from vlmds.data.exact_reader import Unreadable, read_exactly
from vlmds.data.loader import Sample, SampleReader, picture_reader
from vlmds.distributed import ranks
from vlmds.distributed.watchdog import doing
from vlmds.errors import InputError
from vlmds.evaluation.outside import outside_folder, outside_record, outside_settings, refuse_other
from vlmds.evaluation.outside_record import MODEL, write_outside
from vlmds.evaluation.results import begin, by_position, parts_of, save_results, scored, timing_of_ranks
from vlmds.evaluation.scoring import ClipText, evaluated_positions, read_texts
from vlmds.experiments.schema import DataConfig
from vlmds.inference.options import BATCH_SIZE, GenerationOptions
from vlmds.inference.video_captioner import choose_device
from vlmds.inference.zero_shot import SIDE, ZeroShotCaptioner, without_bars
from vlmds.models.outside import OutsideModel, outside_model
from vlmds.runs.rank_jsonl import RankJsonl


def evaluate_model(
    model: str,
    *,
    data: str,
    name: str | None = None,
    split: str | None = None,
    output: Path | None = None,
    clips: int | None = None,
    batch_size: int = BATCH_SIZE,
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
    reader = picture_reader(dataset, split, num_frames or config.num_frames, SIDE)
    if num_frames not in (None, reader.num_frames):
        raise InputError(f"--num-frames {num_frames}: {dataset.root} has {reader.num_frames} frames of each clip")
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
    positions = evaluated_positions(len(reader), clips)
    texts = read_texts(reader, positions)
    if ranks.rank_and_world()[0] == 0:
        log_line(
            f"vlmds: {found.name}: a clip's frames are given as {'a video' if captioner.takes_videos else 'pictures'}"
        )
    for text in {text.prompt or prompt for text in texts}:
        captioner.check_prompt(text)
    _evaluate(place, settings, captioner, reader, positions, texts, prompt, batch_size)
    return folder


def _prepare(folder: Path, name: str, place: Path, model: OutsideModel, settings: dict[str, Any], again: bool) -> bool:
    """Prepare the folder; True if it has a finished evaluation with these settings."""
    record = outside_record(folder, name, MODEL, model.name, revision=model.revision, licence=model.licence)
    refuse_other(place, settings, again)
    if not again and (place / "metrics.json").is_file():
        return True
    write_outside(folder, record)
    begin(place, settings, afresh=again)
    return False


def _evaluate(
    place: Path,
    settings: dict[str, Any],
    captioner: ZeroShotCaptioner,
    reader: SampleReader,
    positions: Sequence[int],
    texts: Sequence[ClipText],
    prompt: str,
    batch_size: int,
) -> None:
    """Caption the clips that are missing, and write the results."""
    started, parts = time.perf_counter(), parts_of(place)
    # Rank 0 alone reads the finished clips: another rank may have begun to write by then.
    finished = ranks.on_main(lambda: [*by_position(parts.read())])
    todo = sorted({*positions} - {*finished})
    captioned, seconds = _caption_share(captioner, reader, todo, parts, prompt, batch_size)
    timing = timing_of_ranks(captioned, seconds, captioner.device, resumed=bool(finished), batch_size=batch_size)
    memory = max(ranks.gather(_peak_gib(captioner.device)))

    def finish() -> None:
        records = by_position(parts.read())
        read = [text for text in texts if "caption" in records.get(text.position, ())]
        if not read:
            raise InputError(f"{place}: no clip of the split could be read")
        bad = [record for record in records.values() if "unreadable" in record]
        result, lines = scored(read, [records[text.position]["caption"] for text in read])
        result["unreadable"] = len(bad)
        result["frames_as"] = "video" if captioner.takes_videos else "pictures"
        result["timing"] = {
            "seconds": round(time.perf_counter() - started, 1),
            **timing,
            "memory_gib": round(memory, 2),
        }
        save_results(place, settings, result, lines, bad)

    with phase("computing the metrics"):
        ranks.on_main(finish)


def _caption_share(
    captioner: ZeroShotCaptioner,
    reader: SampleReader,
    todo: Sequence[int],
    parts: RankJsonl,
    prompt: str,
    batch_size: int,
) -> tuple[int, float]:
    """Caption this rank's share, written batch by batch; (clips, seconds of the model)."""
    rank, world = ranks.rank_and_world()
    captioned, seconds = 0, 0.0
    with parts.appender(rank) as file, phase("evaluating", len(todo), "clips", left=True) as progress:
        for items in read_exactly(reader, todo[rank::world], batch_size, DataConfig().num_workers):
            doing("captioning", [item.key for item in items])
            samples = [item for item in items if isinstance(item, Sample)]
            begun = time.perf_counter()
            made = (
                captioner.captions(
                    [_frames(reader, sample) for sample in samples],
                    [sample.prompt or prompt for sample in samples],
                    [_seconds(reader, sample) for sample in samples],
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


def _seconds(reader: SampleReader, sample: Sample) -> float | None:
    row = reader.row(sample.position)
    return None if row.duration is None else row.span[1] - row.span[0]


def _peak_gib(device: torch.device) -> float:
    """Of the GPU's memory, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
