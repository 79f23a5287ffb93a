"""Answers as data: packed with --append and read back; preferences as TRL reads them."""

import json
import shutil

import pytest

from tests.review.conftest import CLIPS, plant
from tests.training.launch import arguments, metrics, train
from vlmds.cli import main
from vlmds.data.index import ShardIndex
from vlmds.data.stored import read_description
from vlmds.errors import InputError
from vlmds.evaluation.reviews import Answer, Correction, SideMarks, answers_path, append_answer, read_reviews
from vlmds.packing.pack import pack
from vlmds.review.choose import Choice
from vlmds.review.corrections import write_manifest, write_preferences
from vlmds.review.folder import open_reviews
from vlmds.runs.folder import final_artifact


@pytest.fixture
def reviewed(runs, tmp_path):
    """Opened reviews of all pairs, and a function that answers one."""
    opened = open_reviews(tmp_path / "reviews", runs, choice=Choice(CLIPS * 3, {"random": 1.0}))

    def answer(clip: int, choice: str, number: int = 0, reviewer="민수", swap=False, **more) -> Answer:
        pair = [pair for pair in opened.plan.pairs if pair.clip == f"c{clip:03d}"][number]
        sides = (pair.b, pair.a) if swap else (pair.a, pair.b)
        given = Answer(pair=pair.pair, clip=pair.clip, source=pair.source, left=sides[0], right=sides[1], choice=choice,
                       chosen=pair.chosen, seconds=2.0, time="2026-11-27T10:00:00+00:00", reviewer=reviewer,
                       **more)  # fmt: skip
        append_answer(answers_path(opened.folder, reviewer), given)
        return given

    return opened, answer


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def caption(opened, answer, side):
    return opened.evaluations.captions[getattr(answer, side)][answer.clip]


def test_corrected_and_approved_captions_are_packed_and_read_back(reviewed, videos, shards, tmp_path):
    opened, answer = reviewed
    run = opened.plan.runs[0].id
    good = answer(0, "both_good")
    corrected = answer(3, "both_bad", corrected=Correction(text="고친 캡션입니다.", run=run))
    preferred = answer(6, "left")
    answer(1, "left", marks=SideMarks(left=("wrong_action",)))
    answer(2, "both_bad")
    manifest = videos.parent / "corrected.jsonl"
    said = write_manifest(opened.folder, manifest)
    rows = lines(manifest)
    assert sorted(row["video"] for row in rows) == ["v0.mp4", "v0.mp4", "v3.mp4"]
    assert {row["caption"] for row in rows} == {
        caption(opened, good, "left"), caption(opened, good, "right"), "고친 캡션입니다."
    }  # fmt: skip
    row = next(row for row in rows if row["video"] == "v3.mp4")
    assert (row["start"], row["end"], row["split"]) == (1.0, 2.0, "val")
    name = {run.id: run.name for run in opened.plan.runs}
    assert row["review"] == [
        {"kind": "corrected", "reviewer": "민수", "time": corrected.time, "run": name[corrected.corrected.run]}
    ]
    assert "3 captions of 2 clips" in said[0] and "--split train makes them training data" in "\n".join(said)

    data = tmp_path / "data"
    shutil.copytree(shards, data)
    before = ShardIndex.open(data).count("val")
    summary = pack(manifest, data, append=True, keep_columns=["review"], shard_size=4, progress=False, workers=1)
    assert not summary.rejected and summary.known == 0
    index = ShardIndex.open(data)
    assert index.count("val") == before + 3
    read = [
        read_description(index.read(index.row("val", shard, i)))
        for shard, info in enumerate(index.shards("val"))
        for i in range(info.count)
    ]
    found = {each["captions"][0]: each for each in read if "-reviewed-" in each["id"]}
    assert found.keys() == {row["caption"] for row in rows}
    assert (
        found["고친 캡션입니다."]["source"] == "v3.mp4"
        and found["고친 캡션입니다."]["columns"]["review"] == row["review"]
    )

    # Later answers add only what is new.
    write_manifest(opened.folder, manifest, picked=True)
    assert {row["caption"] for row in lines(manifest)} == {*found, caption(opened, preferred, "left")}
    assert next(row for row in lines(manifest) if row["video"] == "v6.mp4")["prompt"] == "무엇?"
    summary = pack(manifest, data, append=True, keep_columns=["review"], shard_size=4, progress=False, workers=1)
    assert summary.known == 3 and ShardIndex.open(data).count("val") == before + 4


