"""Statistics of `vlmds compare`: which experiment is best, by how much, and is it significant.

Runs are compared on the same clips: a paired bootstrap draws clips (and seeds, where an experiment
was run with several) and counts how often the difference changes sign. The p-values of all pairs are
Holm-corrected, because among eight experiments one is ahead by chance. Of the experiments that are
statistically tied with the best, the one with the fewest visual tokens, then the fewest trained
parameters, is the cheapest: the one to ship.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from typing import Any, get_args

import numpy as np

from vlmds.errors import InputError
from vlmds.evaluation.blind import doubts
from vlmds.evaluation.metrics import aggregate, characters, interval, resampled_means, score_captions, undefined_metrics
from vlmds.evaluation.runs import Group, Run, group_runs, with_unique_names
from vlmds.evaluation.words import word_accuracy
from vlmds.experiments.differences import flat_settings
from vlmds.experiments.schema import PROJECTORS, PeftSection

RESAMPLES = 10_000  # 28 pairs need p-values well below 0.05 / 28
ADAPTERS = get_args(PeftSection.model_fields["type"].annotation)
EXPECTED = ("name", "owner", "priority", "projector", "peft.type", "training.seed")
"""Settings that are meant to differ between experiments."""
SAME = (
    "data_fingerprint",
    "split",
    "clips",
    "prompt",
    "num_frames",
    "generation",
    "vision",
    "llm",
    "llm_precision",
    "tokenisation",
)
"""Settings of the evaluation without which scores cannot be compared."""


def compare(runs: list[Run], metric: str | None = None, words: Sequence[Sequence[str]] = ()) -> dict[str, Any]:
    """All numbers of the report.

    Args:
        words: sets of words to look for in captions, see :func:`vlmds.evaluation.words.word_accuracy`.

    Raises:
        InputError: fewer than two clips that all runs were evaluated on, or no such metric.
    """
    runs = with_unique_names(runs)
    groups = group_runs(runs)
    keys = common_keys(runs)
    scores = [[_scores(run, keys, runs) for run in group.runs] for group in groups]
    names = [n for n in scores[0][0] if all(n in s for group in scores for s in group)]
    undefined = undefined_metrics(names)
    metric = metric or names[0]
    if metric in undefined:
        raise InputError(f"--metric {metric}: undefined, for the references of the clips do not differ")
    if metric not in names:
        raise InputError(f"--metric {metric}: no such metric; the runs share {', '.join(names)}")
    samples = {
        name: _bootstrap([[s[name] for s in group] for group in scores], name, RESAMPLES if name == metric else 1000)
        for name in names
    }
    values = {
        name: [
            float(aggregate(name, np.mean([s[name].mean(axis=0) for s in group], axis=0)[None])[0]) for group in scores
        ]
        for name in names
    }
    table = []
    for number, group in enumerate(groups):
        table.append(
            {
                "name": group.name,
                "projector": group.experiment.projector.type,
                "adapter": group.experiment.peft.type,
                "seeds": len(group.runs),
                "finished": all(run.finished for run in group.runs),
                "metrics": {
                    n: _cell(
                        values[n][number],
                        samples[n][number],
                        [aggregate(n, s[n].mean(axis=0)[None])[0] for s in scores[number]],
                    )
                    for n in names
                },
                "looking": group.runs[0].metrics["looking"],
                "cost": {k: _mean([run.cost[k] for run in group.runs]) for k in group.runs[0].cost},
            }
        )
    pairs = _pairs(groups, values[metric], samples[metric])
    return {
        "metric": metric,
        "metrics": names,
        "undefined": undefined,
        "clips": len(keys),
        "table": table,
        "pairs": pairs,
        "verdict": verdict(table, pairs, metric),
        "warnings": warnings(runs, keys),
        "differences": differing_settings(runs),
        "factors": factors(table, samples[metric], values[metric]),
        "breakdown": breakdown(groups, scores, keys, metric),
        "words": _words(groups, keys, words),
        "tokenisation": {n.partition("@")[2]: runs[0].metrics["metrics"][n]["tokenisation"] for n in names},
    }


def common_keys(runs: list[Run]) -> list[str]:
    """Keys of the clips that every run was evaluated on, with the same references."""
    keys = [
        key
        for key, line in runs[0].predictions.items()
        if all(key in run.predictions and run.predictions[key]["references"] == line["references"] for run in runs[1:])
    ]
    if not keys:
        raise InputError(
            f"{', '.join(r.name for r in runs)}: no clip was evaluated in all of them; "
            "evaluate them on the same data and split"
        )
    if len(keys) == 1:
        raise InputError(
            f"{', '.join(r.name for r in runs)}: only one clip was evaluated in all of them; "
            "a comparison needs two or more"
        )
    return keys


def warnings(runs: list[Run], keys: list[str]) -> list[dict[str, str]]:
    """What makes the comparison doubtful, most important first, in English ("en") and Korean ("ko")."""
    found = []

    def add(english: str, korean: str) -> None:
        found.append({"en": english, "ko": korean})

    def listed(values: dict) -> str:
        return "; ".join(f"{name}: {value}" for name, value in values.items())

    sizes = {run.name: len(run.predictions) for run in runs}
    if set(sizes.values()) != {len(keys)}:
        add(
            f"The runs were not evaluated on the same clips ({listed(sizes)}); only the {len(keys)} clips "
            "that all runs have are compared.",
            f"실험마다 평가한 클립이 다릅니다 ({listed(sizes)}). 공통 클립 {len(keys)}개만 비교합니다.",
        )
    for setting in SAME:
        values = {run.name: run.metrics["settings"].get(setting) for run in runs}
        if len({json.dumps(v) for v in values.values()}) > 1:
            add(
                f"Evaluations differ in {setting}: {listed(values)}",
                f"평가 설정이 서로 다릅니다 ({setting}): {listed(values)}",
            )
    records = {run.name: json.loads((run.path / "run.json").read_text()) for run in runs}
    ids: dict[str, list[str]] = {}
    for name, record in records.items():
        if "id" in record:
            ids.setdefault(record["id"], []).append(name)
    for copies in (", ".join(names) for names in ids.values() if len(names) > 1):
        add(f"The same run more than once: {copies}", f"같은 모델이 두 번 이상 들어 있습니다: {copies}")
    trained = {name: str(record.get("data_fingerprint"))[:12] for name, record in records.items()}
    if len(set(trained.values())) > 1:
        add(
            f"The runs were not trained on the same data: {listed(trained)}",
            f"학습 데이터가 서로 다릅니다: {listed(trained)}",
        )
    batches = {name: record.get("global_batch") for name, record in records.items()}
    if len(set(batches.values())) > 1:
        add(
            "The runs were trained with different global batches, and so with different numbers of steps "
            f"(set training.global_batch): {listed(batches)}",
            "글로벌 배치 크기가 서로 달라 학습 스텝 수도 다릅니다 (training.global_batch로 맞추세요): "
            f"{listed(batches)}",
        )
    for run in runs:
        artifact = run.metrics["settings"]["artifact"]
        if not run.finished:
            add(
                f"{run.name}: training is not finished; the evaluation is of stage {artifact}",
                f"{run.name}: 학습이 끝나지 않았습니다. {artifact} 단계를 평가한 결과입니다.",
            )
        elif artifact != run.experiment.stages[-1].name:
            add(
                f"{run.name}: the evaluation is of stage {artifact}, not of the last stage; evaluate again",
                f"{run.name}: 마지막 단계가 아닌 {artifact} 단계를 평가했습니다. 다시 평가하세요.",
            )
        if found_doubts := doubts(run.metrics["looking"]):
            english, korean = ("; ".join(doubt[language] for doubt in found_doubts) for language in ("en", "ko"))
            add(
                f"{run.name} may not use the video: {english}",
                f"{run.name}: 모델이 영상을 활용하지 않을 수 있습니다 ({korean})",
            )
    return found


def differing_settings(runs: list[Run]) -> list[dict]:
    """[{key, expected, values by run}] of every experiment key that is not the same in all."""
    flat = {run.name: flat_settings(run.experiment.model_dump()) for run in runs}
    found = []
    for key in sorted(set().union(*flat.values())):
        values = {name: settings.get(key) for name, settings in flat.items()}
        if len({json.dumps(v, default=str) for v in values.values()}) > 1:
            expected = any(key == e or key.startswith(f"{e}.") for e in EXPECTED)
            found.append({"key": key, "expected": expected, "values": values})
    return sorted(found, key=lambda d: d["expected"])


def verdict(table: list[dict], pairs: list[dict], metric: str) -> dict[str, Any]:
    """best: highest value. runner_up with the gap to it. tied: not significantly worse than the
    best, itself included. cheapest: of the tied."""
    order = sorted(table, key=lambda row: -row["metrics"][metric]["value"])
    best = order[0]["name"]
    found = {
        "best": best,
        "value": order[0]["metrics"][metric]["value"],
        "tied": [best],
        "cheapest": best,
        "runner_up": None,
    }
    against = {p["other"] if p["one"] == best else p["one"]: p for p in pairs if best in (p["one"], p["other"])}
    if len(order) == 1:
        return found
    found["tied"] += [row["name"] for row in order[1:] if against[row["name"]]["p_holm"] >= 0.05]
    tied = [row for row in order if row["name"] in found["tied"]]
    found["cheapest"] = min(tied, key=lambda r: (r["cost"]["visual_tokens"], r["cost"]["trainable"]))["name"]
    pair = against[order[1]["name"]]
    sign = 1 if pair["one"] == best else -1
    low, high = sorted((sign * pair["low"], sign * pair["high"]))
    found["runner_up"] = {
        "name": order[1]["name"],
        "gap": sign * pair["gap"],
        "low": low,
        "high": high,
        "p": pair["p"],
        "p_holm": pair["p_holm"],
        "significant": pair["p_holm"] < 0.05,
    }
    return found


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction (Scandinavian Journal of Statistics 6, 1979)."""
    order = np.argsort(p_values, kind="stable")
    corrected, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = running
    return corrected


