"""The ledger of a stage: cut captions, from the micro-batch to the refusal on all ranks."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.training.launch import arguments, train
from vlmds.data.loader import Sample, training_collate
from vlmds.demo.pretrain import train_tokenizer
from vlmds.errors import InputError
from vlmds.experiments.reading import load_experiment
from vlmds.experiments.schedule import Schedule
from vlmds.models.sequences import SequenceBuilder
from vlmds.runs.folder import RunFolder
from vlmds.training.context import StageContext
from vlmds.training.ledger import SampleLedger
from vlmds.training.monitor import Monitor
from vlmds.training.stage_progress import StageProgress, ValidationState


def sample(key: str, caption: str) -> Sample:
    return Sample(key, 0, np.zeros((1, 3, 2, 2), np.uint8), [caption], caption, None)


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


def test_a_micro_batch_names_its_cut_captions():
    builder = SequenceBuilder(train_tokenizer(["짧다"], 600), "무엇?", 3, max_caption_tokens=4)
    batch = training_collate(builder)([sample("long", "가나다 라마바 사아자"), sample("short", "짧다")])
    assert batch["cut"] == ["long"]
    ends = [builder.eos_token_id in row for row in batch["labels"].tolist()]
    assert ends == [False, True]


def test_by_default_a_twentieth_may_be_cut():
    assert load_experiment("e3").data.max_cut_fraction == 0.05


def test_cut_captions_are_counted_and_named_once(tmp_path, capsys):
    experiment = load_experiment("e3", ["data.max_cut_fraction=0.2", "logging.tensorboard=false"])
    run, monitor = RunFolder(tmp_path, {}), Monitor(tmp_path, experiment, active=True)
    stage = StageContext(experiment, 0, run, Schedule(4, 1, (9, 9)), torch.device("cpu"), monitor, stop=None)
    ledger = SampleLedger(stage, SimpleNamespace(root="packed", count=lambda split: 20))
    progress = StageProgress()
    ledger.read(progress, [{"bad": [], "cut": ["b"]}, {"bad": [], "cut": ["a"]}], bad=0, cut=2)
    progress.step = 5  # the next epoch
    ledger.read(progress, [{"bad": [], "cut": ["a", "c"]}], bad=0, cut=2)
    assert [(line["stage"], line["step"], line["key"]) for line in lines(tmp_path)] == [
        ("align", 1, "a"),
        ("align", 1, "b"),
        ("align", 6, "c"),
    ]
    ledger.summarise(progress)
    assert "align: 4 of 8 captions read were cut to data.max_caption_tokens 256" in capsys.readouterr().out
    # 4 of the 20 samples of the split are a fifth, and not more.
    with pytest.raises(InputError, match="packed: 5 of 12 captions .* more than data.max_cut_fraction 0.2 allows"):
        ledger.read(progress, [{"bad": [], "cut": ["a"]}], bad=0, cut=1)


def test_progress_survives_a_checkpoint_also_one_without_cut_captions():
    progress = StageProgress(step=3, cut=2, validation=ValidationState(best=-1.0, best_step=2))
    state = json.loads(json.dumps(progress.state()))
    assert StageProgress.from_state(state) == progress
    del state["cut"]
    assert StageProgress.from_state(state).validation == progress.validation


@pytest.mark.distributed
def test_too_many_cut_captions_stop_all_ranks(models, shards, tmp_path):
    run = tmp_path / "run"
    short = ["data.max_caption_tokens=2", "stages.0.steps=2", "stages.1.steps=1"]
    done = train(2, *arguments(models, shards, run, *short, "data.max_cut_fraction=0.3"), expect=2)
    assert "4 of 4 captions read are longer than data.max_caption_tokens 2" in done.stderr
    assert done.stderr.count("vlmds: ") == 1 and "Traceback" not in done.stderr
    assert {line["step"] for line in lines(run)} == {1}
    # The limit is no part of what is learned: without it the same run goes on.
    done = train(2, *arguments(models, shards, run, *short, "data.max_cut_fraction=null"))
    assert "align: 8 of 8 captions read were cut" in done.stdout and "finetune: 4 of 4" in done.stdout
    keys = [(line["stage"], line["key"]) for line in lines(run)]
    assert len(keys) == len(set(keys)) == 12