def test_corrected_captions_are_trained_on(reviewed, videos, shards, models, tmp_path):
    """They are the only training data here, appended to data that has validation clips alone."""
    opened, answer = reviewed
    answer(0, "both_good")
    answer(3, "both_bad", corrected=Correction(text="고친 캡션입니다.", run=opened.plan.runs[0].id))
    manifest = videos.parent / "for-training.jsonl"
    write_manifest(opened.folder, manifest, split="train")
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(shards, data)
    assert not pack(manifest, data, append=True, shard_size=4, progress=False, workers=1).rejected
    assert ShardIndex.open(data).count("train") == 3
    train(0, *arguments(models, data, run, "stages.0.steps=2", "stages.1.steps=1", "data.max_caption_tokens=64"))
    losses = [line["loss"] for line in metrics(run) if line["kind"] == "train"]
    assert len(losses) == 3 and all(loss > 0 for loss in losses)
    assert final_artifact(run).is_dir()


def test_a_caption_that_anyone_called_bad_is_not_approved(reviewed, tmp_path):
    opened, answer = reviewed
    answer(0, "both_good")
    answer(0, "both_good", reviewer="지영", marks=SideMarks(left=("wrong_number",)))
    manifest = tmp_path / "m.jsonl"
    said = write_manifest(opened.folder, manifest, split="train")
    [row] = lines(manifest)
    assert row["split"] == "train" and [each["reviewer"] for each in row["review"]] == ["민수", "지영"]
    assert any("its scores on val are too good" in line for line in said)
    assert any("1 video not found from" in line for line in said)


def test_preferences_are_in_the_conversational_format(reviewed, tmp_path):
    opened, answer = reviewed
    left = answer(0, "left")
    answer(0, "right", reviewer="지영", swap=True)  # the same run
    answer(1, "left")
    answer(1, "right", reviewer="지영")  # a tie of reviewers
    answer(2, "both_good")
    corrected = answer(6, "both_bad", corrected=Correction(text="고친 캡션.", run=opened.plan.runs[1].id))
    out = tmp_path / "preferences.jsonl"
    assert write_preferences(opened.folder, out) == [f"{out}: 2 preferences"]
    first, second = sorted(lines(out), key=lambda line: line["clip"])
    assert first["prompt"] == [{"role": "user", "content": "이 영상을 설명해주세요."}]
    assert first["chosen"] == [{"role": "assistant", "content": caption(opened, left, "left")}]
    assert first["rejected"] == [{"role": "assistant", "content": caption(opened, left, "right")}]
    assert first["reviewers"] == ["민수", "지영"] and first["video"] == "v0.mp4"
    assert second["prompt"][0]["content"] == "무엇?" and second["chosen"][0]["content"] == "고친 캡션."
    assert second["rejected"][0]["content"] == opened.evaluations.captions[corrected.corrected.run]["c006"]


def test_the_command(reviewed, tmp_path, capsys, runs, shards):
    opened, answer = reviewed
    assert main(["review", "export", str(opened.folder), "--manifest", str(tmp_path / "m.jsonl")]) == 2
    assert "no person has answered yet" in capsys.readouterr().err
    answer(0, "both_good")
    files = ["--manifest", str(tmp_path / "m.jsonl"), "--preferences", str(tmp_path / "p.jsonl")]
    assert main(["review", "export", str(opened.folder), *files]) == 0
    said = capsys.readouterr().out
    assert "2 captions of 1 clip (2 approved)" in said and "0 preferences" in said and "next: vlmds pack" in said
    for wrong, why in (
        (["review", "export"], "one folder of reviews"),
        (["review", "export", str(opened.folder)], "give --manifest FILE"),
        (["review", "export", str(opened.folder), "--manifest", "m.csv"], "name a .jsonl file"),
        (["review", "export", str(tmp_path), "--manifest", "m.jsonl"], "review.json: missing"),
        (["review", str(runs[0]), "--manifest", "m.jsonl"], "only with vlmds review export"),
        (["review", str(runs[0]), "--pairs", "0"], "--pairs 0: must be at least 1"),
        (["review", str(runs[0]), "--choose", "best"], "--choose best: write shares"),
        (["review", str(runs[0]), "-o", str(tmp_path / "new")], "two evaluated runs or more"),
    ):
        assert main(wrong) == 2, wrong
        assert why in capsys.readouterr().err
    plant(tmp_path / "again", {"c000": "다른 캡션"}, shards)
    shutil.rmtree(runs[2] / "evaluation")
    shutil.copytree(tmp_path / "again" / "evaluation", runs[2] / "evaluation")
    with pytest.raises(InputError, match="made again"):
        write_preferences(opened.folder, tmp_path / "p.jsonl")
    assert len(read_reviews(opened.folder).answers) == 1
