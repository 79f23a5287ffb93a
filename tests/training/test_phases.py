"""Progress messages of a training: all that takes long at full size is announced and counted."""

import json
import re
from pathlib import Path

from tests import tiny
from tests.training.launch import arguments, train
from vlmds.console import progress
from vlmds.export.folder import export_run

SCRIPT = Path(__file__).with_name("recorded.py")


def announced(done) -> list[tuple]:
    found = [json.loads(line.removeprefix("phase ")) for line in done.stdout.splitlines() if line.startswith("phase ")]
    return [(phase["what"], phase["done"], phase["total"]) for phase in found]


def test_the_start_and_the_end_of_a_training(models, shards, tmp_path):
    words = arguments(
        models,
        shards,
        tmp_path / "run",
        "stages.0.steps=1",
        "stages.1.steps=1",
        "logging.every=10",
        "training.global_batch=8",
        *tiny.RESAMPLER,
        exp="e8",
    )
    done = train(0, *words, script=SCRIPT)
    found = announced(done)
    size = sum(path.stat().st_size for path in models.glob("*/*.safetensors"))
    known = {what: (count, total) for what, count, total in found}
    assert known["checking the data"] == (3, 3)
    assert known["checking weights"] == (size, size)
    for key, name in (("vision.model", "clip"), ("llm.model", "qwen3")):
        count, total = known[f"loading {key} {models / name}"]
        assert count == total > 20  # tensors
    for stage in ("align", "finetune"):
        assert known[f"{stage}: first step"] == (4, 4)
    order = [what for what, *_ in found]
    for stage in ("align", "finetune"):
        at = order.index(f"{stage}: first step")
        assert order[at - 1] == "building the engine"
        assert order.index("saving the artifact", at) > order.index("writing the checkpoint", at)
    assert order.index("adding the adapter") > order.index("saving the artifact")


def test_the_first_step_is_logged_at_once(models, shards, tmp_path):
    done = train(
        0,
        *arguments(
            models,
            shards,
            tmp_path / "run",
            "stages.0.steps=3",
            "stages.1.steps=1",
            "logging.every=10",
            "training.checkpoint_every=100",
        ),
    )  # which logs what is pending
    assert re.findall(r"align step (\d)/3  loss", done.stdout) == ["1", "3"]


def test_a_resumed_training(models, shards, tmp_path):
    words = arguments(
        models, shards, tmp_path / "run", "stages.0.steps=2", "stages.1.steps=2", "training.checkpoint_every=1"
    )
    train(0, *words)
    artifact = tmp_path / "run" / "artifacts" / "finetune"
    artifact.rename(tmp_path / "aside")  # as if it had been killed before it was saved
    done = train(0, *words, script=SCRIPT)
    order = [what for what, *_ in announced(done)]
    assert order.index("checking the checkpoint") < order.index("loading the artifact")
    assert order.index("building the engine") < order.index("loading the checkpoint")


def test_an_export(models, shards, two_ranks, tmp_path, monkeypatch):
    found = []

    class Recorded(progress.Phase):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            found.append(self)

    monkeypatch.setattr(progress, "Phase", Recorded)
    export_run(two_ranks, tmp_path / "out", merge=True, device="cpu")
    known = {phase.what: (phase.done, phase.total) for phase in found}
    assert known["folding the adapter in"] == (14, 14)  # seven of each of two layers
    assert known["writing the language model"] == (1, 1)  # file
    assert known["logits before folding"] == known["logits after folding"] == (3, 3)  # clips
    assert known[f"exporting to {tmp_path / 'out'}"][0] == 0
