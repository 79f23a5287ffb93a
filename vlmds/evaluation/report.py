"""Report of `vlmds compare`: one offline HTML page, and the same numbers as CSV or LaTeX."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from vlmds.evaluation.blind import VIDEOS, doubts
from vlmds.evaluation.compare import ADAPTERS, common_keys
from vlmds.evaluation.cost import COST
from vlmds.evaluation.evaluated_runs import Group, Run, group_runs, with_unique_names
from vlmds.evaluation.verdict import verdict_sentences
from vlmds.experiments.schema import PROJECTORS
from vlmds.files import write

THUMBNAILS = 300
THUMBNAIL_BYTES = 12_000_000
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
TEXT_PLACES = ("middle right", "middle left", "top right", "bottom left", "bottom right", "top left")


def write_report(path: str | Path, runs: list[Run], found: dict[str, Any]) -> int:
    """Write the page; returns its size in bytes. found: result of :func:`compare`."""
    environment = Environment(
        loader=PackageLoader("vlmds.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    runs = with_unique_names(runs)
    groups = group_runs(runs)
    clips = clip_grid(groups, found["metric"], common_keys(runs))
    page = environment.get_template("report.html.j2").render(
        found=found,
        sentences=verdict_sentences(found),
        videos=VIDEOS,
        uses_video={row["name"]: not doubts(row["looking"]) for row in found["table"]},
        cost=COST,
        projectors=PROJECTORS,
        adapters=ADAPTERS,
        cells={(r["projector"], r["adapter"]): r for r in reversed(found["table"])},
        plotly=get_plotlyjs(),
        data=_json(
            {
                "groups": [g.name for g in groups],
                "metric": found["metric"],
                "clips": clips,
                "charts": charts(runs, found),
            }
        ),
        shown=sum("image" in clip for clip in clips),
    )
    data = page.encode()
    write(Path(path), data)
    return len(data)


def clip_grid(groups: list[Group], metric: str, keys: list[str]) -> list[dict]:
    """A record per clip: key, references, caption and score of each experiment (of its first
    seed), spread of the scores, and a strip of frames for as many as the page may hold."""
    clips, images, total = [], 0, 0
    for key in keys:
        lines = [group.runs[0].predictions[key] for group in groups]
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
        image = _thumbnail(groups, key) if images < THUMBNAILS else None
        if image and total + len(image) <= THUMBNAIL_BYTES:
            clip["image"] = image
            images, total = images + 1, total + len(image)
        clips.append(clip)
    return clips


def charts(runs: list[Run], found: dict[str, Any]) -> dict[str, dict]:
    """{name: {figure, titles}}: Plotly figures without colours of text or paper, which the page
    sets for light and dark, and axis titles in both languages."""
    metric = found["metric"]
    scatter = go.Figure()
    largest = max(row["cost"]["trainable"] for row in found["table"])
    for number, row in enumerate(found["table"]):
        cell = row["metrics"][metric]
        scatter.add_scatter(
            x=[row["cost"]["visual_tokens"]],
            y=[cell["value"]],
            name=row["name"],
            text=[row["name"]],
            mode="markers+text",
            textposition=TEXT_PLACES[number % len(TEXT_PLACES)],
            marker_size=[8 + 20 * (row["cost"]["trainable"] / largest) ** 0.5],
            error_y=dict(
                type="data",
                symmetric=False,
                array=[cell["high"] - cell["value"]],
                arrayminus=[cell["value"] - cell["low"]],
            ),
        )
    scatter.update_xaxes(type="log")
    made = {
        "scatter": _chart(scatter, ("visual tokens per clip (log)", metric), ("클립당 시각 토큰 수 (로그)", metric))
    }
    for number, stage in enumerate(runs[0].experiment.stages):
        figure = go.Figure()
        for number_of_run, run in enumerate(runs):
            colour = COLOURS[number_of_run % len(COLOURS)]
            for curve in run.curves:
                if curve["stage"] == stage.name:
                    validation = curve["kind"] == "val"
                    figure.add_scatter(
                        x=curve["step"],
                        y=curve["loss"],
                        name=run.name,
                        legendgroup=run.name,
                        showlegend=not validation,
                        line_color=colour,
                        mode="lines+markers" if validation else "lines",
                        line_dash="dot" if validation else "solid",
                    )
        made[f"loss{number}"] = _chart(
            figure, (f"step ({stage.name})", "loss per token"), (f"스텝 ({stage.name})", "토큰당 손실")
        )
    for name, unit in (
        ("length", ("caption length, characters", "캡션 길이(글자 수)")),
        ("duration", ("clip duration, s", "클립 길이(초)")),
    ):
        figure = go.Figure()
        parts = found["breakdown"][name]
        labels = [f"{p['low']:.3g}–{p['high']:.3g} (n={p['clips']})" for p in parts]
        for number, row in enumerate(found["table"]):
            figure.add_bar(x=labels, y=[p["values"][number] for p in parts], name=row["name"])
        made[name] = _chart(figure, (unit[0], metric), (unit[1], metric))
    return made


def to_csv(found: dict[str, Any]) -> str:
    """One row per experiment: metrics with their intervals, then costs."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = found["metrics"]
    writer.writerow(
        [
            "experiment",
            "projector",
            "adapter",
            "seeds",
            *(f"{n} {part}" for n in names for part in ("value", "low", "high")),
            *COST,
        ]
    )
    for row in found["table"]:
        writer.writerow(
            [
                row["name"],
                row["projector"],
                row["adapter"],
                row["seeds"],
                *(f"{row['metrics'][n][part]:.4f}" for n in names for part in ("value", "low", "high")),
                *(row["cost"][key] for key in COST),
            ]
        )
    return file.getvalue()


def to_latex(found: dict[str, Any]) -> str:
    """A booktabs table; the best value of each metric is bold."""
    names = found["metrics"]
    best = {n: max(r["metrics"][n]["value"] for r in found["table"]) for n in names}

    def text(value: str) -> str:
        return "".join("\\" + c if c in "&%$#_{}" else c for c in value)

    lines = [
        r"\begin{tabular}{lll" + "r" * len(names) + "}",
        r"\toprule",
        " & ".join(["experiment", "projector", "adapter", *map(text, names)]) + r" \\",
        r"\midrule",
    ]
    for row in found["table"]:
        cells = []
        for name in names:
            cell = row["metrics"][name]
            number = f"{cell['value']:.1f}"
            number = rf"\textbf{{{number}}}" if cell["value"] == best[name] else number
            cells.append(rf"{number} {{\scriptsize [{cell['low']:.1f}, {cell['high']:.1f}]}}")
        lines.append(" & ".join([text(row["name"]), text(row["projector"]), text(row["adapter"]), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _chart(figure: go.Figure, english: tuple[str, str], korean: tuple[str, str]) -> dict:
    figure.update_layout(template="none", margin=dict(l=60, r=20, t=40, b=60), height=380)
    return {"figure": json.loads(figure.to_json()), "titles": {"en": english, "ko": korean}}


def _thumbnail(groups: list[Group], key: str) -> str | None:
    """The strip that an evaluation kept of the clip, in base64."""
    for run in (run for group in groups for run in group.runs):
        folder = run.path / "evaluation" / run.metrics["folder"] / "thumbnails"
        path = folder / f"{run.predictions[key]['position']:06d}.jpg"
        if path.is_file():
            return base64.b64encode(path.read_bytes()).decode()
    return None


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
