"""Real runs: launcher, two ranks, both stages, on tiny models."""

import json
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests import tiny
from tests.manual.kills import train_with_kills
from tests.training.launch import FAULTY, ROOT, arguments, metrics, train, train_and_kill
from vlmds.errors import InputError
from vlmds.experiments.reading import load_experiment
from vlmds.files import sha256_of
from vlmds.runs.folder import RunFolder
from vlmds.training import checkpoint
from vlmds.training.origin import begin

pytestmark = pytest.mark.distributed


def weights(run):
    folder = run / "artifacts" / "finetune"
    return load_file(folder / "projector.safetensors") | load_file(folder / "adapter" / "adapter_model.safetensors")


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
    val = [r for r in records if r["kind"] == "val"]
    assert [(r["stage"], r["step"]) for r in val] == [(s, n) for s in ("align", "finetune") for n in (4, 6)]
    assert val[-1]["loss"] < val[0]["loss"]  # of the same clips, unlike those of training steps
    assert all(r["grad_norm"] > 0 and r["supervised_tokens"] > 0 for r in records if r["kind"] == "train")
    record = json.loads((two_ranks / "run.json").read_text())
    assert record["global_batch"] == 4 and record["data_fingerprint"]
    assert record["starts"][0]["world_size"] == 2 and record["starts"][0]["versions"]["torch"]
    assert record["starts"][0]["attention"] == "sdpa" and record["starts"][0]["hardware"][0]
    written = [json.loads(line) for line in (two_ranks / "metrics.jsonl").read_text().splitlines()]
    assert {r["ranks"] for r in written if "memory_gib" in r} == {2}
    assert {p.name for p in (two_ranks / "artifacts" / "align").iterdir()} == {
        "artifact.json",
        "experiment.yaml",
        "projector.safetensors",
    }
    assert {p.name for p in (two_ranks / "checkpoints").iterdir()} == {
        "align-0000004",
        "align-0000006",
        "finetune-0000004",
        "finetune-0000006",
    }
    trained = sum(t.numel() for t in weights(two_ranks).values())
    files = list((two_ranks / "checkpoints" / "finetune-0000006").iterdir())
    # A weight and two moments in fp32 for each trainable, and the files' headers.
    assert 12 * trained < sum(f.stat().st_size for f in files) < 12 * trained + 60_000


def test_one_process_equals_two_ranks(models, shards, two_ranks, tmp_path):
    """Same global batch: 1 process x 2 micro-batches, without a launcher."""
    train(0, *arguments(models, shards, tmp_path / "one"))
    for a, b in zip(metrics(tmp_path / "one"), metrics(two_ranks), strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5), a
    assert_same_weights(weights(tmp_path / "one"), weights(two_ranks), rtol=1e-3, atol=2e-4)


def test_killed_again_and_again_equals_undisturbed(models, shards, tmp_path):
    """SIGKILL twice at a random moment, and twice while a checkpoint is written;
    tests/manual/kills.py does it 30 times. Batches, optimizer and schedule are what is compared,
    bit for bit."""
    run, calm = tmp_path / "killed", tmp_path / "calm"
    steps = ["stages.0.steps=60", "stages.1.steps=60"]
    began = time.monotonic()
    train(2, *arguments(models, shards, calm, *steps))
    seconds = 0.25 * (time.monotonic() - began)  # so that much is left for the last kill
    args = arguments(models, shards, run, *steps)
    seen = train_with_kills(run, args, kills=4, seconds=seconds, seed=1, lines=30)
    assert len(seen) == 4 and "was written" in seen[1] and "was written" in seen[3], seen
    assert metrics(run) == metrics(calm)
    assert_same_weights(weights(run), weights(calm))
    assert len(json.loads((run / "run.json").read_text())["starts"]) >= 3
    # A finished run has nothing left to do, nor is it another one with other kernels.
    again = train(0, *args, "llm.attention=sdpa")
    assert "nothing to do" in again.stdout
    assert metrics(run) == metrics(calm)


