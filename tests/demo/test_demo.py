"""`vlmds demo`: its captions, and the whole command on the smallest size."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.training.launch import exit_code
from vlmds.demo.clips import Attributes, caption, combinations, make_clips, parse_caption, subject, towards
from vlmds.demo.picture import draw_results
from vlmds.demo.run import Size, run_demo, score


@pytest.mark.parametrize(
    ("word", "expected"), [("별", "별이"), ("고리", "고리가"), ("원", "원이"), ("십자가", "십자가가")]
)
def test_subject_particle(word, expected):
    assert subject(word) == expected


@pytest.mark.parametrize(
    ("word", "expected"), [("위", "위로"), ("아래", "아래로"), ("왼쪽", "왼쪽으로"), ("물", "물로")]
)
def test_direction_particle(word, expected):
    assert towards(word) == expected


def test_captions_parse_back_and_held_out_combinations_are_new():
    train, held_out = combinations()
    assert len(train) == 120 and len(held_out) == 24 and not set(train) & set(held_out)
    assert all(parse_caption(caption(a)) == a for a in train + held_out)
    for pair in ({(a.colour, a.shape) for a in held_out}, {(a.shape, a.direction) for a in held_out}):
        assert len(pair) == 24  # no pair of values is held out twice


def test_scores_of_right_and_of_blind_captions():
    references = [caption(a) for a in combinations()[1]]
    results = score(references, references)
    assert set(results["held_out"].values()) == {1.0}
    assert results["blind"]["exact"] < 0.2
    wrong = [caption(Attributes("red", parse_caption(r).shape, "up")) for r in references]
    shares = score(wrong, references)["held_out"]
    assert shares["shape"] == 1 and shares["colour"] == pytest.approx(1 / 6, abs=1e-3)


def test_the_picture_shows_right_captions_in_green_and_others_in_red(tmp_path):
    make_clips(tmp_path, train=2, val=1)
    videos = sorted((tmp_path / "clips").glob("train*.mp4"))
    references = [caption(attributes) for attributes in combinations()[0][:2]]
    wrong = "모릅니다."
    for captions, colours in (
        (references, {"right"}),
        ([references[0], wrong], {"right", "wrong"}),
        ([wrong, wrong], {"wrong"}),
    ):
        draw_results(tmp_path / "a.png", videos, references, captions)
        pixels = {pixel for _, pixel in Image.open(tmp_path / "a.png").convert("RGB").getcolors(1 << 24)}
        shown = {"right": (0x17, 0x72, 0x45) in pixels, "wrong": (0xB3, 0x26, 0x1E) in pixels}
        assert {name for name, found in shown.items() if found} == colours


@pytest.mark.distributed
def test_a_small_demo_runs_from_clips_to_picture_and_again(tmp_path, monkeypatch):
    """The second time without the launcher."""

    def forked(command, env):
        ranks = int(command[command.index("--num_gpus") + 1])
        return SimpleNamespace(returncode=exit_code(ranks, *command[5:], log=tmp_path / "again"))

    size = Size(train_clips=24, val_clips=8, clip_steps=4, llm_steps=4)
    short = [f"stages.{n}.{k}" for n in (0, 1) for k in ("epochs=null", "steps=2")]
    results = run_demo(tmp_path, "e8", size, tuple(short))
    assert results["clips"] == 8 and set(results["held_out"]) == {"exact", "colour", "shape", "direction"}
    saved = json.loads((tmp_path / "results" / "e8.json").read_text())
    assert saved["blind"] == results["blind"]
    assert Image.open(tmp_path / "results" / "e8.png").height > 8 * 100  # a row for each clip
    assert (tmp_path / "runs" / "e8" / "artifacts" / "finetune" / "adapter").is_dir()
    monkeypatch.setattr("vlmds.demo.run.subprocess", SimpleNamespace(run=forked))
    again = run_demo(tmp_path, "e8", size, tuple(short))  # nothing is made or trained twice
    assert again["held_out"] == results["held_out"]
    assert "nothing to do" in (tmp_path / "again.out").read_text()
