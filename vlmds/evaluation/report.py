"""Report of `vlmds compare`: one offline HTML page, and the same numbers as CSV or LaTeX."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from plotly.offline import get_plotlyjs

from vlmds.evaluation.adopt import adopt_sentence
from vlmds.evaluation.blind import VIDEOS, doubts
from vlmds.evaluation.charts import charts
from vlmds.evaluation.compare import ADAPTERS, common_keys
from vlmds.evaluation.cost import COST
from vlmds.evaluation.error_kinds import NAMES
from vlmds.evaluation.evaluated_runs import Evaluated, Group, OutsideRun, Run, group_runs, with_unique_names
from vlmds.evaluation.like_for_like import shown_value
from vlmds.evaluation.metrics import CHARACTERS
from vlmds.evaluation.next_steps import next_steps
from vlmds.evaluation.people_report import headline, people_columns, people_said
from vlmds.evaluation.reviews import MARK_NAMES
from vlmds.evaluation.verdict import weakened
from vlmds.experiments.schema import PROJECTORS
from vlmds.files import write
from vlmds.pages.render import Text, json_text, policy, render, source

THUMBNAILS = 300
THUMBNAIL_BYTES = 12_000_000


def write_report(path: str | Path, runs: list[Run], found: dict[str, Any], outside: Sequence[OutsideRun] = ()) -> int:
    """Write the page; returns its size in bytes. found: result of :func:`compare` for the same runs."""
    runs = with_unique_names(runs)
    groups = group_runs(runs)
    shown = [(group.name, cast(Evaluated, group.runs[0])) for group in groups] + [(run.name, run) for run in outside]
    clips = clip_grid([run for _, run in shown], found["metric"], common_keys(runs, outside))
    made = charts(runs, found)
    plotly = get_plotlyjs()
    script = source("vlmds.pages", "switch.js") + source("vlmds.evaluation", "page/report.js")
    page = render(
        "vlmds.evaluation",
        "report.html.j2",
        title=("Comparison of outside models", "외부 모델 비교")
        if found["outside_only"]
        else ("Comparison of experiments", "실험 비교"),
        policy=policy(script, plotly),
        scripts=[script],
        plotly=plotly,
        found=found,
        sentences=headline(found),
        people_said=people_said(found["people"]) if found["people"] else [],
        marks=MARK_NAMES,
        weakened=weakened(found),
        adopt=adopt_sentence(found),
        systems=found["adopt"]["systems"] if found["adopt"] else [],
        compared=compared_facts(runs, groups, found) if runs else outside_facts(outside, found),
        by_value=by_value,
        tokenisation=[(level, _in_both(name)) for level, name in found["tokenisation"].items()],
        steps=next_steps(groups, found),
        videos=VIDEOS,
        error_names=NAMES,
        uses_video={row["name"]: not doubts(row["looking"]) for row in found["table"] if "looking" in row},
        cost={k: c for k, c in COST.items() if runs or any(row["cost"][k] is not None for row in found["table"])},
        projectors=PROJECTORS,
        adapters=ADAPTERS,
        cells={(r["projector"], r["adapter"]): r for r in reversed(found["table"])},
        charts=made,
        data=json_text(
            {
                "groups": [name for name, _ in shown],
                "clips": clips,
                "charts": {name: {part: chart[part] for part in ("figure", "titles")} for name, chart in made.items()},
            }
        ),
        shown=sum("image" in clip for clip in clips),
    )
    data = page.encode()
    write(Path(path), data)
    return len(data)


def compared_facts(runs: list[Run], groups: list[Group], found: dict[str, Any]) -> list[tuple[Text, list]]:
    """Labels, and values: a string, a pair in English and Korean, or None if not recorded; several if they differ."""

    def of_all(value: Callable[[Run], Any]) -> list:
        return list(dict.fromkeys(None if (known := value(run)) is None else str(known) for run in runs))

    seeds = [
        (f"{group.name} ({count} seed{'s' if count > 1 else ''})", f"{group.name} (시드 {count}개)")
        for group in groups
        for count in [len(group.runs)]
    ]
    lengths = list(dict.fromkeys(map(_lengths, runs)))
    clips, videos = f"{found['clips']:,}", f"{found['sources']:,}"
    return [
        (("experiments", "실험"), seeds),
        (("metric of the verdict", "판정 지표"), [found["metric"]]),
        (("clips", "클립"), [(f"{clips} of {videos} videos", f"영상 {videos}개에서 나온 {clips}개")]),
        (("split", "분할"), of_all(lambda run: run.metrics["settings"].get("split"))),
        (("training data (fingerprint)", "학습 데이터(지문)"), of_all(_data)),
        (("global batch", "글로벌 배치"), of_all(lambda run: run.record.get("global_batch"))),
        (("length by stage", "단계별 학습 길이"), lengths),
        (("vision tower", "비전 타워"), of_all(lambda run: run.metrics["settings"].get("vision"))),
        (("language model", "언어 모델"), of_all(lambda run: run.metrics["settings"].get("llm"))),
        (("frames per clip", "클립당 프레임"), of_all(lambda run: run.metrics["settings"].get("num_frames"))),
        (("prompt", "프롬프트"), of_all(lambda run: run.metrics["settings"].get("prompt"))),
    ]


def outside_facts(outside: Sequence[OutsideRun], found: dict[str, Any]) -> list[tuple[Text, list]]:
    """As :func:`compared_facts`, for outside models alone."""
    clips, videos = f"{found['clips']:,}", f"{found['sources']:,}"
    splits = list(dict.fromkeys(run.metrics["settings"].get("split") for run in outside))
    return [
        (("outside models", "외부 모델"), [run.name for run in outside]),
        (("metric of the verdict", "판정 지표"), [found["metric"]]),
        (("clips", "클립"), [(f"{clips} of {videos} videos", f"영상 {videos}개에서 나온 {clips}개")]),
        (("split", "분할"), splits),
    ]


def _data(run: Run) -> str | None:
    fingerprint = run.record.get("data_fingerprint")
    return fingerprint and fingerprint[:12]


def _lengths(run: Run) -> Text:
    parts = [
        (s.name, s.epochs, "epochs", "에폭") if s.epochs else (s.name, s.steps, "steps", "스텝")
        for s in run.experiment.stages
    ]
    return (
        ", ".join(f"{name} {count:,g} {english}" for name, count, english, _ in parts),
        ", ".join(f"{name} {count:,g}{korean}" for name, count, _, korean in parts),
    )


def by_value(values: dict[str, Any]) -> list[tuple[str | None, list[str]]]:
    """Each value once, as text, with the names that have it; None for what is not set."""
    found: dict[str | None, list[str]] = {}
    for name, value in values.items():
        found.setdefault(shown_value(value), []).append(name)
    return list(found.items())


def _in_both(name: str) -> Text:
    """A way to divide captions, in English and Korean."""
    korean = {CHARACTERS.name: "유니코드 글자(NFC, 공백 제외)", "characters": "글자"}
    return name, korean.get(name, name.replace(", model ", ", 모델 "))


def clip_grid(runs: Sequence[Evaluated], metric: str, keys: list[str]) -> list[dict]:
    """A record per clip: key, references, caption and score of each run, spread of the scores, and a strip of frames
    for as many as the page may hold."""
    clips, images, total = [], 0, 0
    for key in keys:
        lines = [run.predictions[key] for run in runs]
        # None: undefined among the clips of that evaluation.
        scores = [None if (s := line["scores"].get(metric)) is None else round(s, 1) for line in lines]
        known = [score for score in scores if score is not None]
        clip = {
            "key": key,
            "refs": lines[0]["references"],
            "caps": [p["caption"] for p in lines],
            "scores": scores,
            "seconds": lines[0]["duration"],
            "spread": round(max(known) - min(known), 1) if known else 0.0,
        }
        image = _thumbnail(runs, key) if images < THUMBNAILS else None
        if image and total + len(image) <= THUMBNAIL_BYTES:
            clip["image"] = image
            images, total = images + 1, total + len(image)
        clips.append(clip)
    return clips


def all_rows(found: dict[str, Any]) -> list[dict]:
    """The rows of the experiments, then of the outside models, which have neither projector nor seeds."""
    return [*found["table"], *(found["adopt"]["systems"] if found["adopt"] else ())]


def to_csv(found: dict[str, Any]) -> str:
    """One row per experiment: metrics with their intervals, costs, and what people answered."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = found["metrics"]
    of_people, cells = people_columns(found)
    writer.writerow(
        [
            "experiment",
            "projector",
            "adapter",
            "seeds",
            *(f"{n} {part}" for n in names for part in ("value", "low", "high")),
            *COST,
            *of_people,
        ]
    )
    for row in all_rows(found):
        writer.writerow(
            [
                row["name"],
                row["projector"],
                row["adapter"],
                row["seeds"],
                *(f"{row['metrics'][n][part]:.4f}" for n in names for part in ("value", "low", "high")),
                *(row["cost"][key] for key in COST),
                *cells.get(row["name"], ()),
            ]
        )
    return file.getvalue()


