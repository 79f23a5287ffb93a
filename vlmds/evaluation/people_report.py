"""People's and judges' answers in the output of `vlmds compare`: terminal, CSV table, sentences of the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmds.errors import InputError
from vlmds.evaluation.compare import order_of_cost
from vlmds.evaluation.evaluated_runs import OutsideRun, Run, group_runs, with_unique_names
from vlmds.evaluation.people import match, people
from vlmds.evaluation.people_verdict import people_line, people_sentences
from vlmds.evaluation.reviews import MARK_NAMES, read_reviews
from vlmds.evaluation.verdict import verdict_line, verdict_sentences


def add_people(
    found: dict[str, Any],
    runs: list[Run],
    folder: Path,
    by: str,
    margin: float | None,
    outside: Sequence[OutsideRun] = (),
) -> None:
    """Add the answers of a folder of reviews to the result of :func:`vlmds.evaluation.compare.compare`.

    Args:
        runs, outside: that were compared. by: what decides, "metrics" or "people". margin: of the verdict by people;
            None: the default.

    Raises:
        InputError: the reviews are damaged or of other runs, or there is nothing for people to decide with.
    """
    if margin is not None and not 0 < margin < 0.5:
        raise InputError(f"--margin {margin:g}: with --by people, not a share between 0 and 0.5, such as 0.05")
    groups = group_runs(with_unique_names(runs))
    costs, _ = order_of_cost(groups, found["table"])
    metrics = [found["metric"], *(m for m in found["metrics"] if m not in (found["metric"], *found["undefined"]))]
    found["people"] = people(match(read_reviews(folder), groups, outside), costs, metrics, margin)
    found["by"] = by
    if by == "people" and found["people"]["verdict"] is None:
        raise InputError(
            f"--by people: {folder} has no answers about pairs of these runs drawn at random; answer some in vlmds review"
        )


def headline(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The sentences of the verdict, by what decides."""
    by_metric = verdict_sentences(found)
    if found["by"] != "people":
        return by_metric
    return [
        *people_sentences(found["people"]["verdict"]),
        *(
            (f"By {found['metric']}: {english}", f"{found['metric']} 기준: {korean}")
            for english, korean in by_metric[:1]
        ),
    ]


def closing_line(found: dict[str, Any]) -> str:
    """The verdict for the terminal, by what decides."""
    if found["by"] != "people":
        return verdict_line(found)
    return f"{people_line(found['people']['verdict'])}\nBy {found['metric']}: {verdict_line(found)}"


def people_text(found: dict[str, Any]) -> str:
    """The answers as a table for the terminal."""
    p = found["people"]
    lines = [
        f"people: {p['answers']:,} answers by {len(p['reviewers'])} reviewers ({', '.join(p['reviewers']) or 'none'}), "
        f"{p['random']:,} of them about pairs drawn at random, of {p['sources']:,} videos"
    ]
    if p["alpha"]:
        lines.append(
            f"agreement: Krippendorff's alpha {_interval(p['alpha'], '.2f')} on {p['alpha']['units']} pairs of several"
        )
    rows = [["", "preferred (95%)", "won/tied/lost", *(f"judge {j['name']}" for j in p["judges"]),
             *(f"{j['name']} corrected" for j in p["judges"] if j["corrected"]), *(en for en, _ in MARK_NAMES.values())]]  # fmt: skip
    for row in p["table"]:
        marks = [row["marks"][mark] for mark in MARK_NAMES]
        rows.append(
            [
                row["name"],
                _percent(row["win"]),
                f"{row['wins']}/{row['ties']}/{row['losses']}",
                *(_percent(j["win"].get(row["name"])) for j in p["judges"]),
                *(_percent(j["corrected"].get(row["name"])) for j in p["judges"] if j["corrected"]),
                *(_percent(mark if "value" in mark else None) for mark in marks),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [
        f"{metric} is higher for the preferred caption in {_percent(share)} of {share['answers']} answers"
        for metric, share in list(p["metrics"].items())[:1]
    ]
    if p["disagreements"]:
        clips = ", ".join(each["clip"] for each in p["disagreements"][:3])
        lines.append(f"people and {found['metric']} disagree most on: {clips} (more in the report)")
    lines += [english for english, _ in adopt_sentences(p)]
    lines += [_judge_line(judge) for judge in p["judges"]]
    if found["by"] != "people" and p["verdict"]:
        lines.append(people_line(p["verdict"]))
    return "\n".join(lines)


def people_said(people: dict[str, Any]) -> list[tuple[str, str]]:
    """The sentences of the report's part on people: their verdict, if there is one, and on the outside models."""
    verdict = people["verdict"]
    return [*(people_sentences(verdict) if verdict else []), *adopt_sentences(people)]


def adopt_sentences(people: dict[str, Any]) -> list[tuple[str, str]]:
    """For each outside model what people prefer, in English and Korean."""
    said = []
    for row in people["adopt"]:
        share = f"{100 * row['value']:.1f}%"
        how = f"95% interval {100 * row['low']:.1f} to {100 * row['high']:.1f}%, Holm-corrected p {row['p_holm']:.3g}"
        how_ko = f"95% 신뢰 구간 {100 * row['low']:.1f} ~ {100 * row['high']:.1f}%, Holm 보정 p {row['p_holm']:.3g}"
        said.append(
            (
                f"Build or adopt, by people: {row['reference']} is preferred to {row['name']} in {share} of comparisons "
                f"(ties as half; {how}).",
                f"직접 학습과 도입(사람 평가 기준): {row['reference']}이(가) {row['name']}보다 선호될 확률은 {share}입니다"
                f"(무승부는 절반, {how_ko}).",
            )
        )
    return said


def _judge_line(judge: dict[str, Any]) -> str:
    line = (
        f"judge {judge['name']}: {judge['pairs']} pairs drawn at random; the same answer in both orders for {judge['same']} "
        f"of {judge['seen']} pairs; {judge['state']['en']}"
    )
    if judge["agreement"]:
        line += f"; agrees with people on {_percent(judge['agreement'])} of {judge['agreement']['pairs']} pairs"
    return line


def people_columns(found: dict[str, Any]) -> tuple[list[str], dict[str, list[Any]]]:
    """(headings, cells by the name of what is compared) for the CSV table; shares between 0 and 1."""
    p = found["people"]
    if not p:
        return [], {}
    parts = ("value", "low", "high")
    judged = [(f"judge {j['name']}{kind}", j[key]) for j in p["judges"] for key, kind in _KINDS if j[key]]
    headings = [f"people {part}" for part in (*parts, "wins", "ties", "losses")]
    headings += [f"{mark} {part}" for mark in MARK_NAMES for part in parts]
    headings += [f"{name} {part}" for name, _ in judged for part in parts]
    rows = {}
    for row in p["table"]:
        cells = [row["win"], *(row["marks"][mark] for mark in MARK_NAMES), *(of.get(row["name"]) for _, of in judged)]
        numbers = [[f"{cell[part]:.4f}" if cell and part in cell else "" for part in parts] for cell in cells]
        own, *others = numbers
        rows[row["name"]] = [*own, row["wins"], row["ties"], row["losses"], *(n for cell in others for n in cell)]
    return headings, rows


_KINDS = (("win", ""), ("corrected", " corrected"))


def _percent(cell: dict[str, Any] | None) -> str:
    return "–" if cell is None else f"{cell['value']:.1%} [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"


def _interval(cell: dict[str, Any], form: str) -> str:
    return f"{cell['value']:{form}} [{cell['low']:{form}}, {cell['high']:{form}}]"
