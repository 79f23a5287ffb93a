"""The table of the known-truth sweep: for each row what is known, what was measured, and whether it agrees.

Exact rows hold by construction of the clips, whatever a model learns, so they pass or fail. The others depend on
training and are reported. A clip's score is 100 if its caption gives the task's answer
(:func:`vlmds.demo.known_scenes.right`), else 0; all errors and verdicts are those of `vlmds compare`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from vlmds.demo.known_scenes import TASKS, Scene, chance, indistinguishable, parse, right
from vlmds.evaluation.compare import common_keys, order_of_cost
from vlmds.evaluation.evaluated_runs import Group, Run
from vlmds.evaluation.statistics import Estimates, estimate
from vlmds.evaluation.verdict import MARGIN, pair_tests, verdict

CONTROLS = ("e1", "e3", "e5", "e7")


@dataclass
class Row:
    """One line of the table. outcome: pass, fail, "as expected", "not as expected", "reported" or "not measured".
    values: what was measured, in percent. seconds: of training and evaluating the row's runs, which other rows share.
    """

    name: str
    runs: list[str]
    expected: str
    exact: bool = False
    measured: str = ""
    outcome: str = "not measured"
    clips: int = 0
    seconds: float = 0.0
    values: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        return asdict(self)


def known_rows(runs: Mapping[str, Run], names: Sequence[str]) -> list[Row]:
    """The rows of the runs with these names; those of which a run is missing are "not measured".

    Args:
        runs: evaluated ones, by name.
    """
    rows = []
    for row, measure in _planned(names):
        if all(name in runs for name in row.runs):
            chosen = [runs[name] for name in row.runs]
            measure(row, chosen)
            row.seconds = round(sum(map(seconds_of, chosen)), 1)
        rows.append(row)
    return rows


Measure = Callable[[Row, list[Run]], None]


def _planned(names: Sequence[str]) -> list[tuple[Row, Measure]]:
    """Rows and what measures them."""
    controls = [name for name in CONTROLS if name in names]
    found: list[tuple[Row, Measure]] = []
    for name in (name for name in names if name.endswith("-no-time")):
        found.append(_exact("order", name, "no frame times"))
    if "e3-one-frame" in names:
        found.append(_exact("later", "e3-one-frame", "one frame of the first half"))
    if len(controls) > 1:
        found.append((Row("control", controls, "all tie, the cheapest is named"), _control))
    for name in controls:
        found.append(_above("order", name))
    if "e3" in names:
        found.append(_above("later", "e3"))
    for task in ("counting", "detail"):
        if {"e3", "e7"} <= {*names}:
            found.append((Row(f"{task}: e3 less e7", ["e3", "e7"], "above 0 (more visual tokens)"), _gap(task)))
        pools = [name for name in ("e3", "e3-pool2", "e3-pool4") if name in names]
        if len(pools) > 1:
            found.append((Row(f"{task}: pooling", pools, "measured"), _values(task)))
    seeds = [name for name in names if name == "e3" or name.startswith("e3-seed")]
    if len(seeds) > 1:
        found.append((Row("e3 against itself, other seeds", seeds, "tie"), _itself))
    return found


# --- scores -----------------------------------------------------------------------------------------


def truth_of(run: Run, key: str) -> Scene:
    """The scene of a clip, from its reference. Raises ValueError if the reference is not of these tasks."""
    scene = parse(run.predictions[key]["references"][0])
    if scene is None:
        raise ValueError(f"{key}: {run.predictions[key]['references'][0]!r} is not a caption of the known scenes")
    return scene


def set_of(key: str) -> str:
    """The set that a clip belongs to, see :func:`vlmds.demo.known_clips.make_known_clips`."""
    return key.rpartition("_")[0]


def keys_of(runs: list[Run], tasks: Sequence[str]) -> list[str]:
    """The clips of these tasks that all runs were evaluated on, of whole sets only."""
    keys = [key for key in common_keys(runs) if truth_of(runs[0], key).task in tasks]
    sizes: dict[str, int] = {}
    for key in keys:
        sizes[set_of(key)] = sizes.get(set_of(key), 0) + 1
    return [key for key in keys if sizes[set_of(key)] == len(indistinguishable(truth_of(runs[0], key)))]


def scores(run: Run, keys: Sequence[str]) -> np.ndarray:
    """100 or 0 for each clip: float64 [n, 1]."""
    return np.array([[100.0 * right(run.predictions[key]["caption"], truth_of(run, key))] for key in keys])


def estimates(groups: list[list[Run]], tasks: Sequence[str]) -> tuple[Estimates, list[str]]:
    """(shares of right answers of methods with their seeds; the clips). Sets are what is sampled."""
    keys = keys_of([run for group in groups for run in group], tasks)
    stacked = [np.stack([scores(run, keys) for run in group]) for group in groups]
    return estimate("right answers", stacked, [set_of(key) for key in keys]), keys


def seconds_of(run: Run) -> float:
    """Training, without validation and checkpoints, and evaluation."""
    return 3600 * (run.cost["hours"] or 0.0) + run.metrics.get("timing", {}).get("seconds", 0.0)


# --- rows -------------------------------------------------------------------------------------------


def _shown(found: Estimates, method: int) -> str:
    own = found.single(method)
    return f"{own.value:.1f}% ({max(0.0, own.low):.1f} to {min(100.0, own.high):.1f})"


def _exact(task: str, name: str, why: str) -> tuple[Row, Measure]:
    limit = 100 * chance(task)

    def measure(row: Row, runs: list[Run]) -> None:
        found, keys = estimates([runs], [task])
        row.clips, row.measured = len(keys), _shown(found, 0)
        row.values = {name: float(found.values[0]), "limit": limit}
        row.outcome = "pass" if found.values[0] <= limit + 1e-9 else "fail"

    return Row(f"{task}: {name} ({why})", [name], f"at most {limit:.1f}%", exact=True), measure


def _above(task: str, name: str) -> tuple[Row, Measure]:
    limit = 100 * chance(task)

    def measure(row: Row, runs: list[Run]) -> None:
        found, keys = estimates([runs], [task])
        row.clips, row.measured, row.values = len(keys), _shown(found, 0), {name: float(found.values[0])}
        row.outcome = _agrees(found.single(0).low > limit)

    return Row(f"{task}: {name}", [name], f"above {limit:.1f}%"), measure


def _agrees(yes: bool) -> str:
    return "as expected" if yes else "not as expected"


def _control(row: Row, runs: list[Run]) -> None:
    found, keys = estimates([[run] for run in runs], ["control"])
    groups = [Group(run.name, [run]) for run in runs]
    costs, _ = order_of_cost(groups, [{"cost": run.cost} for run in runs])
    said = verdict(found, pair_tests(found), costs, MARGIN)
    cheapest = min(range(len(runs)), key=lambda number: costs[number])
    chosen = "none" if said["chosen"] is None else row.runs[said["chosen"]]
    row.clips, row.values = len(keys), dict(zip(row.runs, found.values.tolist(), strict=True))
    row.measured = _listed(row, found) + f"; named: {chosen}, cheapest: {row.runs[cheapest]}"
    row.outcome = _agrees(len(said["could_be_best"]) == len(runs) and said["chosen"] == cheapest)


def _listed(row: Row, found: Estimates) -> str:
    return ", ".join(f"{name} {_shown(found, number)}" for number, name in enumerate(row.runs))


def _gap(task: str) -> Measure:
    def measure(row: Row, runs: list[Run]) -> None:
        found, keys = estimates([[run] for run in runs], [task])
        (pair,) = pair_tests(found)
        row.clips, row.values = len(keys), dict(zip(row.runs, found.values.tolist(), strict=True))
        row.measured = f"{pair['gap']:+.1f} ({pair['low']:.1f} to {pair['high']:.1f}); {_listed(row, found)}"
        row.outcome = _agrees(pair["low"] > 0)

    return measure


def _values(task: str) -> Measure:
    def measure(row: Row, runs: list[Run]) -> None:
        found, keys = estimates([[run] for run in runs], [task])
        row.clips, row.values = len(keys), dict(zip(row.runs, found.values.tolist(), strict=True))
        row.measured, row.outcome = _listed(row, found), "reported"

    return measure


def _itself(row: Row, runs: list[Run]) -> None:
    half = len(runs) // 2
    found, keys = estimates([runs[:half], runs[half:]], TASKS)
    (pair,) = pair_tests(found)
    row.clips, row.values = len(keys), {run.name: float(scores(run, keys).mean()) for run in runs}
    kind = "methods" if found.seed_df else "checkpoints only"
    row.measured = f"{pair['gap']:+.1f} ({pair['low']:.1f} to {pair['high']:.1f}), all tasks, {kind}"
    row.outcome = _agrees(pair["p_holm"] >= 0.05)


def rows_table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| row | expected | measured (95% interval) | clips | result | seconds |", "|---|---|---|---:|---|---:|"]
    for row in rows:
        result = row.outcome if row.exact else f"reported: {row.outcome}".replace("reported: reported", "reported")
        expected = f"{row.expected} (exact)" if row.exact else row.expected
        lines.append(
            f"| {row.name} | {expected} | {row.measured or '–'} | {row.clips} | {result} | {row.seconds:.0f} |"
        )
    return "\n".join(lines)