def test_world_size_may_change_between_starts(models, shards, two_ranks, tmp_path):
    """One process, then two ranks, then one with another micro-batch: stopped in both stages."""
    run = tmp_path / "elastic"
    train_and_kill(0, run, 4, *arguments(models, shards, run))
    train_and_kill(2, run, 11, *arguments(models, shards, run))
    train(0, *arguments(models, shards, run, "training.micro_batch=4"))
    starts = json.loads((run / "run.json").read_text())["starts"]
    assert [start["world_size"] for start in starts] == [1, 2, 1]
    for a, b in zip(metrics(run), metrics(two_ranks), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5), a
    assert_same_weights(weights(run), weights(two_ranks), rtol=1e-3, atol=2e-4)


def test_an_optimizer_in_the_hosts_memory_trains_the_same(models, shards, two_ranks, tmp_path):
    """Up to rounding, because gradient norms are added up in another order. A run may change the DeepSpeed
    configuration between its starts: killed in each stage, it goes from one to the other and back."""
    run = tmp_path / "offload"
    args = arguments(models, shards, run)
    offload = ["--ds-config", str(ROOT / "ds_configs" / "zero2_offload.json")]
    train_and_kill(2, run, 4, *args, checkpoint="align-")
    train_and_kill(2, run, 10, *args, *offload, checkpoint="finetune-")
    train(2, *args)
    for a, b in zip(metrics(run), metrics(two_ranks), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6), b
    assert_same_weights(weights(run), weights(two_ranks), rtol=1e-4, atol=1e-5)


def test_a_damaged_checkpoint_is_passed_over(models, shards, two_ranks, tmp_path):
    run = tmp_path / "damaged"
    train_and_kill(2, run, 10, *arguments(models, shards, run), checkpoint="finetune-")
    newest = sorted((run / "checkpoints").glob("finetune-*"))[-1]
    shard = newest / "rank-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    done = train(2, *arguments(models, shards, run))
    assert f"{newest.name}: damaged checkpoint passed over: rank-00001" in done.stdout
    assert metrics(run) == metrics(two_ranks)
    assert_same_weights(weights(run), weights(two_ranks))


def test_a_changed_experiment_is_refused_with_the_keys(models, shards, two_ranks, tmp_path):
    run = shutil.copytree(two_ranks, tmp_path / "run")
    done = train(2, *arguments(models, shards, run, "stages.1.lr=1e-3"), expect=2)
    assert "stages.1.lr 5e-05 -> 0.001" in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("vlmds: ") == 1  # one rank speaks
    assert metrics(run) == metrics(two_ranks)


@pytest.mark.parametrize("killed", [False, True])
def test_start_from_another_runs_checkpoint(models, shards, two_ranks, tmp_path, killed):
    run = tmp_path / "branch"
    start = ["--resume", str(two_ranks / "checkpoints" / "finetune-0000004")]
    if killed:  # before its first checkpoint; then it goes on from there by itself
        train(
            2,
            *arguments(models, shards, run),
            *start,
            expect=None,
            script=FAULTY,
            VLMDS_TEST_FAULT=json.dumps({"kind": "kill", "rank": 1, "call": 1}),
        )
        start = []
    train(2, *arguments(models, shards, run), *start)
    assert metrics(run) == [r for r in metrics(two_ranks) if r["stage"] == "finetune" and r["step"] > 4]
    assert_same_weights(weights(run), weights(two_ranks))


def test_a_start_from_an_earlier_checkpoint_of_the_run_survives_a_kill(models, shards, two_ranks, tmp_path):
    """What came after it is out of the way: neither stands for this start's, nor is it lost."""
    run = tmp_path / "run"
    shutil.copytree(two_ranks, run)
    words = [*arguments(models, shards, run), "--resume", str(checkpoint.checkpoints(run / "checkpoints", "align")[-1])]
    train(2, *words, expect=None, script=FAULTY, VLMDS_TEST_FAULT=json.dumps({"kind": "kill", "rank": 1, "call": 2}))
    (aside,) = run.glob("before-start-*")
    assert {"artifacts-align", "artifacts-finetune"} < {path.name for path in aside.iterdir()}
    assert not (run / "artifacts" / "finetune").exists()
    train(2, *words)
    assert metrics(run) == metrics(two_ranks)
    assert_same_weights(weights(run), weights(two_ranks))
    assert len(list(run.glob("before-start-*"))) == 1


