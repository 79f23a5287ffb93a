"""Breakdown of a comparison by columns of the manifest that were kept (`vlmds pack --keep-columns`)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmds.errors import InputError
from vlmds.evaluation.statistics import estimate

MOST_VALUES = 12
"""Of a column that is shown without being asked for; of one that is asked for, rarer values are pooled."""


def by_columns(
    lines: Sequence[dict[str, Any]],
    scores: Sequence[Sequence[np.ndarray]],
    metric: str,
    sources: Sequence[str],
    chosen: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """The metric for the clips of each value of a column.

    Args:
        lines: of predictions.jsonl, one per clip.
        scores: for each experiment and seed the metric's statistics, float64 [n, k].
        sources: the video that each clip is from.
        chosen: columns; by default all with two to MOST_VALUES values.

    Returns:
        For each column "column", "missing" (clips without a value) and "values": the most frequent first, each
        with "value" (None: the pooled rarer ones), "clips", "sources" and "cells": for each experiment "value" with
        the 95% interval over videos and seeds ("low", "high"; None for clips of a single video).

    Raises:
        InputError: no clip has a chosen column.
    """
    kept = [line.get("columns") or {} for line in lines]
    names = dict.fromkeys(name for columns in kept for name in columns)
    for name in chosen:
        if name not in names:
            raise InputError(
                f"--breakdown {name}: the clips have no such column; they have "
                f"{', '.join(names) or 'none (pack with --keep-columns, and evaluate again)'}"
            )
    found = []
    for name in chosen or names:
        values = [shown_value(columns.get(name)) for columns in kept]
        counts = Counter(value for value in values if value is not None)
        if not counts or (not chosen and not 2 <= len(counts) <= MOST_VALUES):
            continue
        ranked = sorted(counts, key=lambda value: (-counts[value], value))
        single = ranked if len(ranked) <= MOST_VALUES else ranked[: MOST_VALUES - 1]
        rows = [_row(value, np.array([own == value for own in values]), scores, metric, sources) for value in single]
        if len(single) < len(ranked):
            rare = set(ranked[len(single) :])
            rows.append(_row(None, np.array([own in rare for own in values]), scores, metric, sources))
        found.append({"column": name, "missing": values.count(None), "values": rows})
    return found


def shown_value(value: Any) -> str | None:
    """A value of a column as text; None for an empty one."""
    if value is None or value == "":
        return None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _row(
    value: str | None, inside: np.ndarray, scores: Sequence[Sequence[np.ndarray]], metric: str, sources: Sequence[str]
) -> dict[str, Any]:
    own = [source for source, kept in zip(sources, inside, strict=True) if kept]
    estimates = estimate(metric, [np.stack([seed[inside] for seed in group]) for group in scores], own)
    cells = []
    for method in range(len(scores)):
        single = estimates.single(method)
        known = estimates.sources > 1
        cells.append(
            {"value": single.value, "low": single.low if known else None, "high": single.high if known else None}
        )
    return {"value": value, "clips": len(own), "sources": estimates.sources, "cells": cells}
