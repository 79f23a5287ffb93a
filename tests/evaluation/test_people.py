"""`vlmds compare --reviews`: people's and judges' answers in the console, the tables and the page; bad input."""

import csv
import json
from pathlib import Path

import pytest

from tests.evaluation.opinions import answers_of
from tests.evaluation.planted import plant, planted_outside
from vlmds.cli import main
from vlmds.evaluation.reviews import (
    Answer,
    Pair,
    Plan,
    ReviewedRun,
    SideMarks,
    answers_path,
    append_answer,
    pair_id,
    run_id,
    write_plan,
)
from vlmds.files import sha256_of

EXPS, CLIPS = ("e3", "e4", "e7"), 80


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [plant(folder / exp, exp, clips=CLIPS) for exp in EXPS]


def reviewed(run: Path) -> ReviewedRun:
    folder = run / "evaluation" / "val"
    sha256 = sha256_of(folder / "predictions.jsonl")
    return ReviewedRun(id=run_id(sha256), name=run.name, evaluation=str(folder.absolute()), sha256=sha256)


def planned(runs, each: int = 2, chosen: str = "random") -> Plan:
    """Each clip with `each` pairs of runs in turn."""
    named = [reviewed(run) for run in runs]
    versus = [(a.id, b.id) for i, a in enumerate(named) for b in named[i + 1 :]]
    pairs = [
        Pair(pair=pair_id(f"clip{c:05d}", a, b), clip=f"clip{c:05d}", source=f"video{c:05d}", a=a, b=b, chosen=chosen)
        for c in range(CLIPS)
        for a, b in [versus[(c + n) % len(versus)] for n in range(min(each, len(versus)))]
    ]
    return Plan(dataset="/data", split="val", runs=tuple(named), pairs=tuple(pairs))


def write_reviews(folder: Path, plan: Plan, answers: list[Answer]) -> Path:
    folder.mkdir(parents=True)
    write_plan(folder, plan)
    for reviewer in {answer.reviewer for answer in answers}:
        own = [answer for answer in answers if answer.reviewer == reviewer]
        append_answer(answers_path(folder, reviewer), own[0])
        with answers_path(folder, reviewer).open("a", encoding="utf-8") as file:  # the rest at once, which is quicker
            file.writelines(answer.model_dump_json(by_alias=True) + "\n" for answer in own[1:])
    return folder


def strengths(plan: Plan, *values: float) -> dict[str, float]:
    return {run.id: value for run, value in zip(plan.runs, values, strict=True)}


@pytest.fixture(scope="module")
def reviews(runs, tmp_path_factory) -> Path:
    """Two people who prefer e7, a judge who agrees, and one that always sides with the first place."""
    plan = planned(runs)
    better = strengths(plan, -1.0, 0.0, 2.0)
    answers = [
        answer.model_copy(update={"marks": SideMarks(left=("wrong_direction",)) if i % 4 == 0 else SideMarks()})
        for seed, name in enumerate(("민수", "지영"))
        for i, answer in enumerate(answers_of(plan, name, better, seed))
    ]
    answers = [a for a in answers if a.clip < "clip00060"]  # the judge sees all
    for order in (1, 2):
        answers += answers_of(plan, "judge:good", better, 5 + order, order=order)
        answers += answers_of(plan, "judge:first", better, 5 + order, order=order, place=50.0)
    return write_reviews(tmp_path_factory.mktemp("reviews") / "all", plan, answers)


def compared(runs, reviews, tmp_path, *options) -> int:
    return main(["compare", *map(str, runs), "--reviews", str(reviews), "-o", str(tmp_path / "r.html"), *options])


