"""`vlmds evaluate`: a run's captions of a packed dataset, scored.

    predictions.jsonl   one line per clip, in the order of the data
    metrics.json        metrics with 95% intervals, whether the model looks, and all settings
    thumbnails/         a strip of frames of some clips, for the report
    ledger.jsonl        clips that could not be read
    parts/              what each rank has finished; gone when the rest is there

A stopped evaluation goes on with the clips that are missing, whatever the number of ranks.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlmds.console.progress import phase, silenced, tell
from vlmds.console.text import counted
from vlmds.data.dataset import Dataset, open_dataset
from vlmds.data.features import check_features
from vlmds.data.loader import SampleReader
from vlmds.distributed import ranks
from vlmds.distributed.watchdog import doing
from vlmds.errors import InputError
from vlmds.evaluation.blind import looking
from vlmds.evaluation.metrics import describe_captions, score_captions, summarise, tokenizers
from vlmds.evaluation.scoring import ClipScorer, ClipText, evaluated_positions, read_text, swap_videos, thumbnail_jpeg
from vlmds.experiments.reading import load_experiment
from vlmds.experiments.schema import Experiment
from vlmds.files import absolute, check_writable, write
from vlmds.inference.generation import GenerationOptions
from vlmds.inference.video_captioner import VideoCaptioner
from vlmds.models.artifact import weights_sha256
from vlmds.models.assemble import Model
from vlmds.runs.folder import final_artifact

FORMAT, VERSION = "vlmds-evaluation", 1
THUMBNAILS = 500


def evaluate_run(
    run: str | Path,
    *,
    data: str | None = None,
    split: str | None = None,
    output: str | Path | None = None,
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
        output: default: RUN/evaluation/SPLIT, or DATA-SPLIT for other data than the run's.
        again: evaluate anew what is finished already. progress: say on stderr how far it is.

    Raises:
        InputError: no finished run, no such data or split.
    """
    with silenced(not progress):
        return _evaluate_run(Path(run), data, split, output, clips, batch_size, generation, device, overrides, again)


