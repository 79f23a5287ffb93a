"""Errors of captions by kind: words, synonyms, shares, and paired tests on planted errors."""

import json

import pytest

from tests.evaluation.planted import plant
from tests.evaluation.test_compare import rewrite
from vlmds.cli import main
from vlmds.errors import InputError
from vlmds.evaluation import error_kinds, word_accuracy
from vlmds.evaluation.error_kinds import Units, error_table, read_word_list


def test_kinds_and_synonyms_of_a_sentence():
    of = Units(read_word_list()).of
    found = of("남자 두 명이 좌측에서 붉은 공을 위해 요리합니다.")
    assert {
        ("number", "2"),
        ("direction", "왼쪽"),
        ("attribute", "빨간"),
        ("object", "공"),
        ("action", "요리"),
    } <= found
    assert ("direction", "위") not in found and ("direction", "위") in of("공이 위로 올라갑니다.")
    assert ("number", "2") not in of("공을 상자에 두었습니다.") and ("number", "2") in of("공 2개가 있습니다.")
    assert of("공이 있습니다") == {("object", "공")}
    assert of("빨간색 공") & of("빨간 공") == {("attribute", "빨간"), ("object", "공")}


def test_without_kiwi_the_list_alone_counts(monkeypatch):
    for module in (error_kinds, word_accuracy):
        monkeypatch.setattr(module, "morphemes", lambda: None)
    units = Units(read_word_list())
    assert units.of("남자 두 명이 좌측에서 위한 공을") == {("number", "2"), ("direction", "왼쪽")}
    table = error_table([[["왼쪽으로"], ["왼쪽으로"]]] * 1, [["오른쪽으로"]], ["v"], 0, read_word_list())
    assert list(table["kinds"]) == ["direction"] and not table["kiwi"]


def test_a_team_s_words_come_first_and_bad_lists_are_one_line(tmp_path):
    file = tmp_path / "words.yaml"
    file.write_text("object:\n  - [남자, 남성]\ndirection:\n  - [시계 방향]\n", encoding="utf-8")
    of = Units(read_word_list(file)).of
    assert ("object", "남자") in of("남성이 걷습니다") and ("direction", "시계 방향") in of("시계 방향으로 돕니다")
    for text, message in (
        ("thing: [[a]]", "'thing' is none"),
        ("object: 3", "object: must be a list"),
        ("object: [[", "no valid YAML"),
        ("[1]", "must map kinds"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match="words.yaml.*" + message):
            read_word_list(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_word_list(tmp_path / "none.yaml")


def test_planted_errors_are_found_in_all_seeds_and_inventions_counted():
    right, wrong, more = "공이 왼쪽으로 갑니다", "공이 오른쪽으로 갑니다", "고양이와 공이 왼쪽으로 갑니다"
    clips = 100
    exact = [[right] * clips] * 2
    turned = [
        [wrong if i % 5 == 0 else right for i in range(clips)],
        [wrong if i % 5 == 1 else right for i in range(clips)],
    ]
    adding = [[more if i % 2 else right for i in range(clips)]] * 2
    sources = [f"v{i}" for i in range(clips)]
    table = error_table([exact, turned, adding], [[right, right]] * clips, sources, 0, read_word_list())["kinds"]
    direction = table["direction"]["cells"]
    assert [cell["value"] for cell in direction] == pytest.approx([0, 20, 0])
    assert direction[1]["low"] < 20 < direction[1]["high"] and direction[1]["words"] == [("왼쪽", 40)]
    assert direction[1]["p_holm"] < 0.01 and direction[2]["p_holm"] == 1 and "p_holm" not in direction[0]
    assert table["object"]["units"] == clips
    invented = table["invented"]["cells"]  # 50 of 150 objects
    assert invented[2]["value"] == pytest.approx(100 / 3) and invented[2]["words"] == [("고양이", 100)]


def test_what_only_a_minority_of_references_has_is_not_missed():
    table = error_table(
        [[["공이 갑니다"] * 2]],
        [["공이 갑니다", "고양이가 갑니다", "공이 갑니다"]] * 2,
        ["a", "b"],
        0,
        read_word_list(),
    )
    assert table["kinds"]["object"]["units"] == 2 and table["kinds"]["object"]["cells"][0]["value"] == 0


def test_the_report_has_the_table_in_both_languages(tmp_path, capsys):
    folders = [plant(tmp_path / name, name) for name in ("e3", "e7")]
    for folder in folders:
        rewrite(folder, lambda i, line: line | {"references": ["빨간 공이 왼쪽으로 갑니다."]})
    out, table = tmp_path / "report.html", tmp_path / "all.json"
    assert main(["compare", *map(str, folders), "-o", str(out), "--errors", "--json", str(table)]) == 0
    page, found = out.read_text(), json.loads(table.read_text())["errors"]
    assert "Errors by kind" in page and "오류 유형" in page and found["kinds"]["direction"]["units"] == 60
    assert all(0 <= cell["value"] <= 100 for row in found["kinds"].values() for cell in row["cells"])
    assert main(["compare", *map(str, folders), "-o", str(out)]) == 0 and "오류 유형" not in out.read_text()