def test_people_and_judges_are_in_all_outputs(runs, reviews, tmp_path, capsys):
    files = ("--json", str(tmp_path / "r.json"), "--csv", str(tmp_path / "r.csv"))
    assert compared(runs, reviews, tmp_path, *files) == 0
    out = capsys.readouterr().out
    assert "240 answers by 2 reviewers (민수, 지영)" in out and "Krippendorff's alpha" in out
    assert "judge first: 160 pairs drawn at random; the same answer in both orders for 0 of 160 pairs; not used" in out
    assert "By people, take e7" in out and "corrected with people's answers about 120 of its pairs" in out
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["people"]
    wins = {row["name"]: row["win"] for row in found["table"]}
    assert wins["e7"]["low"] > 0.5 > wins["e3"]["high"]
    assert sum(row["wins"] for row in found["table"]) == sum(row["losses"] for row in found["table"])
    mark = found["table"][0]["marks"]["wrong_direction"]
    assert 0 < mark["low"] < mark["value"] < mark["high"] < 0.3
    good = next(judge for judge in found["judges"] if judge["name"] == "good")
    assert good["corrected"]["e7"]["low"] > 0.5 and good["agreement"]["pairs"] == 120
    first = next(judge for judge in found["judges"] if judge["name"] == "first")
    assert first["biased"] and not first["win"] and not first["corrected"]
    rows = list(csv.DictReader((tmp_path / "r.csv").read_text().splitlines()))
    assert float(rows[2]["people value"]) == pytest.approx(wins["e7"]["value"], abs=1e-4)
    assert rows[2]["judge good corrected value"] and "judge first value" not in rows[0]
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert 'id="people"' in page and "사람 평가" in page and "위치에 따라 답합니다" in page


def test_the_verdict_by_people(runs, reviews, tmp_path, capsys):
    assert compared(runs, reviews, tmp_path, "--by", "people", "--margin", "10%") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("By people"))
    assert "take e7" in line and "40%" in line
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "사람 평가 기준 권장: e7" in page.partition('class="headline"')[2][:600]


def test_only_pairs_drawn_at_random_enter_estimates(runs, tmp_path, capsys):
    plan = planned(runs, chosen="disagreement")
    answers = [
        a.model_copy(update={"marks": SideMarks(left=("wrong_action",))})
        for a in answers_of(plan, "민수", strengths(plan, 0, 0, 1.0))
    ]
    reviews = write_reviews(tmp_path / "reviews", plan, answers)
    assert compared(runs, reviews, tmp_path, "--json", str(tmp_path / "r.json")) == 0
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["people"]
    assert found["answers"] == 160 and found["random"] == 0 and found["verdict"] is None
    assert all(row["win"] is None for row in found["table"])
    marks = [row["marks"]["wrong_action"] for row in found["table"]]
    assert sum(mark["marked"] for mark in marks) == 160 and "value" not in marks[0]
    assert compared(runs, reviews, tmp_path, "--by", "people") == 2
    assert "no answers about pairs of these runs drawn at random" in capsys.readouterr().err


def test_a_judge_alone_is_called_uncalibrated(runs, tmp_path, capsys):
    plan = planned(runs)
    better = strengths(plan, 0.0, 0.0, 1.0)
    answers = [a for order in (1, 2) for a in answers_of(plan, "judge:m", better, order, order=order)]
    assert compared(runs, write_reviews(tmp_path / "reviews", plan, answers), tmp_path) == 0
    assert "uncalibrated: people judged 0 of its pairs" in capsys.readouterr().out
    assert "보정되지 않음" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_people_and_the_metric_disagree_where_the_lower_score_is_preferred(runs, tmp_path):
    plan = planned(runs[:2])
    scores = [
        {line["key"]: line["scores"]["cider_d@char"] for line in map(json.loads, open(run / "evaluation/val/predictions.jsonl"))}
        for run in runs[:2]
    ]  # fmt: skip
    answers = answers_of(plan, "민수", strengths(plan, 50.0, 0.0))
    reviews = write_reviews(tmp_path / "reviews", plan, answers)
    assert compared(runs[:2], reviews, tmp_path, "--json", str(tmp_path / "r.json")) == 0
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["people"]
    lower = [clip for clip in scores[0] if scores[0][clip] < scores[1][clip]]
    assert found["metrics"]["cider_d@char"]["value"] == pytest.approx(1 - len(lower) / CLIPS)
    worst = min(lower, key=lambda clip: scores[0][clip] - scores[1][clip])
    assert found["disagreements"][0]["clip"] == worst and found["disagreements"][0]["preferred"] == "e3"


def test_seeds_of_one_experiment_are_one(tmp_path, capsys):
    runs = [plant(tmp_path / f"e3s{s}", "e3", s, clips=CLIPS) for s in (0, 1)]
    runs.append(plant(tmp_path / "e7", "e7", clips=CLIPS))
    plan = planned(runs, each=3)
    reviews = write_reviews(tmp_path / "reviews", plan, answers_of(plan, "민수", strengths(plan, 0, 0, 1.0)))
    assert compared(runs, reviews, tmp_path, "--json", str(tmp_path / "r.json")) == 0
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["people"]
    assert len(found["table"]) == 2 and found["answers"] == 160
    assert "80 answers are about other runs" in str(found["notes"])


