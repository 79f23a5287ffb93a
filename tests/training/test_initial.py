"""Training from a trained projector (`projector.init`)."""

import json
import shutil
from pathlib import Path

import pytest

from tests import hub as hubs
from tests import tiny
from tests.training.launch import FAULTY, metrics, train, train_and_kill
from tests.training.test_training import assert_same_weights, weights
from vlmds.files import sha256_of

START = Path(__file__).with_name("hub_start.py")
pytestmark = pytest.mark.distributed


def one_stage(folder, models, shards, run, init, *more, stage="finetune", train="[projector, peft]"):
    """Arguments of a schedule of one stage of six steps, from this projector."""
    path = folder / "tuned.yaml"
    path.write_text(f"extends: e3\nname: tuned\nstages:\n  - {{name: {stage}, train: {train}, lr: 1.0e-3, steps: 6}}\n")
    words = [text for text in tiny.settings(models, shards) if not text.startswith("stages.")]
    return ["--exp", str(path), "--output", str(run), "--set", *words, f"projector.init={init}", *more]


def test_it_begins_with_the_sources_weights(models, shards, two_ranks, tmp_path):
    """A stage that learns nothing has the validation loss that the source ended with."""
    run = tmp_path / "run"
    still = ["stages.0.steps=1", "stages.0.lr=1e-12"]
    source = two_ranks / "artifacts" / "align"
    done = train(0, *one_stage(tmp_path, models, shards, run, source, *still))
    assert f"vlmds: projector.init: stage align of {source} (" in done.stdout
    (ours,) = [r["loss"] for r in metrics(run) if r["kind"] == "val"]
    theirs = [r["loss"] for r in metrics(two_ranks) if r["kind"] == "val" and r["stage"] == "align"]
    assert ours == pytest.approx(theirs[-1], rel=1e-5)
    assert ours != pytest.approx(theirs[0], rel=1e-4)


def test_killed_and_without_the_source_equals_undisturbed(models, shards, two_ranks, tmp_path):
    """A run folder and its artifact are the same source. Rank 1 dies before the first step; a start without
    the source is killed after a checkpoint."""
    calm, run, source = tmp_path / "calm", tmp_path / "killed", tmp_path / "source"
    train(2, *one_stage(tmp_path, models, shards, calm, two_ranks / "artifacts" / "align"))
    shutil.copytree(two_ranks, source, ignore=shutil.ignore_patterns("finetune", "checkpoints"))
    args = one_stage(tmp_path, models, shards, run, source)
    fault = json.dumps({"kind": "kill", "rank": 1, "call": 1})
    train(2, *args, expect=None, script=FAULTY, VLMDS_TEST_FAULT=fault)
    aside = source.rename(tmp_path / "aside")
    train_and_kill(2, run, 3, *args, checkpoint="finetune-")
    train(2, *args)
    assert metrics(run) == metrics(calm)
    assert_same_weights(weights(run), weights(calm))

    record = json.loads((run / "run.json").read_text())
    projector = aside / "artifacts" / "align" / "projector.safetensors"
    assert len(record["starts"]) == 3 and record["init"] == {
        "path": str(source / "artifacts" / "align"),
        "id": json.loads((aside / "run.json").read_text())["id"],
        "commit": None,
        "stage": "align",
        "projector_sha256": sha256_of(projector),
    }
    lineage = json.loads((run / "artifacts" / "finetune" / "artifact.json").read_text())["lineage"]
    assert lineage["init"] == {key: value for key, value in record["init"].items() if key != "path"}

    shutil.copytree(calm / "artifacts" / "finetune", source / "artifacts" / "align")  # other weights
    (source / "run.json").write_text("{}")
    done = train(0, *args, expect=2)
    assert "has other weights" in done.stderr and "Traceback" not in done.stderr
    done = train(0, *args, "projector.init=null", expect=2)
    assert f"projector.init '{source}' -> None" in done.stderr


def test_what_does_not_fit_leaves_no_run_behind(models, shards, two_ranks, tmp_path):
    other = shutil.copytree(models, tmp_path / "models")
    config = json.loads((other / "clip" / "preprocessor_config.json").read_text())
    config["image_mean"] = [0.1, 0.2, 0.3]
    (other / "clip" / "preprocessor_config.json").write_text(json.dumps(config))
    run = tmp_path / "run"
    for more, message in (
        (["vision.pool=2"], "was trained with vision.pool 1, not 2; set vision.pool=1"),
        ([f"vision.model={other / 'clip'}"], f"but {other / 'clip'} has other weights; set vision.model to that"),
    ):
        done = train(2, *one_stage(tmp_path, models, shards, run, two_ranks, *more), expect=2)
        (line,) = [text for text in done.stderr.splitlines() if text.startswith("vlmds: ")]
        assert message in line and not run.exists()


def test_two_ranks_from_the_hub(models, shards, two_ranks, tmp_path):
    """A later start asks neither the hub nor its cache, also after the hub has moved on."""
    run = tmp_path / "run"
    with hubs.running() as hub:
        hub.add("team/aligned", two_ranks / "artifacts" / "align")
        env = hub.environment(tmp_path / "home")
        args = one_stage(tmp_path, models, shards, run, "team/aligned", "stages.0.steps=1")
        train(2, *args, script=START, **env)
        assert hub.downloads["team/aligned/projector.safetensors"] == 1
        assert json.loads((run / "run.json").read_text())["init"]["commit"] == hub.find("team/aligned", "main")[0]
        hub.commit("team/aligned", {"other.txt": b""})
        shutil.rmtree(tmp_path / "home")
        hub.asked.clear()
        assert "nothing to do" in train(2, *args, script=START, **env).stdout and not hub.asked
