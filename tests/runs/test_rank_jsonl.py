"""JSONL of several ranks."""

from vlmds.runs.rank_jsonl import RankJsonl


def test_records_of_all_ranks_are_read_and_become_one_file(tmp_path):
    """In the layout of an evaluation's parts; other files in the folder are left alone."""
    lines = RankJsonl(tmp_path / "00000.jsonl", "", ".jsonl")
    (tmp_path / "notes.jsonl").write_text("{}")
    for rank in (0, 2):
        with lines.appender(rank) as appender:
            appender.add([{"rank": rank, "text": "줄\u2028바꿈"}])
    with (tmp_path / "00002.jsonl").open("a") as torn:
        torn.write('{"rank": 2, "te')  # as a kill leaves it
    with lines.appender(2) as appender:
        appender.add([{"rank": 2}])
    records = lines.read()
    assert [record["rank"] for record in records] == [0, 2, 2] and records[1]["text"] == "줄\u2028바꿈"
    lines.replace(records)
    assert lines.read() == records
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.jsonl", "notes.jsonl"]
    lines.remove()
    assert lines.read() == [] and (tmp_path / "notes.jsonl").exists()
