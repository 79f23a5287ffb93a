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
import shutil
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
from vlmds.distributed.watchdog import doing
from vlmds.errors import InputError
from vlmds.evaluation.blind import VIDEOS, blind_tests
from vlmds.evaluation.metrics import describe_captions, score_captions, summarise, tokenizers, undefined_metrics
from vlmds.evaluation.saved import FORMAT, VERSION
from vlmds.evaluation.scoring import ClipScorer, ClipText, evaluated_positions, read_text, swap_videos, thumbnail_jpeg
from vlmds.experiments.differences import changed_settings, differing_keys
from vlmds.experiments.schema import Experiment
from vlmds.files import absolute, write
from vlmds.inference.options import GenerationOptions, caption_settings
from vlmds.inference.video_captioner import VideoCaptioner
from vlmds.models.artifact import artifact_experiment, read_artifact, weights_sha256
from vlmds.models.assemble import Model
from vlmds.permissions import check_writable
from vlmds.runs.folder import HARMLESS, final_artifact
from vlmds.runs.rank_jsonl import RankJsonl, json_line

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
    batch_size: int = 8,
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
    texts = _read_texts(reader, positions)
    scorer = ClipScorer(experiment, model, texts, swap_videos(texts), batch_size=batch_size, generation=generation)
    parts = _parts(folder)
    # Rank 0 alone reads the finished clips: another rank may have begun to write by then.
    finished = ranks.on_main(lambda: [*_by_position(parts.read())])
    todo = sorted(set(positions) - set(finished))
    if finished:
        _say(f"{folder}: {len(finished)} of {counted(len(positions), 'clip')} are done already")
    shown = {positions[number] for number in evaluated_positions(len(positions), THUMBNAILS)}
    _score_share(scorer, reader, todo, folder, parts, shown)
    device = ranks.device_name(next(model.captioner.projector.parameters()).device)
    # Also a barrier over gloo, whose timeout is init_distributed's.
    captioned, seconds, devices = zip(*ranks.gather((scorer.captioned, scorer.seconds, device)), strict=True)

    def finish() -> None:
        records = [*_by_position(parts.read()).values()]
        result, predictions = summarise_records(records, texts, scorer)
        result["model"] = model_facts(model)
        result["timing"] = {
            "seconds": round(time.perf_counter() - started, 1),
            "ranks": ranks.rank_and_world()[1],
            "resumed": bool(finished),
            # Of this start: clips, and seconds of CLIP and generation, both added up over the ranks.
            "captioned": sum(captioned),
            "captioning_seconds": round(sum(seconds), 3),
            "batch_size": batch_size,
            "devices": sorted({*devices}),
        }
        _save(folder, {"format": FORMAT, "version": VERSION, "settings": settings, **result}, predictions, records)

    with phase("computing the metrics"):
        ranks.on_main(finish)


