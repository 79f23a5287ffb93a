"""Numbers of `vlmds compare`: which experiment is best, by how much, and whether the difference is significant.

Runs are compared on the same clips. :mod:`vlmds.evaluation.statistics` says how sure a difference is,
:mod:`vlmds.evaluation.verdict` which experiment to take, and :mod:`vlmds.evaluation.like_for_like` what
makes the comparison doubtful.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from vlmds.errors import InputError
from vlmds.evaluation.adopt import build_or_adopt
from vlmds.evaluation.by_column import by_columns
from vlmds.evaluation.error_kinds import WordList, error_table
from vlmds.evaluation.evaluated_runs import Evaluated, Group, OutsideRun, Run, group_runs, with_unique_names
from vlmds.evaluation.like_for_like import differing_settings, refuse, warnings
from vlmds.evaluation.metrics import aggregate, characters, score_captions, tokenizers, undefined_metrics
from vlmds.evaluation.statistics import Estimates, estimate, holm, replicated_effect
from vlmds.evaluation.tuned import tuning
from vlmds.evaluation.verdict import MARGIN, pair_tests, verdict
from vlmds.evaluation.word_accuracy import word_accuracy
from vlmds.experiments.schema import PROJECTORS, PeftSection

ADAPTERS = get_args(PeftSection.model_fields["type"].annotation)


def compare(
    runs: list[Run],
    metric: str | None = None,
    words: Sequence[Sequence[str]] = (),
    margin: float = MARGIN,
    outside: Sequence[OutsideRun] = (),
    columns: Sequence[str] = (),
    word_list: WordList | None = None,
) -> dict[str, Any]:
    """All numbers of the report.

    Args:
        outside: evaluations of other models; the verdict is on the runs, and "adopt" compares both.
        margin: how much worse than the best the chosen experiment may be, as a share of its value.
        columns: to break the metric down by, see :func:`vlmds.evaluation.by_column.by_columns`.
        word_list: count errors by kind, see :mod:`vlmds.evaluation.error_kinds`.
        words: sets of words to look for in captions, see :func:`vlmds.evaluation.word_accuracy.word_accuracy`.

    Raises:
        InputError: the evaluations cannot be compared (:func:`vlmds.evaluation.like_for_like.refuse`), fewer than
            two clips that all runs were evaluated on, or no such metric.
    """
    check_margin(margin)
    runs = with_unique_names(runs)
    groups, keys, scores, others = _scored(runs, outside)
    names = shared_metrics([*scores, *others])
    metric = chosen_metric(metric, names)
    estimates = {name: estimate_of(name, scores, runs[0], keys) for name in names}
    table = [_row(group, {n: estimates[n].cell(number) for n in names}) for number, group in enumerate(groups)]
    pairs = pair_tests(estimates[metric])
    costs, by_hours = order_of_cost(groups, table)
    found = named(verdict(estimates[metric], pairs, costs, margin), table, metric)
    everyone = {name: estimate_of(name, scores, runs[0], keys, others) for name in names} if outside else {}
    return {
        "metric": metric,
        "metrics": names,
        "undefined": undefined_metrics(names),
        "clips": len(keys),
        "table": table,
        "sources": estimates[metric].sources,
        "pairs": [pair | {side: groups[int(pair[side])].name for side in ("one", "other")} for pair in pairs],
        "verdict": found,
        "adopt": build_or_adopt(everyone, metric, table, outside, found) if outside else None,
        "cost_notes": cost_notes(groups, by_hours),
        "tuning": tuning(groups),
        "warnings": warnings(runs, keys, outside),
        "differences": differing_settings(runs),
        "factors": factors(table, estimates[metric]),
        **details(groups, keys, scores, estimates[metric], metric, words, columns, word_list),
        "people": None,  # see vlmds.evaluation.people_report.add_people
        "by": "metrics",
        "tokenisation": levels_of(runs, names),
        "outside_only": False,
    }


def check_margin(margin: float) -> None:
    """Raises InputError: not a share of the best value."""
    if not 0 < margin < 1:
        raise InputError(f"--margin {margin:g}: not a share between 0 and 1, such as 0.03")


def _row(group: Group, metrics: dict[str, Any]) -> dict[str, Any]:
    """An experiment's line of the report's table; metrics: its cells by metric."""
    first = group.runs[0]
    return {
        "name": group.name,
        "projector": group.experiment.projector.type,
        "adapter": group.experiment.peft.type,
        "seeds": len(group.runs),
        "finished": all(run.finished for run in group.runs),
        "metrics": metrics,
        "looking": first.metrics["looking"],
        "cost": {k: _mean([run.cost[k] for run in group.runs]) for k in first.cost},
    }


def estimates_of(runs: list[Run], metric: str | None = None) -> tuple[str, Estimates]:
    """(the metric, its estimates of the experiments). Raises InputError as :func:`compare` does."""
    runs = with_unique_names(runs)
    _, keys, scores, _ = _scored(runs)
    metric = chosen_metric(metric, shared_metrics(scores))
    return metric, estimate_of(metric, scores, runs[0], keys)


Scores = Sequence[list[dict[str, np.ndarray]]]
"""For each experiment and seed the statistics [clips, k] by metric."""


def _scored(runs: list[Run], outside: Sequence[OutsideRun] = ()) -> tuple[list[Group], list[str], Scores, Scores]:
    """The experiments, the clips that all share, the scores of the experiments, and those of the outside runs."""
    groups, keys = group_runs(runs), common_keys(runs, outside)
    same = comparable([*runs, *outside], keys)
    scores = [[scores_of(run, keys, same) for run in group.runs] for group in groups]
    return groups, keys, scores, [[scores_of(run, keys, same)] for run in outside]


def shared_metrics(scores: Scores) -> list[str]:
    return [name for name in scores[0][0] if all(name in own for group in scores for own in group)]


def levels_of(runs: Sequence[Evaluated], names: Sequence[str]) -> dict[str, str]:
    """How captions were divided at each level of these metrics: by the evaluations, or, where scores are computed
    here, by this vlmds."""
    found = {level.level: level.name for level in tokenizers()}
    for run in runs:
        found |= {name.partition("@")[2]: own["tokenisation"] for name, own in run.metrics["metrics"].items()}
    return {level: text for level, text in found.items() if f"@{level}" in "".join(names)}


def details(
    groups: Sequence[Group],
    keys: list[str],
    scores: Scores,
    found: Estimates,
    metric: str,
    words: Sequence[Sequence[str]],
    columns: Sequence[str],
    word_list: WordList | None,
) -> dict[str, Any]:
    """The figures that captions and scores alone give: breakdowns, cut captions, errors by kind, word accuracy."""
    first = groups[0].runs[0]
    lines = [first.predictions[key] for key in keys]
    own = [[seed[metric] for seed in group] for group in scores]
    return {
        "breakdown": breakdown(groups, scores, keys, metric),
        "columns": by_columns(lines, own, metric, sources_of(first, keys), columns),
        "unfinished": _unfinished(groups),
        "errors": word_list and _errors(groups, keys, found, word_list),
        "words": _words(groups, keys, words),
    }


def chosen_metric(metric: str | None, names: list[str]) -> str:
    metric = metric or names[0]
    if metric in undefined_metrics(names):
        raise InputError(f"--metric {metric}: undefined, because the references of the clips do not differ")
    if metric not in names:
        raise InputError(f"--metric {metric}: no such metric; the runs share {', '.join(names)}")
    return metric


def estimate_of(name: str, scores: Scores, run: Evaluated, keys: list[str], fixed: Scores = ()) -> Estimates:
    """fixed: scores of outside runs, which follow the experiments."""
    stacked = [np.stack([s[name] for s in group]) for group in [*scores, *fixed]]
    return estimate(name, stacked, sources_of(run, keys), range(len(scores), len(stacked)))


def order_of_cost(groups: list[Group], table: list[dict]) -> tuple[list[tuple], bool]:
    """(what the cheapest experiment is the smallest of, whether these are GPU-hours). GPU-hours count where they
    are known of all experiments, on the same kind of GPU (processors are shared with other work); to two digits,
    as equal work takes not quite equal time. Then visual tokens, then trainable parameters."""
    kinds = {tuple(run.cost_facts.hardware) for group in groups for run in group.runs}
    known = all(run.cost["gpu_hours"] for group in groups for run in group.runs)
    by_hours = known and len(kinds) == 1 and all(kind and not kind[0].startswith("CPU") for kind in kinds)
    sizes = [(row["cost"]["visual_tokens"], row["cost"]["trainable"]) for row in table]
    if not by_hours:
        return [*sizes], False
    hours = [float(f"{row['cost']['gpu_hours']:.1e}") for row in table]
    return [(own, *size) for own, size in zip(hours, sizes, strict=True)], True


def cost_notes(groups: list[Group], by_hours: bool) -> list[tuple[str, str]]:
    """What there is to say of the costs, in English and Korean."""
    notes = [
        (
            "Cheapest: the fewest GPU-hours, all experiments on the same hardware.",
            "비용 순서: GPU 시간이 적은 순서(모두 같은 하드웨어에서 측정).",
        )
        if by_hours
        else (
            "Cheapest: the fewest visual tokens, then the fewest trainable parameters, because GPU-hours on the same "
            "kind of GPU are not known for all experiments.",
            "비용 순서: 시각 토큰 수, 다음으로 학습 파라미터 수가 적은 순서(같은 GPU에서 측정한 GPU 시간이 없는 실험이 있음).",
        )
    ]
    runs = [run for group in groups for run in group.runs]
    for run in runs:
        for english, korean in run.cost_facts.unknown:
            notes.append(
                (
                    f"{run.name}: GPU-hours are not known: {english}.",
                    f"{run.name}: GPU 시간을 알 수 없습니다. {korean}.",
                )
            )
    for english, korean, names in (
        ("trained", "학습", {run.name: run.cost_facts.hardware for run in runs}),
        ("evaluated", "평가", {run.name: run.metrics.get("timing", {}).get("devices", []) for run in runs}),
    ):
        if len({tuple(found) for found in names.values()}) > 1:
            listed = "; ".join(f"{name}: {', '.join(found) or '?'}" for name, found in names.items())
            notes.append(
                (
                    f"The runs were {english} on different hardware, so their times cannot be compared: {listed}",
                    f"{korean}에 쓴 하드웨어가 달라 시간을 비교할 수 없습니다: {listed}",
                )
            )
    return notes


def common_keys(runs: Sequence[Run], outside: Sequence[OutsideRun] = ()) -> list[str]:
    """Keys of the clips that every run was evaluated on. Raises InputError if there are less than two, or the
    evaluations cannot be compared."""
    refuse(runs, outside)
    everyone: list[Evaluated] = [*runs, *outside]
    keys = [key for key in everyone[0].predictions if all(key in run.predictions for run in everyone)]
    if not keys:
        raise InputError(
            f"{', '.join(r.name for r in everyone)}: no clip was evaluated in all of them; "
            "evaluate them on the same data and split"
        )
    if len(keys) == 1:
        raise InputError(
            f"{', '.join(r.name for r in everyone)}: only one clip was evaluated in all of them; "
            "a comparison needs two or more"
        )
    return keys


def sources_of(run: Evaluated, keys: Sequence[str]) -> list[str]:
    """For each clip the video that it was cut from; evaluations before 0.2 do not say, and there each clip counts
    as a video of its own."""
    return [run.predictions[key].get("source") or key for key in keys]


def named(found: dict[str, Any], table: list[dict], metric: str) -> dict[str, Any]:
    """A verdict with names for numbers of methods, and the best value."""
    names = [row["name"] for row in table]
    runner_up = found["runner_up"]
    return found | {
        "best": names[found["best"]],
        "value": table[found["best"]]["metrics"][metric]["value"],
        "could_be_best": [names[method] for method in found["could_be_best"]],
        "within_margin": [names[method] for method in found["within_margin"]],
        "chosen": None if found["chosen"] is None else names[found["chosen"]],
        "runner_up": runner_up and {"name": names[runner_up["method"]], **runner_up},
    }


def factors(table: list[dict], found: Estimates) -> dict[str, Any]:
    """Main effects and interaction, over the projectors that were run with both adapters.

    projector: mean of its two runs less the mean of all. adapter: DoRA less LoRA, mean over the
    projectors. interaction: for each projector, DoRA less LoRA beyond that mean. All with paired
    95% intervals and p-values, which Holm's method corrects for all effects ("p_holm"). With one seed per
    method the adapter's effect is judged by its spread over the projectors, which repeat it.
    """
    place = {(row["projector"], row["adapter"]): i for i, row in reversed(list(enumerate(table)))}
    complete = [p for p in PROJECTORS if all((p, a) in place for a in ADAPTERS)]
    missing = [f"{p} + {a}" for p in PROJECTORS for a in ADAPTERS if (p, a) not in place]
    effects: dict[str, Any] = {"projector": {}, "adapter": None, "interaction": {}, "missing": missing}
    if not complete:
        return effects
    cells = np.array([[place[p, a] for a in ADAPTERS] for p in complete])
    count = len(complete)

    def weights(of_cells: np.ndarray) -> np.ndarray:
        """Weights of methods from weights of the cells, [P, 2]."""
        placed = np.zeros(len(table))
        placed[cells.ravel()] = of_cells.ravel()
        return placed

    adapter = np.tile([-1.0, 1.0], (count, 1)) / count
    if found.seed_df or count < 3:
        tested = {("adapter", ""): found.contrast(weights(adapter))}
    else:
        tested = {("adapter", ""): replicated_effect(found.values[cells[:, 1]] - found.values[cells[:, 0]])}
    if count > 1:
        for i, name in enumerate(complete):
            own = np.eye(count)[i][:, None] - 1 / count
            tested["projector", name] = found.contrast(weights(np.tile(own / 2, (1, 2))))
            tested["interaction", name] = found.contrast(weights(own * [-1.0, 1.0]))
    for ((kind, name), effect), p_holm in zip(
        tested.items(), holm([effect.p for effect in tested.values()]), strict=True
    ):
        shown = {"value": effect.value, "low": effect.low, "high": effect.high, "p": effect.p, "p_holm": p_holm}
        if kind == "adapter":
            effects["adapter"] = shown
        else:
            effects[kind][name] = shown
    return effects


def breakdown(groups, scores, keys: list[str], metric: str) -> dict[str, list[dict]]:
    """The metric by thirds of reference length (characters) and of clip duration (seconds)."""
    lines = [groups[0].runs[0].predictions[key] for key in keys]
    facts = {
        "length": [float(np.mean([len(characters(r)) for r in p["references"]])) for p in lines],
        "duration": [p["duration"] for p in lines],
    }
    found: dict[str, list[dict]] = {}
    for name, numbers in facts.items():
        found[name] = []
        if any(v is None for v in numbers):
            continue
        values = np.array(numbers)
        edges = np.unique(np.quantile(values, [0, 1 / 3, 2 / 3, 1]))
        for low, high in zip(edges[:-1], edges[1:]):
            inside = (values >= low) & ((values < high) | (high == edges[-1]))
            if inside.any():
                found[name].append(
                    {
                        "low": float(low),
                        "high": float(high),
                        "clips": int(inside.sum()),
                        "values": [
                            float(
                                aggregate(
                                    metric, np.mean([s[metric][inside].mean(axis=0) for s in group], axis=0)[None]
                                )[0]
                            )
                            for group in scores
                        ],
                    }
                )
    return found


def _unfinished(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Captions of each experiment that ended at max_new_tokens, of all its seeds; not of older evaluations."""
    found = []
    for group in groups:
        cut = [run.metrics.get("unfinished") for run in group.runs]
        known = [one for one in cut if one]
        if len(known) == len(cut):
            captions = sum(one["captions"] for one in known)
            share = float(np.mean([one["share"] for one in known]))
            found.append({"name": group.name, "captions": captions, "share": share})
    return found