def factors(table: list[dict], samples: np.ndarray, values: list[float]) -> dict[str, Any]:
    """Main effects and interaction, over the projectors that were run with both adapters.

    projector: mean of its two runs less the mean of all. adapter: DoRA less LoRA, mean over the
    projectors. interaction: for each projector, DoRA less LoRA beyond that mean. All with paired
    95% intervals.
    """
    place = {(row["projector"], row["adapter"]): i for i, row in reversed(list(enumerate(table)))}
    complete = [p for p in PROJECTORS if all((p, a) in place for a in ADAPTERS)]
    missing = [f"{p} + {a}" for p in PROJECTORS for a in ADAPTERS if (p, a) not in place]
    found: dict[str, Any] = {"projector": {}, "adapter": None, "interaction": {}, "missing": missing}
    if not complete:
        return found
    cells = np.array([[place[p, a] for a in ADAPTERS] for p in complete])
    drawn = samples[cells]  # [P, 2, resamples]
    own = np.array(values)[cells]  # [P, 2]

    def effect(value: float, sample: np.ndarray) -> dict:
        low, high = interval(sample)
        return {"value": float(value), "low": low, "high": high}

    difference, drawn_difference = own[:, 1] - own[:, 0], drawn[:, 1] - drawn[:, 0]
    found["adapter"] = effect(difference.mean(), drawn_difference.mean(axis=0))
    if len(complete) > 1:
        for i, name in enumerate(complete):
            found["projector"][name] = effect(
                own[i].mean() - own.mean(), drawn[i].mean(axis=0) - drawn.mean(axis=(0, 1))
            )
            found["interaction"][name] = effect(
                difference[i] - difference.mean(), drawn_difference[i] - drawn_difference.mean(axis=0)
            )
    return found


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