def evaluate_subset(
    experiment: Experiment,
    model: Model,
    reader: SampleReader,
    *,
    clips: int = 64,
    samples: int = 4,
    batch_size: int = 8,
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
        texts = _read_texts(reader, positions)
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


def summarise_records(
    records: Sequence[dict], texts: Sequence[ClipText], scorer: ClipScorer
) -> tuple[dict[str, Any], list[dict]]:
    """(the part of metrics.json about all clips, the lines of predictions.jsonl).

    Raises:
        InputError: not one clip could be read.
    """
    doing("computing the metrics")
    by_position = {r["position"]: r for r in records if "unreadable" not in r}
    read = [text for text in texts if text.position in by_position]
    if not read:
        raise InputError("no clip of the split could be read; see ledger.jsonl")
    records_read = [by_position[text.position] for text in read]
    captions = [r["caption"] for r in records_read]
    scores = score_captions(captions, [text.captions for text in read])
    borrowed = {int(p): value for r in records_read for p, value in r["lent"].items()}
    partner = {int(p): r["caption"] for r in records_read for p in r["lent"]}
    blank = scorer.blank_captions([text.prompt for text in read])
    predictions = []
    for number, (text, record) in enumerate(zip(read, records_read, strict=True)):
        predictions.append(
            {
                "key": text.key,
                "position": text.position,
                "source": text.source,
                "references": text.captions,
                "caption": record["caption"],
                "duration": text.duration,
                "scores": {name: round(float(m.per_clip[number]), 6) for name, m in scores.items()},
                "statistics": {
                    name: m.statistics[number].tolist() for name, m in scores.items() if m.statistics.shape[1] > 1
                },
                "caption_log_probability": record["caption_log_probability"],
                "reference_log_probability": {
                    name: pair and pair[0] / pair[1]
                    for name, pair in (
                        ("real", record["real"]),
                        ("shuffled", borrowed.get(text.position)),
                        ("blank", record["blank"]),
                        *((name, record[name]) for name in scorer.orders if name in record),
                    )
                },
                "blind_captions": {"shuffled": partner.get(text.position), "blank": blank[text.prompt]},
            }
        )
    result = {
        "clips": len(read),
        "unreadable": len(records) - len(read),
        "metrics": summarise(scores, [text.source for text in read]),
        "undefined": undefined_metrics(scores),
        "captions": describe_captions(captions),
        "looking": blind_tests(read, records_read, captions, borrowed, partner, blank),
    }
    return result, predictions


def model_facts(model: Model) -> dict[str, int]:
    """Visual tokens per clip, and the numbers of trained parameters."""
    adapter = sum(p.numel() for n, p in model.captioner.llm.named_parameters() if "lora_" in n)
    projector = sum(p.numel() for p in model.captioner.projector.parameters())
    return {
        "visual_tokens": model.captioner.projector.num_tokens,
        "projector_parameters": projector,
        "adapter_parameters": adapter,
    }


def evaluation_table(metrics: dict) -> str:
    """metrics.json for a terminal."""
    blind = metrics["looking"]
    lines = [
        f"{counted(metrics['clips'], 'clip')}, {metrics['unreadable']:,} unreadable",
        f"{'metric':<20}{'value':>9}{'95% interval':>20}{'shuffled':>10}{'blank':>9}",
    ]

    def add(name: str, value: str, span: str, gaps: dict[str, dict]) -> None:
        blind_values = (f"{gaps[test]['blind']:.2f}" if test in gaps else "–" for test in ("shuffled", "blank"))
        lines.append(f"{name:<20}{value:>9}{span:>20}{next(blind_values):>10}{next(blind_values):>9}")

    for name, own in metrics["metrics"].items():
        # The interval is over the clips: one clip has none.
        span = f"{own['low']:.2f} … {own['high']:.2f}" if metrics["clips"] > 1 else "–"
        add(
            name,
            f"{own['value']:.2f}",
            span,
            {test: gaps[name] for test, gaps in blind["metrics"].items() if name in gaps},
        )
    for name in metrics.get("undefined", ()):
        lines.append(f"{name:<20}undefined: the references of the clips do not differ")
    add("caption loss", next((f"{gap['own']:.2f}" for gap in blind["loss"].values()), "–"), "", blind["loss"])
    lines.append(f"{'likelihood lost with':<20}{'share':>9}{'95% interval':>20}")
    for name, (english, _) in VIDEOS.items():
        if "share" in (gap := blind["loss"].get(name, {})):
            span = f"{gap['share_low']:.1%} … {gap['share_high']:.1%}"
            lines.append(f"{english:<20}{gap['share']:>9.1%}{span:>20}")
    lines += [f"WARNING: {warning}" for warning in blind["warnings"]]
    return "\n".join(lines)


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


def _read_texts(reader: SampleReader, positions: Sequence[int]) -> list[ClipText]:
    """The texts of the clips that can be read."""
    with phase("reading the captions", len(positions), "clips") as progress:
        texts = []
        for position in positions:
            texts.append(read_text(reader, position))
            progress.advance()
    return [text for text in texts if isinstance(text, ClipText)]


def _prepare(folder: Path, settings: dict, again: bool) -> bool:
    """Prepare the folder; True if it has a finished evaluation with these settings.

    Raises:
        InputError: it has one with other settings.
    """
    check_writable(folder, "--output", ("parts", "thumbnails"))
    path = folder / "settings.json"
    changed: dict[str, str] = {}
    if path.is_file() and not again:
        try:
            changed = changed_settings(json.loads(path.read_text(encoding="utf-8")), settings)
        except ValueError:
            raise InputError(f"{path}: damaged; --again repeats the evaluation") from None
        for key in PLACES:
            changed.pop(key, None)
        if other := [text for key, text in changed.items() if key not in OUTDATED]:
            raise InputError(
                f"{folder}: was evaluated with other settings ({'; '.join(other)}); "
                "choose another place with --as NAME, or replace it with --again"
            )
        if not changed and (folder / "metrics.json").is_file():
            return True
    if changed or again:
        for name in ("parts", "thumbnails"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("metrics.json", "predictions.jsonl", "ledger.jsonl"):
            (folder / name).unlink(missing_ok=True)
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    return False


def _parts(folder: Path) -> RankJsonl:
    return RankJsonl(folder / "parts" / "00000.jsonl", "", ".jsonl")


def _by_position(records: Sequence[dict]) -> dict[int, dict]:
    """One record per clip, in the order of the data."""
    found = {record["position"]: record for record in records}
    return dict(sorted(found.items()))


def _save(output: Path, metrics: dict, predictions: list[dict], records: list[dict]) -> None:
    bad = [r for r in records if "unreadable" in r]
    write(output / "ledger.jsonl", "".join(map(json_line, bad)))
    write(output / "predictions.jsonl", "".join(map(json_line, predictions)))
    write(output / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    shutil.rmtree(output / "parts", ignore_errors=True)  # NFS keeps what someone has open


def _folder_name(run: Path, dataset: Dataset, split: str) -> str:
    record = run / "run.json"
    own = record.is_file() and json.loads(record.read_text())["data_fingerprint"]
    return split if own == dataset.fingerprint else f"{Path(dataset.root).name}-{split}"


def _say(text: str) -> None:
    if ranks.rank_and_world()[0] == 0:
        log_line(f"vlmds: {text}")