def to_json(found: dict[str, Any]) -> str:
    """All figures; what is not a number is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(name): plain(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        if isinstance(value, np.generic):
            value = value.item()
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(found), ensure_ascii=False, indent=1, default=str) + "\n"


def to_latex(found: dict[str, Any]) -> str:
    """A booktabs table; the best value of each metric is bold."""
    names = found["metrics"]
    best = {n: max(r["metrics"][n]["value"] for r in all_rows(found)) for n in names}

    def text(value: str) -> str:
        return "".join("\\" + c if c in "&%$#_{}" else c for c in value)

    lines = [
        r"\begin{tabular}{lll" + "r" * len(names) + "}",
        r"\toprule",
        " & ".join(["experiment", "projector", "adapter", *map(text, names)]) + r" \\",
        r"\midrule",
    ]
    for row in all_rows(found):
        cells = []
        for name in names:
            cell = row["metrics"][name]
            number = f"{cell['value']:.1f}"
            number = rf"\textbf{{{number}}}" if cell["value"] == best[name] else number
            cells.append(rf"{number} {{\scriptsize [{cell['low']:.1f}, {cell['high']:.1f}]}}")
        lines.append(
            " & ".join([text(row["name"]), text(row["projector"] or "--"), text(row["adapter"] or "--"), *cells])
            + r" \\"
        )
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _thumbnail(runs: Sequence[Evaluated], key: str) -> str | None:
    """The strip that an evaluation kept of the clip, in base64."""
    for run in runs:
        folder = run.path / "evaluation" / run.metrics["folder"] / "thumbnails"
        path = folder / f"{run.predictions[key]['position']:06d}.jpg"
        if path.is_file():
            return base64.b64encode(path.read_bytes()).decode()
    return None
