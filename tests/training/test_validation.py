"""Validation in training: captions, the best checkpoint, early stopping."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from tests.training.launch import FAULTY, arguments, metrics, train
from tests.training.test_training import assert_same_weights, checkpoint_tensors, weights
from vlmds.errors import InputError
from vlmds.experiments.reading import load_experiment
from vlmds.planning.start_checks import check_validation
from vlmds.training.stage_progress import ValidationState


def test_the_best_score_is_the_first_of_the_highest():
    state = ValidationState()
    for step, score in enumerate([math.nan, -3.0, -1.0, -1.0, -2.0], 1):
        state.add(step, score)
    assert (state.best, state.best_step, state.worse, state.scored) == (-1.0, 3, 2, 5)


@pytest.mark.distributed
def test_captions_in_training_change_nothing_of_it(models, shards, two_ranks, tmp_path):
    run = tmp_path / "run"
    done = train(
        2,
        *arguments(
            models,
            shards,
            run,
            "training.evaluate_every=3",
            "training.best_metric=chrf++@char",
            "training.evaluate_tokens=6",
            "training.evaluate_clips=3",
            "logging.tensorboard=true",
        ),
    )
    records = metrics(run)
    assert [r for r in records if r["kind"] != "eval"] == metrics(two_ranks)
    assert_same_weights(weights(run), weights(two_ranks))
    evaluations = [r for r in records if r["kind"] == "eval"]
    assert [(r["stage"], r["step"]) for r in evaluations] == [
        (stage, step) for stage in ("align", "finetune") for step in (3, 6)
    ]
    for record in evaluations:
        assert record["clips"] == 3 and record["chrf++@char"] >= 0 and "loss_gap_blank" in record
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {(s["stage"], s["step"]) for s in samples} == {(r["stage"], r["step"]) for r in evaluations}
    assert all(s["references"] and isinstance(s["caption"], str) for s in samples)
    assert "finetune step 3/6  " in done.stdout and any((run / "tensorboard").iterdir())
    scores = {r["step"]: r["chrf++@char"] for r in evaluations if r["stage"] == "finetune"}
    state = json.loads((run / "checkpoints" / "finetune-0000006" / "checkpoint.json").read_text())
    assert state["state"]["score"] == scores[6]
    assert state["state"]["progress"]["standing"]["best"] == max(scores.values())


@pytest.mark.distributed
def test_a_stage_that_becomes_worse_ends_early_with_its_best_weights(models, shards, tmp_path):
    run = tmp_path / "run"
    # At a constant rate of 1 the loss jumps about: it cannot become better 100 times in a row.
    done = train(
        2,
        *arguments(
            models,
            shards,
            run,
            "training.validate_every=1",
            "training.early_stopping=1",
            "training.keep=best",
            "training.keep_checkpoints=1",
            "training.checkpoint_every=6",
            "stages.1.schedule=constant",
            "stages.0.steps=1",
            "stages.1.steps=100",
            "stages.1.lr=1",
            "stages.1.warmup_ratio=0",
        ),
    )
    losses = {r["step"]: r["loss"] for r in metrics(run) if r["kind"] == "val" and r["stage"] == "finetune"}
    best = min(losses, key=losses.get)
    assert max(losses) == best + 1 < 100
    assert f"ends early after step {best + 1} of 100" in done.stdout
    artifact = run / "artifacts" / "finetune"
    assert json.loads((artifact / "artifact.json").read_text())["lineage"]["step"] == best
    saved = checkpoint_tensors(run / "checkpoints" / f"finetune-{best:07d}", "weight")
    for name, tensor in load_file(artifact / "projector.safetensors").items():
        assert torch.equal(tensor, saved[f"projector.{name}"].view_as(tensor)), name


@pytest.mark.distributed
def test_captions_that_are_due_wait_when_a_stop_was_asked_for(models, shards, tmp_path):
    """They take long, and whoever sends the signal waits for the checkpoint alone."""
    run = tmp_path / "run"
    words = arguments(models, shards, run, "training.evaluate_every=1", "training.evaluate_tokens=2")
    train(
        2,
        *words,
        expect=3,
        script=FAULTY,
        VLMDS_TEST_FAULT=json.dumps({"kind": "signal", "name": "SIGTERM", "rank": 1, "call": 3}),
    )
    steps = [r["step"] for r in metrics(run) if r["kind"] == "train"]
    assert steps in ([1, 2, 3], [1, 2, 3, 4])  # the other rank may learn of it a step later
    assert [r["step"] for r in metrics(run) if r["kind"] == "eval"] == steps[:-1]
    train(2, *words)
    assert [(r["stage"], r["step"]) for r in metrics(run) if r["kind"] == "eval"] == [
        (stage, step) for stage in ("align", "finetune") for step in range(1, 7)
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["training.best_metric=chrf++@char"],
            "best_metric chrf\\+\\+@char is computed by the evaluations in training",
        ),
        (["training.best_metric=bleu", "training.evaluate_every=5"], "best_metric: 'bleu' is no metric here"),
    ],
)
def test_a_metric_that_nobody_makes_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        check_validation(load_experiment("e1", settings), True, "data")


@pytest.mark.parametrize("key", ["evaluate_every=5", "early_stopping=2", "keep=best"])
def test_what_needs_split_val_is_refused_without_one(key):
    with pytest.raises(InputError, match=f"training.{key.split('=')[0]}: needs split val"):
        check_validation(load_experiment("e1", [f"training.{key}"]), False, "data")