def test_a_checkpoint_of_another_origin_is_refused(models, shards, two_ranks, tmp_path):
    start = ["--resume", str(next((two_ranks / "checkpoints").glob("finetune-*")))]
    other = shutil.copytree(shards, tmp_path / "other")
    meta = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps({**meta, "index_sha256": "0" * 64}))
    run = tmp_path / "run"
    done = train(0, *arguments(models, other, run), *start, expect=2)
    assert "was trained on other data" in done.stderr
    done = train(0, *arguments(models, shards, run, "training.global_batch=8"), *start, expect=2)
    assert "was trained with training.global_batch 4, not 8" in done.stderr
    assert not run.exists()  # and so the start with what is right is not refused


def test_a_refused_start_leaves_no_run_behind(models, shards, tmp_path):
    configs = tmp_path / "stage.json", tmp_path / "bucket.json", tmp_path / "norm.json"
    configs[0].write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    configs[1].write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": "large"}}))
    configs[2].write_text(json.dumps({"zero_optimization": {"compute_grad_norm": False}}))
    run = tmp_path / "run"
    for more, message in (
        (["training.global_batch=3"], "training.global_batch: 3"),
        (["--ds-config", str(configs[0])], "zero_optimization.stage is 3"),
        (["--ds-config", str(configs[1])], f"{configs[1]}: DeepSpeed refuses it"),
        (["--ds-config", str(configs[2])], "compute_grad_norm is False, but"),
        (["--ds-config", "zero3"], "zero2, zero2_cpu, zero2_offload"),
        (["--resume", "/nowhere"], "--resume /nowhere: not a usable checkpoint"),
    ):
        done = train(0, *arguments(models, shards, run), *more, expect=2)
        assert message in done.stderr.splitlines()[-1] and not run.exists(), more


def test_models_that_cannot_be_loaded_leave_no_run_behind(models, shards, tmp_path):
    """Neither where all ranks find it nor where one does; a corrected start has a folder of its own."""
    run, bad = tmp_path / "run", shutil.copytree(models, tmp_path / "bad")
    tokenizer = AutoTokenizer.from_pretrained(bad / "qwen3")
    tokenizer.add_tokens([f"<new{i}>" for i in range(1000)])
    tokenizer.save_pretrained(bad / "qwen3")
    charts = "logging.tensorboard=true"
    done = train(0, *arguments(bad, shards, run, charts), expect=2)
    assert "tokens, but the model's embedding has" in done.stderr and not run.exists()
    done = train(
        2,
        *arguments(models, shards, run, charts),
        expect=2,
        script=FAULTY,
        VLMDS_TEST_FAULT=json.dumps({"kind": "load", "rank": 1}),
    )
    assert "llm.model: injected failure" in done.stderr and not run.exists()
    # Another learning rate would be refused as another experiment, had a run begun.
    train(0, *arguments(models, shards, run, charts, "stages.1.lr=1e-4"))
    assert len(json.loads((run / "run.json").read_text())["starts"]) == 1


def test_more_reader_processes_than_cores_are_said_once(models, shards, tmp_path):
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    many = f"data.num_workers={share + 1}"
    warning = f"WARNING: data.num_workers {share + 1}: a rank starts only {share} reader process"
    for number, words in ((0, []), (1, [many])):
        done = train(
            2, *arguments(models, shards, tmp_path / f"run{number}", "stages.0.steps=1", "stages.1.steps=1", *words)
        )
        assert done.stdout.count("data.num_workers") == done.stdout.count(warning) == number
        assert "suggested max number of worker" not in done.stderr


