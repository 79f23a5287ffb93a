"""Comparison of outside models alone, without a run of vlmds: scores, intervals, which one is best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from vlmds.evaluation.adopt import outside_row
from vlmds.evaluation.compare import (
    check_margin,
    chosen_metric,
    common_keys,
    comparable,
    details,
    estimate_of,
    levels_of,
    named,
    scores_of,
    shared_metrics,
)
from vlmds.evaluation.error_kinds import WordList
from vlmds.evaluation.evaluated_runs import Group, OutsideRun
from vlmds.evaluation.like_for_like import outside_warnings
from vlmds.evaluation.metrics import undefined_metrics
from vlmds.evaluation.verdict import MARGIN, pair_tests, verdict


def compare_outside(
    outside: Sequence[OutsideRun],
    metric: str | None = None,
    words: Sequence[Sequence[str]] = (),
    margin: float = MARGIN,
    columns: Sequence[str] = (),
    word_list: WordList | None = None,
) -> dict[str, Any]:
    """What :func:`vlmds.evaluation.compare.compare` returns, for models that were not trained here: "table" has their
    rows, no cost decides, and there is nothing to build or adopt. Arguments and errors are the same."""
    check_margin(margin)
    groups = [Group(run.name, cast(list, [run])) for run in outside]
    keys = common_keys([], outside)
    same = comparable(outside, keys)
    scores = [[scores_of(run, keys, same)] for run in outside]
    names = shared_metrics(scores)
    metric = chosen_metric(metric, names)
    estimates = {name: estimate_of(name, [], outside[0], keys, scores) for name in names}
    table = [outside_row(run, estimates, number) for number, run in enumerate(outside)]
    pairs = pair_tests(estimates[metric])
    found = named(verdict(estimates[metric], pairs, [0] * len(outside), margin), table, metric)
    found |= {
        "checkpoints_only": False,
        "decidable_with": [row for row in found["decidable_with"] if row["seeds"] == 1],
    }
    found["needed"] = next((row for row in found["decidable_with"] if row["clips"] is not None), None)
    return {
        "metric": metric,
        "metrics": names,
        "undefined": undefined_metrics(names),
        "clips": len(keys),
        "table": table,
        "sources": estimates[metric].sources,
        "pairs": [pair | {side: groups[int(pair[side])].name for side in ("one", "other")} for pair in pairs],
        "verdict": found,
        "adopt": None,
        "cost_notes": [],
        "tuning": {"rows": []},
        "warnings": outside_warnings(outside, keys),
        "differences": [],
        "factors": None,
        **details(groups, keys, scores, estimates[metric], metric, words, columns, word_list),
        "people": None,
        "by": "metrics",
        "tokenisation": levels_of(outside, names),
        "outside_only": True,
    }