def _words(groups: list[Group], keys: list[str], words: Sequence[Sequence[str]]) -> list[dict]:
    captions = [[group.runs[0].predictions[key]["caption"] for key in keys] for group in groups]
    references = [groups[0].runs[0].predictions[key]["references"] for key in keys]
    accuracies = []
    for chosen in words:
        found = word_accuracy(captions, references, chosen)
        if found is None:
            raise InputError(f"--words {' '.join(chosen)}: no reference has any of them")
        accuracies.append(found)
    return accuracies


def _scores(run: Run, keys: list[str], runs: list[Run]) -> dict[str, np.ndarray]:
    """Statistics [clips, k] by metric: those of the evaluation where all runs have the same clips,
    else computed for the common ones (CIDEr-D depends on the set)."""
    same = all(
        r.predictions.keys() == runs[0].predictions.keys()
        and r.metrics["settings"]["tokenisation"] == runs[0].metrics["settings"]["tokenisation"]
        for r in runs
    ) and len(keys) == len(runs[0].predictions)
    lines = [run.predictions[key] for key in keys]
    if same:
        return {
            name: np.array([line["statistics"].get(name) or [line["scores"][name]] for line in lines], dtype=np.float64)
            for name in run.metrics["metrics"]
        }
    scored = score_captions([p["caption"] for p in lines], [p["references"] for p in lines])
    return {name: m.statistics for name, m in scored.items()}


def _bootstrap(groups: list[list[np.ndarray]], name: str, resamples: int) -> np.ndarray:
    """Values [groups, resamples]; every draw takes the same clips for all, and for each group of
    several seeds so many of them with replacement."""
    flat = [statistics for group in groups for statistics in group]
    means = iter(resampled_means(flat, resamples))
    random = np.random.RandomState(1)
    values = []
    for group in groups:
        seeds = np.stack([next(means) for _ in group])  # [S, resamples, k]
        drawn = random.randint(0, len(group), (resamples, len(group)))
        mean = seeds[drawn, np.arange(resamples)[:, None]].mean(axis=1)
        values.append(aggregate(name, mean))
    return np.array(values)


def _pairs(groups: list[Group], values: list[float], samples: np.ndarray) -> list[dict]:
    found: list[dict[str, Any]] = []
    for i, j in combinations(range(len(groups)), 2):
        gaps = samples[i] - samples[j]
        low, high = interval(gaps)
        below, above = ((gaps <= 0).sum() + 1, (gaps >= 0).sum() + 1)
        found.append(
            {
                "one": groups[i].name,
                "other": groups[j].name,
                "gap": values[i] - values[j],
                "low": low,
                "high": high,
                "p": float(min(1.0, 2 * min(below, above) / (len(gaps) + 1))),
            }
        )
    for pair, corrected in zip(found, holm([pair["p"] for pair in found]), strict=True):
        pair["p_holm"] = corrected
    return found


def _cell(value: float, samples: np.ndarray, seeds: list[float]) -> dict[str, float | None]:
    low, high = interval(samples)
    spread = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else None
    return {"value": value, "low": low, "high": high, "seed_sd": spread}


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None