def test_of_two_starts_that_load_at_once_the_second_is_refused(tmp_path):
    run = RunFolder(tmp_path / "run", {"starts": [{}]})
    experiment = load_experiment("e3")
    begin(RunFolder(run.path, {"starts": [{"first": True}]}), experiment, None, {})
    with pytest.raises(InputError, match="another start has begun a run there meanwhile"):
        begin(run, experiment, None, {})
    assert RunFolder.read(run.path)["starts"] == [{"first": True}]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nf4_with_dora_trains_every_parameter_also_after_validation(models, shards, tmp_path, dtype):
    """bitsandbytes repacks 4-bit weights in an eval pass on some CPUs; gradients then vanish.
    Every parameter's first moment must keep growing after the validation at step 2."""
    run = tmp_path / "nf4"
    train(
        2,
        *arguments(
            models,
            shards,
            run,
            *tiny.RESAMPLER,
            "llm.load_in_4bit=true",
            f"llm.dtype={dtype}",
            "training.validate_every=2",
            "training.keep_checkpoints=9",
            exp="e8",
        ),
    )
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
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    shard = copy / "train" / "000001.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    done = train(2, *arguments(models, copy, tmp_path / "run", "data.verify=sha256"), expect=2)
    assert f"{shard}: damaged" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_stage_1_of_another_run_can_be_shared(models, shards, two_ranks, tmp_path):
    """E4 (DoRA) starts from E3's projector; one of other frames is refused."""
    run = tmp_path / "e4"
    args = arguments(models, shards, run, exp="e4")
    train(2, *args, "--from", str(two_ranks))
    assert {r["stage"] for r in metrics(run)} == {"finetune"}
    inherited = json.loads((run / "run.json").read_text())["inherited"]["align"]
    assert inherited["run"] == str(two_ranks) and inherited["experiment"] == "e3"
    lineage = json.loads((run / "artifacts" / "finetune" / "artifact.json").read_text())["lineage"]
    assert lineage["parent"] == {"stage": "align", "projector_sha256": inherited["projector_sha256"]}
    assert_same_weights(
        load_file(run / "artifacts" / "align" / "projector.safetensors"),
        load_file(two_ranks / "artifacts" / "align" / "projector.safetensors"),
    )

    other = arguments(models, shards, tmp_path / "e1", exp="e1")
    done = train(0, *other, "--from", str(two_ranks), expect=2)
    assert "projector.type 'mlp' -> 'linear'" in done.stderr and "Traceback" not in done.stderr


def test_a_stage_grown_from_another_projector_is_refused(models, shards, two_ranks, tmp_path):
    run = tmp_path / "run"
    args = arguments(models, shards, run)
    train_and_kill(2, run, 10, *args, checkpoint="finetune-")
    align = run / "artifacts" / "align"
    meta = json.loads((align / "artifact.json").read_text())
    tensors = load_file(align / "projector.safetensors")
    tensors[min(tensors)] += 1
    save_file(tensors, align / "projector.safetensors")
    meta["files"]["projector.safetensors"] = sha256_of(align / "projector.safetensors")
    (align / "artifact.json").write_text(json.dumps(meta))
    done = train(2, *args, expect=2)
    assert "was trained from another align than the current one in artifacts/" in done.stderr


def test_the_average_of_the_weights_is_what_the_artifact_gets(models, shards, tmp_path):
    """training.ema_decay, also over a kill: recomputed here from the weights of every step."""
    run, settings = (
        tmp_path / "run",
        ["training.ema_decay=0.5", "training.checkpoint_every=1", "training.keep_checkpoints=9"],
    )
    args = arguments(models, shards, run, *settings)
    train_and_kill(2, run, 4, *args)
    train(2, *args)
    average = None
    for step in range(1, 7):
        weights = checkpoint_tensors(run / "checkpoints" / f"align-{step:07d}", "weight")
        if average is None:  # it starts from the weights before the first step
            ema = checkpoint_tensors(run / "checkpoints" / f"align-{step:07d}", "ema")
            average = {k: 2 * ema[k] - weights[k] for k in weights}
        average = {k: (average[k] + weights[k]) / 2 for k in weights}
    artifact = load_file(run / "artifacts" / "align" / "projector.safetensors")
    for name, tensor in artifact.items():
        torch.testing.assert_close(tensor, average[f"projector.{name}"].view_as(tensor))
        assert not torch.equal(tensor.flatten(), weights[f"projector.{name}"])


def checkpoint_tensors(folder, kind):
    """Parameter name -> flat tensor of that kind, joined from the ranks' pieces."""
    pieces = {}
    for file in folder.glob("*.safetensors"):
        for key, tensor in load_file(file).items():
            found, name, start = key.split("/")
            if found == kind:
                pieces.setdefault(name, []).append((int(start), tensor))
    return {name: torch.cat([t for _, t in sorted(parts, key=lambda p: p[0])]) for name, parts in pieces.items()}