def _evaluate_run(
    run: Path,
    data: str | None,
    split: str | None,
    output: str | Path | None,
    clips: int | None,
    batch_size: int,
    generation: GenerationOptions,
    device: str | None,
    overrides: Sequence[str],
    again: bool,
) -> Path:
    started = time.perf_counter()
    if "RANK" in os.environ:
        device = str(ranks.init_distributed())
    artifact = final_artifact(run)
    experiment = load_experiment(
        artifact / "experiment.yaml", [*overrides, *([f"data.path={absolute(data)}"] if data else [])]
    )
    dataset = open_dataset(experiment.data)
    split = dataset.choose_split(split)
    output = Path(output or run / "evaluation" / _folder_name(run, dataset, split))
    settings = {
        "run": str(run),
        "artifact": artifact.name,
        "weights_sha256": weights_sha256(artifact),
        "data": str(dataset.root),
        "data_fingerprint": dataset.fingerprint,
        "split": split,
        "clips": clips,
        "prompt": experiment.data.prompt,
        "num_frames": experiment.data.num_frames,
        "generation": asdict(generation),
        "vision": experiment.vision.model,
        "llm": experiment.llm.model,
        "llm_precision": "nf4" if experiment.llm.load_in_4bit else experiment.llm.dtype,
        "tokenisation": [level.name for level in tokenizers()],
    }
    if ranks.on_main(lambda: _prepare(output, settings, again)):
        _say(f"{output}: evaluated already with these settings (--again repeats it)")
        return output
    captioner = VideoCaptioner.from_pretrained(artifact, device=device, overrides=overrides)
    check_features(dataset, experiment, captioner.model.tower)
    reader = SampleReader(
        dataset,
        split,
        experiment.data.num_frames,
        captioner.model.image_size,
        shuffle=False,
        decode_seconds=experiment.data.decode_seconds,
    )
    positions = evaluated_positions(len(reader), clips)
    texts = _read_texts(reader, positions)
    scorer = ClipScorer(
        experiment, captioner.model, texts, swap_videos(texts), batch_size=batch_size, generation=generation
    )
    # Rank 0 alone reads what is done: another rank may have begun to write by then.
    finished = ranks.on_main(lambda: [r["position"] for r in _read_parts(output)])
    todo = sorted(set(positions) - set(finished))
    if finished:
        _say(f"{output}: {len(finished)} of {counted(len(positions), 'clip')} are done already")
    shown = set(evaluated_positions(len(positions), THUMBNAILS))
    shown = {position for number, position in enumerate(positions) if number in shown}
    _score_share(scorer, reader, todo, output, shown)
    ranks.gather(None)  # a barrier over gloo, whose timeout is init_distributed's

    def finish() -> None:
        records = _read_parts(output)
        result, predictions = summarise_records(records, texts, scorer)
        result["model"] = model_facts(captioner.model)
        result["timing"] = {
            "seconds": round(time.perf_counter() - started, 1),
            "ranks": ranks.place()[1],
            "resumed": bool(finished),
        }
        _save(output, {"format": FORMAT, "version": VERSION, "settings": settings, **result}, predictions, records)

    with phase("computing the metrics"):
        ranks.on_main(finish)
    return output


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
    """Score a model that is in memory, in training too, on a fixed subset; on all ranks together.

    The model's mode is restored; neither its weights nor what is trainable nor the random state
    change.

    Args:
        reader: unshuffled, of the split. clips: evenly spaced. samples: captions to show.

    Returns:
        On every rank: as metrics.json, and "samples": [{key, references, caption}].
    """
    captioner = model.captioner
    was_training = captioner.training
    captioner.eval()
    try:
        positions = evaluated_positions(len(reader), clips)
        texts = _read_texts(reader, positions)
        scorer = ClipScorer(experiment, model, texts, swap_videos(texts), batch_size=batch_size, generation=generation)
        rank, world = ranks.place()
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
    """(what metrics.json says of all clips, the lines of predictions.jsonl).

    Raises:
        InputError: not one clip could be read.
    """
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
                    )
                },
                "blind_captions": {"shuffled": partner.get(text.position), "blank": blank[text.prompt]},
            }
        )
    result = {
        "clips": len(read),
        "unreadable": len(records) - len(read),
        "metrics": summarise(scores),
        "captions": describe_captions(captions),
        "looking": looking(read, records_read, captions, borrowed, partner, blank),
    }
    return result, predictions


def model_facts(model: Model) -> dict[str, int]:
    """Visual tokens per clip, and the parameters that training made."""
    adapter = sum(p.numel() for n, p in model.captioner.llm.named_parameters() if "lora_" in n)
    projector = sum(p.numel() for p in model.captioner.projector.parameters())
    return {
        "visual_tokens": model.captioner.projector.num_tokens,
        "projector_parameters": projector,
        "adapter_parameters": adapter,
    }


def read_evaluation(folder: str | Path) -> tuple[dict, list[dict]]:
    """(metrics.json, the lines of predictions.jsonl).

    Raises:
        InputError: not finished, or damaged.
    """
    folder = Path(folder)
    if (folder / "parts").is_dir() and not (folder / "metrics.json").is_file():
        raise InputError(f"{folder}: the evaluation is not finished; run vlmds evaluate again")
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        # Not splitlines(), which also splits where a caption has U+2028.
        lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
        predictions = [json.loads(line) for line in lines if line]
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: missing; run vlmds evaluate") from None
    except ValueError as error:
        raise InputError(f"{folder}: damaged ({error}); run vlmds evaluate --again") from None
    if (metrics.get("format"), metrics.get("version")) != (FORMAT, VERSION):
        raise InputError(f"{folder / 'metrics.json'}: not an evaluation of this vlmds")
    return metrics, predictions


