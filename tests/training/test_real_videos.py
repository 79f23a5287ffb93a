"""Sixteen real clips: pack, train both stages on two ranks, caption."""

import json

import pytest

from tests import tiny
from tests.clips import SHARED_VIDEOS
from tests.training.launch import metrics, train
from vlmds.cli import main
from vlmds.demo.pretrain import train_tokenizer

pytestmark = pytest.mark.distributed  # real ranks


def test_captions_of_real_clips_are_learnt_word_for_word(tmp_path, capsys):
    if not SHARED_VIDEOS.is_dir():
        pytest.skip(f"no videos at {SHARED_VIDEOS}")
    rows = [json.loads(line) for line in (SHARED_VIDEOS / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    models = tiny.make_models(tmp_path, train_tokenizer([row["caption"] for row in rows]))
    shards, run = tmp_path / "shards", tmp_path / "run"
    assert (
        main(
            [
                "pack",
                str(SHARED_VIDEOS / "captions.jsonl"),
                str(shards),
                "--store",
                "frames",
                "--num-frames",
                str(tiny.FRAMES),
                "--image-size",
                str(tiny.SIDE),
            ]
        )
        == 0
    )
    assert "packed 16 samples (train 16)" in capsys.readouterr().out
    train(
        2,
        "--exp",
        "demo",
        "--data",
        str(shards),
        "--output",
        str(run),
        "--set",
        *tiny.settings(models),
        "training.micro_batch=8",
        "training.global_batch=16",
        "training.checkpoint_every=1000",
        "peft.r=16",
        "stages.0.steps=20",
        "stages.1.steps=200",
        "stages.0.lr=3e-3",
        "stages.1.lr=8e-3",
    )
    losses = [r["loss"] for r in metrics(run)]
    assert losses[19] < losses[0] and losses[-1] < 0.1 * losses[0]
    assert (
        main(["caption", "--run", str(run), "--batch-size", "8", *(str(SHARED_VIDEOS / row["video"]) for row in rows)])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    right = sum(line.split("\t")[1] == row["caption"] for line, row in zip(lines, rows, strict=True))
    assert right >= 14, lines
