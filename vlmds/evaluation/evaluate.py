"""Evaluation of a run: its captions of a packed dataset, scored.

    predictions.jsonl   one line per clip, in the order of the data
    metrics.json        metrics with 95% intervals, the blind tests, and all settings
    thumbnails/         a strip of frames of some clips, for the report
    ledger.jsonl        clips that could not be read
    settings.json       the settings of the evaluation, also of one in progress
    parts/              finished clips of each rank; removed at the end

A stopped evaluation goes on with the missing clips, on any number of ranks.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlmds.console.progress import log_line, phase, silenced
from vlmds.console.text import counted
from vlmds.data.dataset import Dataset, open_dataset
from vlmds.data.features import check_features
from vlmds.data.loader import SampleReader
from vlmds.distributed import ranks
from vlmds.errors import InputError
from vlmds.evaluation.metrics import tokenizers
from vlmds.evaluation.results import (
    begin,
    by_position,
    changed_since,
    model_facts,
    parts_of,
    save_results,
    summarise_records,
    timing_of_ranks,
)
from vlmds.evaluation.scoring import ClipScorer, evaluated_positions, read_texts, swap_videos, thumbnail_jpeg
from vlmds.experiments.differences import differing_keys
from vlmds.experiments.schema import Experiment
from vlmds.files import absolute, write
from vlmds.inference.options import BATCH_SIZE, GenerationOptions, caption_settings
from vlmds.inference.video_captioner import VideoCaptioner
from vlmds.models.artifact import artifact_experiment, read_artifact, weights_sha256
from vlmds.models.assemble import Model
from vlmds.permissions import check_writable
from vlmds.runs.folder import HARMLESS, final_artifact
from vlmds.runs.rank_jsonl import RankJsonl

THUMBNAILS = 500
OUTDATED = ("artifact", "weights_sha256")  # newer weights of the run replace an evaluation
PLACES = ("run", "data")  # may be written in several ways; the hashes decide


def evaluate_run(
    run: str | Path,
    *,
    data: str | None = None,
    split: str | None = None,
    output: str | Path | None = None,
    name: str | None = None,
    clips: int | None = None,
    batch_size: int = BATCH_SIZE,
    generation: GenerationOptions = GenerationOptions(),
    device: str | None = None,
    overrides: Sequence[str] = (),
    again: bool = False,
    progress: bool = True,
) -> Path:
    """Evaluate a run, on all ranks that the launcher started; returns the folder of the results.

    Args:
        run: run folder or artifact. data: packed dataset (default: the run's own).
        split: default: "val", or the only one. clips: evaluate so many, evenly spaced.
        output: default: RUN/evaluation/NAME.
        name: default: SPLIT, or DATA-SPLIT for other data than the run's.
        again: repeat a finished evaluation, or replace one with other settings.
        progress: report progress on stderr.

    Raises:
        InputError: no finished run, no such data or split, or an evaluation with other settings is
            in the folder.
    """
    if name is not None and (output is not None or not re.fullmatch(r"\w[\w.-]*", name)):
        raise InputError(f"--as {name}: must be one name, of letters, digits, - _ . and without --output")
    with silenced(not progress):
        started = time.perf_counter()
        artifact = read_artifact(final_artifact(Path(run)))
        experiment = artifact_experiment(artifact, [*overrides, *([f"data.path={absolute(data)}"] if data else [])])
        if "RANK" in os.environ:
            device = str(ranks.join_ranks(experiment))
        dataset = open_dataset(experiment.data)
        split = dataset.choose_split(split)
        folder = Path(output or Path(run) / "evaluation" / (name or _folder_name(Path(run), dataset, split)))
        settings: dict[str, Any] = {
            "run": str(run),
            "artifact": artifact.folder.name,
            "weights_sha256": weights_sha256(artifact),
            "data": str(dataset.root),
            "data_fingerprint": dataset.fingerprint,
            "split": split,
            "clips": clips,
            **caption_settings(experiment, generation),
            "tokenisation": [level.name for level in tokenizers()],
        }
        if changed := differing_keys(artifact.trained, experiment, but=(*HARMLESS, "data.blend")):
            settings["changed"] = changed
        if ranks.on_main(lambda: _prepare(folder, settings, again)):
            _say(f"{folder}: evaluated already with these settings (--again repeats it)")
            return folder
        captioner = VideoCaptioner.from_pretrained(artifact, device=device, overrides=overrides)
        check_features(dataset, experiment, captioner.model.tower)
        reader = SampleReader(
            dataset,
            split,
            experiment.data.num_frames,
            captioner.model.image_size,
            shuffle=False,
            decode_seconds=experiment.data.decode_seconds,
            fit=experiment.data.fit,
        )
        _evaluate(folder, settings, experiment, captioner.model, reader, batch_size, generation, started)
    return folder


def _evaluate(
    folder: Path,
    settings: dict[str, Any],
    experiment: Experiment,
    model: Model,
    reader: SampleReader,
    batch_size: int,
    generation: GenerationOptions,
    started: float,
) -> None:
    """Score the clips that the folder lacks, on all ranks, and write the results."""
    positions = evaluated_positions(len(reader), settings["clips"])
    texts = read_texts(reader, positions)
    scorer = ClipScorer(experiment, model, texts, swap_videos(texts), batch_size=batch_size, generation=generation)
    parts = parts_of(folder)
    # Rank 0 alone reads the finished clips: another rank may have begun to write by then.
    finished = ranks.on_main(lambda: [*by_position(parts.read())])
    todo = sorted(set(positions) - set(finished))
    if finished:
        _say(f"{folder}: {len(finished)} of {counted(len(positions), 'clip')} are done already")
    shown = {positions[number] for number in evaluated_positions(len(positions), THUMBNAILS)}
    _score_share(scorer, reader, todo, folder, parts, shown)
    device = next(model.captioner.projector.parameters()).device
    # Also a barrier over gloo, whose timeout is init_distributed's.
    timing = timing_of_ranks(scorer.captioned, scorer.seconds, device, resumed=bool(finished), batch_size=batch_size)

    def finish() -> None:
        records = [*by_position(parts.read()).values()]
        result, predictions = summarise_records(records, texts, scorer)
        result["model"] = model_facts(model)
        result["timing"] = {"seconds": round(time.perf_counter() - started, 1), **timing}
        save_results(folder, settings, result, predictions, [r for r in records if "unreadable" in r])

    with phase("computing the metrics"):
        ranks.on_main(finish)


def evaluate_subset(
    experiment: Experiment,
    model: Model,
    reader: SampleReader,
    *,
    clips: int = 64,
    samples: int = 4,
    batch_size: int = BATCH_SIZE,
    generation: GenerationOptions = GenerationOptions(max_new_tokens=64),
) -> dict[str, Any]:
    """Score a model in memory, also during training, on a fixed subset; on all ranks together.

    The model's mode is restored. Its weights, its trainable parameters and the random state do not
    change.

    Args:
        reader: unshuffled, of the split. clips: evenly spaced. samples: captions to show.

    Returns:
        On every rank: the content of metrics.json, and "samples": [{key, references, caption}].
    """
    captioner = model.captioner
    was_training = captioner.training
    captioner.eval()
    try:
        positions = evaluated_positions(len(reader), clips)
        texts = read_texts(reader, positions)
        scorer = ClipScorer(experiment, model, texts, swap_videos(texts), batch_size=batch_size, generation=generation)
        rank, world = ranks.rank_and_world()
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws from the CPU's generator
            mine = [r for batch in scorer.batches(reader, positions[rank::world]) for r in batch]
        records = [r for part in ranks.gather(mine) for r in part]
        result, predictions = summarise_records(records, texts, scorer)
    finally:
        captioner.train(was_training)
    shown = evaluated_positions(len(predictions), samples)
    result["samples"] = [{key: predictions[i][key] for key in ("key", "references", "caption")} for i in shown]
    return result


def _score_share(
    scorer: ClipScorer, reader: SampleReader, todo: list[int], folder: Path, parts: RankJsonl, shown: set[int]
) -> None:
    """Score this rank's share of the clips, written batch by batch."""

    def thumbnail(position: int, frames: np.ndarray) -> None:
        if position in shown:
            write(folder / "thumbnails" / f"{position:06d}.jpg", thumbnail_jpeg(frames))

    rank, world = ranks.rank_and_world()
    with parts.appender(rank) as file, phase("evaluating", len(todo), "clips", left=True) as progress:
        for records in scorer.batches(reader, todo[rank::world], thumbnail):
            file.add(records)
            # The other ranks are about as far.
            progress.done = min(progress.done + len(records) * world, len(todo))


def _prepare(folder: Path, settings: dict, again: bool) -> bool:
    """Prepare the folder; True if it has a finished evaluation with these settings.

    Raises:
        InputError: it has one with other settings.
    """
    check_writable(folder, "--output", ("parts", "thumbnails"))
    changed = None if again else changed_since(folder, settings)
    if changed is not None:
        for key in PLACES:
            changed.pop(key, None)
        if other := [text for key, text in changed.items() if key not in OUTDATED]:
            raise InputError(
                f"{folder}: was evaluated with other settings ({'; '.join(other)}); "
                "choose another place with --as NAME, or replace it with --again"
            )
        if not changed and (folder / "metrics.json").is_file():
            return True
    begin(folder, settings, afresh=bool(changed or again))
    return False


def _folder_name(run: Path, dataset: Dataset, split: str) -> str:
    record = run / "run.json"
    own = record.is_file() and json.loads(record.read_text())["data_fingerprint"]
    return split if own == dataset.fingerprint else f"{Path(dataset.root).name}-{split}"


def _say(text: str) -> None:
    if ranks.rank_and_world()[0] == 0:
        log_line(f"vlmds: {text}")