def test_bad_input_is_one_line(runs, reviews, tmp_path, capsys):
    def refused(*arguments: str) -> str:
        assert main(["compare", *arguments, "-o", str(tmp_path / "r.html")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    three = [*map(str, runs)]
    assert "--reviews DIR" in refused(*three, "--by", "people")
    assert "review.json: missing" in refused(*three, "--reviews", str(tmp_path / "none"))
    assert "with --by people, not a share between 0 and 0.5" in refused(
        *three, "--reviews", str(reviews), "--by", "people", "--margin", "0.7"
    )
    others = [str(plant(tmp_path / exp, exp, seed=5, clips=CLIPS)) for exp in ("e1", "e2")]
    assert "compare those runs" in refused(*others, "--reviews", str(reviews))


def test_a_run_that_was_evaluated_again_is_named(runs, reviews, tmp_path, capsys):
    plan = planned(runs)
    copied = plan.model_copy(
        update={"runs": (*plan.runs[:2], plan.runs[2].model_copy(update={"id": "f" * 12, "sha256": "f" * 64}))}
    )
    kept = [a for a in answers_of(plan, "민수", strengths(plan, 0, 0, 0)) if plan.runs[2].id not in (a.left, a.right)]
    folder = write_reviews(tmp_path / "reviews", copied, kept)
    assert compared(runs, folder, tmp_path, "--json", str(tmp_path / "r.json")) == 0
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["people"]
    assert "e7: evaluated again after it was reviewed" in str(found["notes"]) and found["table"][2]["win"] is None


def test_an_outside_model_has_its_preference_and_does_not_change_the_verdict(runs, tmp_path, capsys):
    outside = planted_outside(tmp_path / "gpt", tmp_path / "made", clips=CLIPS)
    plan = planned([*runs, outside], each=6)
    answers = [
        answer
        for seed, name in enumerate(("민수", "지영"))
        for answer in answers_of(plan, name, strengths(plan, -1.0, 0.0, 2.0, 0.5), seed)
    ]
    reviews = write_reviews(tmp_path / "reviews", plan, answers)
    files = ("--json", str(tmp_path / "r.json"), "--csv", str(tmp_path / "r.csv"))

    assert compared(runs, reviews, tmp_path, *files) == 0
    alone = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["people"]
    assert alone["adopt"] == [] and "480 answers are about other runs" in str(alone["notes"])

    assert compared([*runs, outside], reviews, tmp_path, *files) == 0
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["people"]
    assert [row["name"] for row in found["table"]] == ["e3", "e4", "e7", "gpt"]
    assert found["verdict"] == alone["verdict"] and found["answers"] == 2 * alone["answers"]
    (gap,) = found["adopt"]
    assert (gap["name"], gap["reference"]) == ("gpt", "e7") and gap["low"] > 0.5 and gap["p_holm"] < 0.001
    assert "by people: e7 is preferred to gpt in" in capsys.readouterr().out
    assert "e7이(가) gpt보다 선호될 확률" in (tmp_path / "r.html").read_text(encoding="utf-8")
    rows = {row["experiment"]: row for row in csv.DictReader((tmp_path / "r.csv").read_text().splitlines())}
    wins = {row["name"]: row["win"]["value"] for row in found["table"]}
    assert all(float(rows[name]["people value"]) == pytest.approx(wins[name], abs=1e-4) for name in wins)


def test_one_run_and_an_outside_model(runs, tmp_path, capsys):
    """There is no verdict between runs then, and none by people."""
    outside = planted_outside(tmp_path / "gpt", tmp_path / "made", clips=CLIPS)
    plan = planned([runs[2], outside], each=1)
    reviews = write_reviews(tmp_path / "reviews", plan, answers_of(plan, "민수", strengths(plan, 0.0, 3.0)))
    pair = [runs[2], outside]
    assert compared(pair, reviews, tmp_path, "--json", str(tmp_path / "r.json")) == 0
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["people"]
    assert found["verdict"] is None and found["adopt"][0]["high"] < 0.5
    assert "by people: e7 is preferred to gpt in" in capsys.readouterr().out
    assert compared(pair, reviews, tmp_path, "--by", "people") == 2
    assert "no answers about pairs of these runs drawn at random" in capsys.readouterr().err
