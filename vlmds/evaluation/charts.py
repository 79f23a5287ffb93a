"""Charts of the comparison report, as Plotly figures with names and descriptions in English and Korean."""

from __future__ import annotations

import json
from typing import Any

import plotly.graph_objects as go

from vlmds.evaluation.evaluated_runs import Group, Run, group_runs
from vlmds.pages.render import Text

COLOURS = ("#1f77b4", "#e8710a", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#a8a914", "#17becf")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star", "pentagon", "hexagram")


def charts(runs: list[Run], found: dict[str, Any]) -> dict[str, dict]:
    """{id: {figure, titles, name, alt}}: figures without colours of text or paper, which the page sets for light
    and dark; axis titles by language; name and description in English and Korean."""
    made = {"scatter": _quality_and_cost(found)} if runs else {}  # outside models have neither tokens nor losses
    groups = group_runs(runs)
    for number, stage in enumerate(runs[0].experiment.stages if runs else ()):
        made[f"loss{number}"] = _losses(groups, stage.name)
    for name, unit in (
        ("length", ("caption length, characters", "캡션 길이(글자 수)")),
        ("duration", ("clip duration, s", "클립 길이(초)")),
    ):
        if found["breakdown"][name]:
            made[name] = _breakdown(found, name, unit)
    return made


def _quality_and_cost(found: dict[str, Any]) -> dict:
    metric = found["metric"]
    figure = go.Figure()
    largest = max(row["cost"]["trainable"] for row in found["table"])
    for number, row in enumerate(found["table"]):
        cell = row["metrics"][metric]
        figure.add_scatter(
            x=[row["cost"]["visual_tokens"]],
            y=[cell["value"]],
            name=_short(row["name"]),
            mode="markers",
            marker=dict(
                size=8 + 20 * (row["cost"]["trainable"] / largest) ** 0.5,
                symbol=SYMBOLS[number % len(SYMBOLS)],
                color=COLOURS[number % len(COLOURS)],
            ),
            error_y=dict(
                type="data",
                symmetric=False,
                array=[cell["high"] - cell["value"]],
                arrayminus=[cell["value"] - cell["low"]],
            ),
        )
    # Only the numbers of tokens that occur are labelled, not 2, 3 … 9 of each power of ten.
    tokens = sorted({row["cost"]["visual_tokens"] for row in found["table"]})
    figure.update_xaxes(
        type="log", tickmode="array", tickvals=tokens, ticktext=[f"{count:,.0f}" for count in tokens], minor_ticks=""
    )
    points = "; ".join(
        f"{row['name']} {row['cost']['visual_tokens']:,.0f} → {row['metrics'][metric]['value']:.2f}"
        for row in found["table"]
    )
    return _chart(
        figure,
        ("visual tokens per clip (log scale)", metric),
        ("클립당 시각 토큰 수(로그 눈금)", metric),
        (
            f"{metric} against visual tokens (area: trainable parameters)",
            f"시각 토큰 수에 따른 {metric} (점의 면적: 학습 파라미터 수)",
        ),
        points,
    )


def _losses(groups: list[Group], stage: str) -> dict:
    """Training and validation loss; the seeds of an experiment have one colour and one entry of the legend."""
    figure = go.Figure()
    last = []
    for number, group in enumerate(groups):
        labelled = False
        for run in group.runs:
            for curve in (curve for curve in run.curves if curve["stage"] == stage):
                validation = curve["kind"] == "val"
                figure.add_scatter(
                    x=curve["step"],
                    y=curve["loss"],
                    name=_short(group.name),
                    legendgroup=group.name,
                    showlegend=not validation and not labelled,
                    line_color=COLOURS[number % len(COLOURS)],
                    mode="lines+markers" if validation or len(curve["step"]) == 1 else "lines",
                    line_dash="dot" if validation else "solid",
                )
                if not validation and not labelled:
                    labelled = True
                    last.append(f"{group.name} {curve['loss'][-1]:.3f}")
    return _chart(
        figure,
        ("step", "loss per token"),
        ("스텝", "토큰당 손실"),
        (f"Loss of stage {stage}", f"{stage} 단계의 손실"),
        "; ".join(last),
    )


def _breakdown(found: dict[str, Any], name: str, unit: Text) -> dict:
    metric, parts = found["metric"], found["breakdown"][name]
    figure = go.Figure()
    labels = [f"{part['low']:.3g}–{part['high']:.3g}<br>n={part['clips']:,}" for part in parts]
    for number, row in enumerate(found["table"]):
        figure.add_bar(
            x=labels,
            y=[part["values"][number] for part in parts],
            name=_short(row["name"]),
            marker_color=COLOURS[number % len(COLOURS)],
        )
    figure.update_xaxes(type="category")
    values = "; ".join(
        f"{row['name']} " + ", ".join(f"{part['values'][number]:.1f}" for part in parts)
        for number, row in enumerate(found["table"])
    )
    return _chart(
        figure, (unit[0], metric), (unit[1], metric), (f"{metric} by {unit[0]}", f"{unit[1]}에 따른 {metric}"), values
    )


def _short(name: str) -> str:
    """For the legend."""
    return name if len(name) <= 26 else name[:25] + "…"


def _chart(figure: go.Figure, english: Text, korean: Text, name: Text, values: str) -> dict:
    """english, korean: titles of the x and y axis. values: that the description lists."""
    figure.update_layout(template="none", margin=dict(l=60, r=20, t=50, b=60), height=398)
    return {
        "figure": json.loads(figure.to_json()),
        "titles": {"en": english, "ko": korean},
        "name": name,
        "alt": (f"Chart: {name[0]}. {values}", f"차트: {name[1]}. {values}"),
    }