def _errors(groups: Sequence[Group], keys: list[str], found: Estimates, words: WordList) -> dict[str, Any]:
    """Errors by kind, of all seeds, compared with those of the experiment with the best value."""
    captions = [[[run.predictions[key]["caption"] for key in keys] for run in group.runs] for group in groups]
    first = groups[0].runs[0]
    references = [first.predictions[key]["references"] for key in keys]
    return error_table(captions, references, sources_of(first, keys), int(found.values.argmax()), words)


def _words(groups: Sequence[Group], keys: list[str], words: Sequence[Sequence[str]]) -> list[dict]:
    captions = [[group.runs[0].predictions[key]["caption"] for key in keys] for group in groups]
    references = [groups[0].runs[0].predictions[key]["references"] for key in keys]
    accuracies = []
    for chosen in words:
        found = word_accuracy(captions, references, chosen)
        if found is None:
            raise InputError(f"--words {' '.join(chosen)}: no reference has any of them")
        accuracies.append(found)
    return accuracies


def comparable(runs: Sequence[Evaluated], keys: list[str]) -> bool:
    """Whether the evaluations' statistics can be used as they are: all have the same clips and tokenisation. Else
    they are computed for the common clips (CIDEr-D depends on the set)."""
    levels = runs[0].metrics["settings"]["tokenisation"]
    return all(len(run.predictions) == len(keys) and run.metrics["settings"]["tokenisation"] == levels for run in runs)


def scores_of(run: Evaluated, keys: list[str], same: bool) -> dict[str, np.ndarray]:
    lines = [run.predictions[key] for key in keys]
    if same:
        return {
            name: np.array([line["statistics"].get(name) or [line["scores"][name]] for line in lines], dtype=np.float64)
            for name in run.metrics["metrics"]
        }
    scored = score_captions([p["caption"] for p in lines], [p["references"] for p in lines])
    return {name: m.statistics for name, m in scored.items()}


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None
