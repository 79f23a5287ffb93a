"""Real runs: launcher, two ranks, both stages, on tiny models."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.training.launch import arguments, metrics, train, train_and_kill

pytestmark = pytest.mark.distributed


def weights(run, stage="finetune"):
    folder = run / "artifacts" / stage
    return load_file(folder / "projector.safetensors") | load_file(
        folder / "adapter" / "adapter_model.safetensors")


def assert_same_weights(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        if tolerance:
            torch.testing.assert_close(a[name], b[name], **tolerance, msg=name)
        else:
            assert torch.equal(a[name], b[name]), name


def test_both_stages_train_and_leave_what_the_design_says(two_ranks):
    records = metrics(two_ranks)
    steps = [(r["stage"], r["step"]) for r in records if r["kind"] == "train"]
    assert steps == [(s, n) for s in ("align", "finetune") for n in range(1, 7)]
    for stage in ("align", "finetune"):
        losses = [r["loss"] for r in records if r["stage"] == stage and r["kind"] == "val"]
        assert len(losses) == 2  # after step 4, and at the end
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    assert losses[-1] < losses[0]
    assert all(r["grad_norm"] > 0 and r["supervised_tokens"] > 0 for r in records
               if r["kind"] == "train")
    record = json.loads((two_ranks / "run.json").read_text())
    assert record["global_batch"] == 4 and record["data_fingerprint"]
    assert record["starts"][0]["world_size"] == 2 and record["starts"][0]["versions"]["torch"]
    assert {p.name for p in (two_ranks / "artifacts" / "align").iterdir()} == {
        "artifact.json", "experiment.yaml", "projector.safetensors"}
    assert {p.name for p in (two_ranks / "checkpoints").iterdir()} == {
        "align-0000004", "align-0000006", "finetune-0000004", "finetune-0000006"}


def test_one_process_equals_two_ranks(models, shards, two_ranks, tmp_path):
    """Same global batch: 1 process x 2 micro-batches, without a launcher."""
    train(0, *arguments(models, shards, tmp_path / "one"))
    for a, b in zip(metrics(tmp_path / "one"), metrics(two_ranks), strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5), a
    assert_same_weights(weights(tmp_path / "one"), weights(two_ranks), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("lines", [5, 13])
def test_killed_and_started_again_equals_undisturbed(models, shards, two_ranks, tmp_path, lines):
    """SIGKILL in the first stage and in the second; dropout is on in neither run, so the stream
    of batches, the optimizer and the schedule are what is compared, bit for bit."""
    run = tmp_path / "killed"
    train_and_kill(2, run, lines, *arguments(models, shards, run))
    done = train(2, *arguments(models, shards, run))
    assert "going on from" in done.stdout
    assert metrics(run) == metrics(two_ranks)
    assert_same_weights(weights(run), weights(two_ranks))
    assert len(json.loads((run / "run.json").read_text())["starts"]) == 2
    again = train(0, *arguments(models, shards, run))  # a finished run has nothing left to do
    assert "nothing to do" in again.stdout
    assert metrics(run) == metrics(two_ranks)


def test_world_size_may_change_between_starts(models, shards, two_ranks, tmp_path):
    """Stopped on two ranks, gone on with in one process and another micro-batch."""
    run = tmp_path / "elastic"
    train_and_kill(2, run, 4, *arguments(models, shards, run))
    train(0, *arguments(models, shards, run, "training.micro_batch=4"))
    for a, b in zip(metrics(run), metrics(two_ranks), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5), a
    assert_same_weights(weights(run), weights(two_ranks), rtol=1e-3, atol=2e-4)


def test_a_damaged_checkpoint_is_passed_over(models, shards, two_ranks, tmp_path):
    run = tmp_path / "damaged"
    train_and_kill(2, run, 12, *arguments(models, shards, run))
    newest = sorted((run / "checkpoints").glob("finetune-*"))[-1]
    shard = newest / "rank-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    done = train(2, *arguments(models, shards, run))
    assert f"{newest.name}: damaged checkpoint passed over: rank-00001" in done.stdout
    assert metrics(run) == metrics(two_ranks)
    assert_same_weights(weights(run), weights(two_ranks))


def test_a_changed_experiment_is_refused_with_the_keys(models, shards, two_ranks):
    before = metrics(two_ranks)
    done = train(2, *arguments(models, shards, two_ranks, "stages.1.lr=1e-3"), expect=2)
    assert "stages.1.lr 5e-05 -> 0.001" in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("vlmds: ") == 1  # one rank speaks
    assert metrics(two_ranks) == before


def test_start_from_another_runs_checkpoint(models, shards, two_ranks, tmp_path):
    run = tmp_path / "branch"
    start = two_ranks / "checkpoints" / "finetune-0000004"
    train(2, *arguments(models, shards, run), "--resume", str(start))
    assert metrics(run) == [r for r in metrics(two_ranks)
                            if r["stage"] == "finetune" and r["step"] > 4]
    assert_same_weights(weights(run), weights(two_ranks))


def test_nf4_with_dora_trains_every_parameter_also_after_validation(models, shards, tmp_path):
    """bitsandbytes repacks 4-bit weights in an eval pass on some CPUs; gradients then vanish.
    Every parameter's first moment must keep growing after the validation at step 2."""
    run = tmp_path / "nf4"
    train(2, *arguments(models, shards, run, *tiny.RESAMPLER, "llm.load_in_4bit=true",
                        "training.validate_every=2", "training.keep_checkpoints=9", exp="e8"))
    moments = []
    for step in (2, 4, 6):
        tensors = {}
        for file in (run / "checkpoints" / f"finetune-000000{step}").glob("*.safetensors"):
            tensors |= load_file(file)
        moments.append({k: v for k, v in tensors.items() if k.startswith("exp_avg_sq/")})
    assert any("lora_magnitude_vector" in name for name in moments[0])
    assert any("perceiver" not in name and "projector" in name for name in moments[0])
    for earlier, later in zip(moments, moments[1:]):
        for name, moment in later.items():
            # Without a gradient the moment would decay by 0.999 a step.
            assert (moment > earlier[name] * 0.9981).any(), name


def test_damaged_data_is_refused_by_name_on_all_ranks(models, shards, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    shard = copy / "train" / "000001.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    done = train(2, *arguments(models, copy, tmp_path / "run"), expect=2)
    assert f"{shard}: damaged" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