def evaluation_table(metrics: dict) -> str:
    """metrics.json for a terminal."""
    lines = [
        f"{counted(metrics['clips'], 'clip')}, {metrics['unreadable']:,} unreadable",
        f"{'metric':<20}{'value':>9}{'95% interval':>20}{'shuffled':>10}{'blank':>9}",
    ]
    blind = metrics["looking"]

    def row(name: str, own: dict | None, gaps: dict) -> str:
        values = (
            [own["value"], own["low"], own["high"]] if own else [next((g["own"] for g in gaps.values()), float("nan"))]
        )
        span = f"{values[1]:.2f} … {values[2]:.2f}" if own else ""
        cells = "".join(
            f"{gaps[b]['blind']:>{w}.2f}" if b in gaps else " " * w for b, w in (("shuffled", 10), ("blank", 9))
        )
        return f"{name:<20}{values[0]:>9.2f}{span:>20}{cells}"

    for name, own in metrics["metrics"].items():
        lines.append(row(name, own, {b: g[name] for b, g in blind["metrics"].items()}))
    lines.append(row("caption loss", None, blind["loss"]))
    lines += [f"WARNING: {warning}" for warning in blind["warnings"]]
    return "\n".join(lines)


def _score_share(scorer: ClipScorer, reader: SampleReader, todo: list[int], output: Path, shown: set[int]) -> None:
    """This rank's share of the clips, written batch by batch."""

    def thumbnail(position: int, frames: np.ndarray) -> None:
        if position in shown:
            write(output / "thumbnails" / f"{position:06d}.jpg", thumbnail_jpeg(frames))

    rank, world = ranks.place()
    with (
        (output / "parts" / f"{rank:05d}.jsonl").open("a", encoding="utf-8") as file,
        phase("evaluating", len(todo), "clips", left=True) as progress,
    ):
        file.write("\n")  # ends a line that a kill cut short
        for records in scorer.batches(reader, todo[rank::world], thumbnail):
            file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
            file.flush()
            doing("evaluating", [record["key"] for record in records])
            # The other ranks are about as far.
            progress.done = min(progress.done + len(records) * world, len(todo))


def _read_texts(reader: SampleReader, positions: Sequence[int]) -> list[ClipText]:
    """Of the clips whose text can be read."""
    with phase("reading the captions", len(positions), "clips") as progress:
        texts = []
        for position in positions:
            texts.append(read_text(reader, position))
            progress.advance()
    return [text for text in texts if isinstance(text, ClipText)]


def _prepare(output: Path, settings: dict, again: bool) -> bool:
    """Make the folder ready; True if everything is there already with these settings."""
    check_writable(output, "--output", ("parts", "thumbnails"))
    path = output / "settings.json"
    same = path.is_file() and json.loads(path.read_text(encoding="utf-8")) == settings
    if same and not again and (output / "metrics.json").is_file():
        return True
    if not same or again:
        for name in ("parts", "thumbnails"):
            shutil.rmtree(output / name, ignore_errors=True)
        for name in ("metrics.json", "predictions.jsonl", "ledger.jsonl"):
            (output / name).unlink(missing_ok=True)
    (output / "parts").mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    return False


def _read_parts(output: Path) -> list[dict]:
    """The records of all ranks, one per clip, by position."""
    records = {}
    for path in sorted((output / "parts").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                record = json.loads(line)
            except ValueError:
                continue  # empty, or cut short by a kill
            records[record["position"]] = record
    return [records[position] for position in sorted(records)]


def _save(output: Path, metrics: dict, predictions: list[dict], records: list[dict]) -> None:
    bad = [r for r in records if "unreadable" in r]
    write(output / "ledger.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in bad))
    write(output / "predictions.jsonl", "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in predictions))
    write(output / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    shutil.rmtree(output / "parts", ignore_errors=True)  # NFS keeps what someone has open


def _folder_name(run: Path, dataset: Dataset, split: str) -> str:
    record = run / "run.json"
    own = record.is_file() and json.loads(record.read_text())["data_fingerprint"]
    return split if own == dataset.fingerprint else f"{Path(dataset.root).name}-{split}"


def _say(text: str) -> None:
    if ranks.place()[0] == 0:
        tell(f"vlmds: {text}")
