"""Evaluations on disk, and the names of their runs; imported in a moment, without PyTorch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from vlmds.console.text import counted
from vlmds.errors import InputError

FORMAT, VERSION = "vlmds-evaluation", 1


def read_evaluation(folder: str | Path) -> tuple[dict, list[dict]]:
    """(metrics.json, the lines of predictions.jsonl).

    Raises:
        InputError: not finished, or damaged.
    """
    folder = Path(folder)
    predictions: list[dict] = []
    try:
        metrics = _read_metrics(folder)
        # Binary: a text file would also be split where a caption has U+2028.
        with (folder / "predictions.jsonl").open("rb") as lines:
            predictions.extend(json.loads(line) for line in lines)
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: missing; run vlmds evaluate") from None
    except ValueError as error:
        raise InputError(
            f"{folder}: damaged (line {len(predictions) + 1} of predictions.jsonl, or metrics.json: {error}); "
            "run vlmds evaluate --again"
        ) from None
    if len(predictions) != metrics["clips"]:
        raise InputError(
            f"{folder}: damaged (predictions.jsonl has {counted(len(predictions), 'line')} for "
            f"{counted(metrics['clips'], 'clip')}); run vlmds evaluate --again"
        )
    return metrics, predictions


def read_captions(folder: str | Path) -> tuple[dict, list[dict]]:
    """As :func:`read_evaluation`, but of the lines only key, source, references, caption and three of the
    log-probabilities, in a fifth of the time."""
    import pyarrow as pa
    import pyarrow.json as arrow

    folder = Path(folder)
    texts = [(name, pa.string()) for name in ("key", "source", "caption")]
    blind = pa.struct([(name, pa.float64()) for name in ("real", "shuffled", "blank")])
    schema = pa.schema([*texts, ("references", pa.list_(pa.string())), ("reference_log_probability", blind)])
    try:
        metrics = _read_metrics(folder)
        table = arrow.read_json(
            folder / "predictions.jsonl",
            arrow.ReadOptions(block_size=1 << 26),  # bytes; a line must fit in
            arrow.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except (OSError, ValueError, pa.ArrowException):
        return read_evaluation(folder)  # says what is wrong
    return (metrics, table.to_pylist()) if len(table) == metrics["clips"] else read_evaluation(folder)


def _read_metrics(folder: Path) -> dict:
    """metrics.json. Raises InputError, FileNotFoundError, and ValueError where it is damaged."""
    path = folder / "metrics.json"
    if (folder / "parts").is_dir() and not path.is_file():
        raise InputError(f"{folder}: the evaluation is not finished; run vlmds evaluate again")
    metrics = json.loads(path.read_text(encoding="utf-8"))
    if (metrics.get("format"), metrics.get("version")) != (FORMAT, VERSION):
        raise InputError(f"{path}: not an evaluation of this vlmds")
    return metrics


def evaluation_folder(run: Path, name: str | None = None) -> Path:
    """The evaluation of a run that is meant: of this name, "val", or the only one.

    Raises:
        InputError: there is none, or there are several and none is chosen.
    """
    root = run / "evaluation"
    found = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    if not found:
        raise InputError(f"{run}: no evaluation; run vlmds evaluate --run {run}")
    name = name or ("val" if "val" in found else found[0] if len(found) == 1 else None)
    if name not in found:
        raise InputError(f"{run}: choose an evaluation with --evaluation: {', '.join(found)}")
    return root / name


def unique_names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, where several have the same one more of their paths; a folder given again is numbered."""
    split = [path.absolute().parts for path in paths]
    names = []
    for number, parts in enumerate(split):
        others = [other for place, other in enumerate(split) if place != number and other != parts]
        length = 1
        while any(other[-length:] == parts[-length:] for other in others):
            length += 1
        copies = split[:number].count(parts)
        names.append("/".join(parts[-length:]) + (f" ({copies + 1})" if copies else ""))
    return names
