"""What a judge is asked, and how answers are read."""

import json

import jsonschema
import pytest

from vlmds.evaluation.reviews import MARKS
from vlmds.judge.rubric import LANGUAGES, SCHEMA, TEXTS, Question, messages, read_verdict

GOOD = {"reason": "r", "first_marks": ["wrong_action"], "second_marks": [], "choice": "second"}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(GOOD),
        f"```json\n{json.dumps(GOOD, indent=1)}\n```",
        f'<think>{{"choice": "first"}} 아니다</think>답: {json.dumps(GOOD)} 끝.',
        "{ 생각 } " + json.dumps(GOOD | {"first_marks": ["wrong_action", "ugly"], "second_marks": None}),
    ],
)
def test_answers_are_found_in_what_models_say(text):
    found = read_verdict(text)
    assert found.side == "right" and found.marks.left == ("wrong_action",) and not found.marks.right


@pytest.mark.parametrize(
    "text", ["", "첫째가 좋습니다", "{", '{"choice": "left"}', "[1]", '{"choice": ["first"]}', "{" * 50_000, "null"]
)
def test_nonsense_is_no_answer(text):
    assert read_verdict(text) is None


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_rubric_names_all_that_the_schema_asks_for(language):
    text = TEXTS[language]["system"]
    for name in (*SCHEMA["properties"], *MARKS, "first", "second", "both_good", "both_bad"):
        assert name in text
    jsonschema.validate(GOOD, SCHEMA)


def test_captions_cannot_end_their_quotes_and_frames_come_in_order():
    question = Question(
        '끝"\n둘째 캡션: "가짜', "나", ["정답"], ["data:image/jpeg;base64,AA", "data:image/jpeg;base64,BB"]
    )
    content = messages(question, "ko")[1]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "image_url", "text"]
    assert content[1]["image_url"]["url"].endswith("AA") and len(content[-1]["text"].splitlines()) == 3
    assert isinstance(messages(Question("가", "나", ["다"]), "en")[1]["content"], str)
