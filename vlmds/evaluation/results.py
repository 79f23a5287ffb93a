"""Results of an evaluation: the scores of its captions, its files, and its table for a terminal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from vlmds.console.text import counted
from vlmds.distributed import ranks
from vlmds.distributed.watchdog import doing
from vlmds.errors import InputError
from vlmds.evaluation.blind import VIDEOS, blind_tests
from vlmds.evaluation.metrics import Metric, describe_captions, score_captions, summarise, undefined_metrics
from vlmds.evaluation.saved import FORMAT, VERSION
from vlmds.evaluation.scoring import ClipScorer, ClipText
from vlmds.evaluation.unfinished import unfinished_captions, unfinished_warning
from vlmds.experiments.differences import changed_settings
from vlmds.files import write
from vlmds.models.assemble import Model
from vlmds.runs.rank_jsonl import RankJsonl, json_line


def scored(texts: Sequence[ClipText], captions: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the part of metrics.json about the captions, the beginning of each line of predictions.jsonl).

    Args:
        captions: one of each clip.
    """
    scores = score_captions(captions, [text.captions for text in texts])
    result = {
        "clips": len(texts),
        "metrics": summarise(scores, [text.source for text in texts]),
        "undefined": undefined_metrics(scores),
        "captions": describe_captions(captions),
    }
    lines = [_line(text, caption, number, scores) for number, (text, caption) in enumerate(zip(texts, captions))]
    return result, lines


def _line(text: ClipText, caption: str, number: int, scores: dict[str, Metric]) -> dict[str, Any]:
    return {
        "key": text.key,
        "position": text.position,
        "source": text.source,
        **({"columns": text.columns} if text.columns else {}),
        "references": text.captions,
        "caption": caption,
        "duration": text.duration,
        "scores": {name: round(float(m.per_clip[number]), 6) for name, m in scores.items()},
        "statistics": {name: m.statistics[number].tolist() for name, m in scores.items() if m.statistics.shape[1] > 1},
    }


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
    result, predictions = scored(read, captions)
    borrowed = {int(p): value for r in records_read for p, value in r["lent"].items()}
    partner = {int(p): r["caption"] for r in records_read for p in r["lent"]}
    blank = scorer.blank_captions([text.prompt for text in read])
    for text, record, line in zip(read, records_read, predictions, strict=True):
        line |= {
            "unfinished": record.get("unfinished"),
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
    result |= {
        "unreadable": len(records) - len(read),
        "unfinished": unfinished_captions(records_read, scorer.generation.max_new_tokens),
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


def parts_of(folder: Path) -> RankJsonl:
    """The finished clips of an evaluation in progress, by rank."""
    return RankJsonl(folder / "parts" / "00000.jsonl", "", ".jsonl")


def by_position(records: Iterable[dict]) -> dict[int, dict]:
    """One record per clip, in the order of the data."""
    return dict(sorted((record["position"], record) for record in records))


def changed_since(folder: Path, settings: dict[str, Any]) -> dict[str, str] | None:
    """{setting: "setting old -> new"} of those that the evaluation in the folder was begun with differently; None if
    there is none. Raises InputError if its record is damaged."""
    path = folder / "settings.json"
    if not path.is_file():
        return None
    try:
        return changed_settings(json.loads(path.read_text(encoding="utf-8")), settings)
    except ValueError:
        raise InputError(f"{path}: damaged; --again repeats the evaluation") from None


def begin(folder: Path, settings: dict[str, Any], afresh: bool) -> None:
    """Record the settings of an evaluation. afresh: remove what the folder has of another one."""
    if afresh:
        for name in ("parts", "thumbnails"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("metrics.json", "predictions.jsonl", "ledger.jsonl"):
            (folder / name).unlink(missing_ok=True)
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    write(folder / "settings.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def timing_of_ranks(
    captioned: int, seconds: float, device: torch.device, *, resumed: bool, batch_size: int
) -> dict[str, Any]:
    """What this start took, for metrics.json. All ranks call it.

    Args:
        captioned, seconds: this rank's clips, and the seconds of the model for them.
    """
    clips, times, devices = zip(*ranks.gather((captioned, seconds, ranks.device_name(device))), strict=True)
    return {
        "ranks": len(clips),
        "resumed": resumed,
        # Of this start: clips, and seconds of the model, both added up over the ranks.
        "captioned": sum(clips),
        "captioning_seconds": round(sum(times), 3),
        "batch_size": batch_size,
        "devices": sorted({*devices}),
    }


def save_results(
    folder: Path, settings: dict[str, Any], result: dict[str, Any], predictions: list[dict], bad: list[dict]
) -> None:
    """Write a finished evaluation. bad: records of the clips that could not be read."""
    metrics = {"format": FORMAT, "version": VERSION, "settings": settings, **result}
    write(folder / "ledger.jsonl", "".join(map(json_line, bad)))
    write(folder / "predictions.jsonl", "".join(map(json_line, predictions)))
    write(folder / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    shutil.rmtree(folder / "parts", ignore_errors=True)  # NFS keeps what someone has open


def evaluation_table(metrics: dict) -> str:
    """metrics.json for a terminal."""
    blind = metrics.get("looking") or {"metrics": {}, "loss": {}, "warnings": []}  # captions from elsewhere have none
    tested = "looking" in metrics
    columns = f"{'shuffled':>10}{'blank':>9}" if tested else ""
    lines = [
        f"{counted(metrics['clips'], 'clip')}, {metrics['unreadable']:,} unreadable",
        f"{'metric':<20}{'value':>9}{'95% interval':>20}{columns}",
    ]

    def add(name: str, value: str, span: str, gaps: dict[str, dict]) -> None:
        values = [f"{gaps[test]['blind']:.2f}" if test in gaps else "–" for test in ("shuffled", "blank")]
        lines.append(f"{name:<20}{value:>9}{span:>20}" + (f"{values[0]:>10}{values[1]:>9}" if tested else ""))

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
    if tested:
        add("caption loss", next((f"{gap['own']:.2f}" for gap in blind["loss"].values()), "–"), "", blind["loss"])
        lines += _loss_shares(blind["loss"])
    cut = metrics.get("unfinished")
    if cut:
        lines.append(
            f"captions that ended at --max-new-tokens {cut['max_new_tokens']}: {cut['captions']:,} ({cut['share']:.1%})"
        )
    lines += [f"WARNING: {warning}" for warning in blind["warnings"]]
    if warning := unfinished_warning(cut):
        lines.append(f"WARNING: {warning[0]}")
    return "\n".join(lines)


def _loss_shares(loss: dict[str, dict]) -> list[str]:
    """The share of the captions' likelihood that is lost with each other video."""
    lines = [f"{'likelihood lost with':<20}{'share':>9}{'95% interval':>20}"]
    for name, (english, _) in VIDEOS.items():
        if "share" in (gap := loss.get(name, {})):
            span = f"{gap['share_low']:.1%} … {gap['share_high']:.1%}"
            lines.append(f"{english:<20}{gap['share']:>9.1%}{span:>20}")
    return lines
