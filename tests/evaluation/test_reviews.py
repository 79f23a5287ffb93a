"""The files of reviews: written safe against kills, read with the last answer of each pair."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from vlmds.errors import InputError
from vlmds.evaluation.reviews import (
    PLAN,
    Answer,
    Correction,
    Pair,
    Plan,
    ReviewedRun,
    SideMarks,
    answers_path,
    append_answer,
    append_undo,
    pair_id,
    read_answers,
    read_plan,
    read_reviews,
    reviewer_name,
    write_plan,
)

A, B = "a" * 12, "b" * 12


def make_plan(clips: int = 5) -> Plan:
    runs = tuple(ReviewedRun(id=id, name=f"e{id[0]}", evaluation=f"/runs/{id}", sha256=id) for id in (A, B))
    pairs = tuple(
        Pair(pair=pair_id(f"c{i}", A, B), clip=f"c{i}", source=f"v{i}.mp4", a=A, b=B, chosen="random")
        for i in range(clips)
    )
    return Plan(dataset="/data", split="val", runs=runs, pairs=pairs, choose={"random": 5})


def answer(plan: Plan, number: int, choice: str = "left", reviewer: str = "민수", **more) -> Answer:
    pair = plan.pairs[number]
    return Answer(
        pair=pair.pair,
        clip=pair.clip,
        source=pair.source,
        left=B,
        right=A,
        choice=choice,
        chosen=pair.chosen,
        seconds=2.5,
        time="2026-11-27T10:00:00+00:00",
        reviewer=reviewer,
        **more,
    )


@pytest.fixture
def folder(tmp_path):
    write_plan(tmp_path, make_plan())
    return tmp_path


def test_a_plan_and_answers_are_read_as_written(folder):
    plan = read_plan(folder)
    assert plan == make_plan() and plan.run(B).name == "eb"
    given = [
        answer(plan, 0, marks=SideMarks(right=("wrong_action",)), corrected=Correction(text="새 캡션.", run=B)),
        answer(plan, 1, "both_bad", reference=True),
        answer(plan, 1, "right", "judge:gpt:4/x", order=2),
    ]
    for each in given:
        append_answer(answers_path(folder, each.reviewer), each)
    found = read_reviews(folder)
    assert sorted(found.answers, key=lambda a: a.reviewer) == sorted(given, key=lambda a: a.reviewer)
    assert found.judged == given[2:] and not found.warnings
    assert [a.preferred for a in given] == [B, None, A]
    line = json.loads((folder / "민수.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert line["corrected"] == {"text": "새 캡션.", "from": B} and line["marks"]["right"] == ["wrong_action"]
    assert json.loads((folder / "judge-gpt_4_x.jsonl").read_text())["corrected"] is None


def test_the_last_line_of_a_pair_counts_and_an_undo_takes_it_back(folder):
    plan, path = read_plan(folder), answers_path(folder, "민수")
    for number, choice in ((0, "left"), (1, "left"), (2, "left"), (0, "right")):
        append_answer(path, answer(plan, number, choice))
    append_undo(path, plan.pairs[1].pair, "민수")
    assert [(a.clip, a.choice) for a in read_answers(path, plan)[0]] == [("c2", "left"), ("c0", "right")]
    append_answer(path, answer(plan, 1, "both_good"))
    assert [(a.clip, a.choice) for a in read_answers(path, plan)[0]][-1] == ("c1", "both_good")


def test_both_orders_of_a_judge_count(folder):
    plan, path = read_plan(folder), answers_path(folder, "judge:m")
    for order in (1, 2, 2):
        append_answer(path, answer(plan, 0, reviewer="judge:m", order=order))
    assert [a.order for a in read_answers(path, plan)[0]] == [1, 2]


@pytest.mark.parametrize("text", ["한", "x" * 10000])
def test_a_last_line_cut_short_is_dropped_with_a_warning_and_cut_off(folder, text):
    plan, path = read_plan(folder), answers_path(folder, "민수")
    append_answer(path, answer(plan, 0))
    whole = path.read_bytes()
    append_answer(path, answer(plan, 1, corrected=Correction(text=text, run=A)))
    for cut in (1, 20):  # the newline alone, and more
        data = path.read_bytes()
        path.write_bytes(data[:-cut])
        found = read_reviews(folder)
        assert [a.clip for a in found.answers] == ["c0"]
        assert "민수.jsonl" in found.warnings[0]["en"] and "끊겨" in found.warnings[0]["ko"]
        append_answer(path, answer(plan, 2))
        assert path.read_bytes().startswith(whole)
        assert [a.clip for a in read_reviews(folder).answers] == ["c0", "c2"] and not read_reviews(folder).warnings
        path.write_bytes(data)


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "not an answer"),
        ("[]", "not an answer"),
        ("{}", "pair: Field required"),
        ('{"undo": true}', "not an answer"),
        ("CHOICE", "choice: Input should be"),
        ("RUN", "no run cccccccccccc in review.json"),
    ],
)
def test_a_damaged_line_is_named(folder, line, said):
    plan, path = read_plan(folder), answers_path(folder, "민수")
    good = json.loads(answer(plan, 0).model_dump_json())
    line = {"CHOICE": json.dumps(good | {"choice": "none"}), "RUN": json.dumps(good | {"left": "c" * 12})}.get(
        line, line
    )
    append_answer(path, answer(plan, 0))
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError) as error:
        read_reviews(folder)
    assert f"{path}: line 2: " in str(error.value) and said in str(error.value)


def test_bad_plans(tmp_path):
    with pytest.raises(InputError, match="review.json: missing"):
        read_reviews(tmp_path)
    (tmp_path / PLAN).write_text('{"format": "vlmds-reviews", "version": 2}')
    with pytest.raises(InputError, match="not a plan of this vlmds: version"):
        read_reviews(tmp_path)


def test_names_of_reviewers():
    assert reviewer_name(" 민수 ") == reviewer_name("민수") == "민수"
    for name in ("", "..", "a/b", ".hidden", "judge-x", "judge:x", "x" * 41, "a b"):
        with pytest.raises(InputError, match="reviewer"):
            reviewer_name(name)


def test_pair_ids_do_not_depend_on_which_run_is_first():
    assert pair_id("c", A, B) == pair_id("c", B, A) != pair_id("d", A, B)


def test_a_killed_writer_loses_no_acknowledged_answer(folder):
    """A process appends as fast as it can and prints the number of each acknowledged answer; SIGKILL in between."""
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from tests.evaluation.test_reviews import answer
        from vlmds.evaluation.reviews import append_answer, read_plan, answers_path
        folder = Path(sys.argv[1])
        plan = read_plan(folder)
        number = 0
        while True:
            append_answer(answers_path(folder, "민수"), answer(plan, number % 5, ["left", "right"][number % 2]))
            print(number, flush=True)
            number += 1
        """
    )
    with subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) >= 40:
                os.kill(process.pid, signal.SIGKILL)
                break
        last = [int(line), *map(int, process.stdout)][-1]
    lines = (folder / "민수.jsonl").read_bytes().split(b"\n")[:-1]
    assert len(lines) >= last + 1
    read_reviews(folder)


def _append_many(folder, reviewer):
    plan = read_plan(folder)
    for number in range(50):
        append_answer(answers_path(folder, reviewer), answer(plan, number % 5, reviewer=reviewer))


def test_two_processes_append_to_one_file(folder):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(folder, "민수")) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert len((folder / "민수.jsonl").read_bytes().splitlines()) == 100 and len(read_reviews(folder).answers) == 5
