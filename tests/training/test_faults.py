"""Faults in training, on real ranks: nothing hangs, and the cause is reported."""

import json
import os
import shutil
import subprocess

import pytest

from tests.training.launch import (
    FAULTY,
    ROOT,
    TIMEOUT,
    arguments,
    command,
    environment,
    forked,
    kill_tree,
    metrics,
    train,
    until_lines,
)
from tests.training.test_training import assert_same_weights, weights
from vlmds.training import checkpoint

pytestmark = pytest.mark.distributed


def train_with_fault(ranks, args, expect, fresh=False, **fault):
    return train(ranks, *args, expect=expect, script=FAULTY, fresh=fresh, VLMDS_TEST_FAULT=json.dumps(fault))


@pytest.mark.parametrize("name, rank, fresh", [("SIGTERM", 1, True), ("SIGUSR1", 0, False)])
def test_a_signal_to_any_rank_saves_and_exits_with_3(models, shards, two_ranks, tmp_path, name, rank, fresh):
    """In the fifth step, where no checkpoint is due; the next start goes on bit for bit."""
    run = tmp_path / "run"
    args = arguments(models, shards, run)
    done = train_with_fault(2, args, 3, fresh, kind="signal", name=name, rank=rank, call=5)
    assert "align: stopped by a signal after step" in done.stderr
    assert "Traceback" not in done.stderr
    train(2, *args)
    assert metrics(run) == metrics(two_ranks)
    assert_same_weights(weights(run), weights(two_ranks))


def test_a_reader_of_the_output_that_is_gone_ends_nothing(models, shards, tmp_path):
    """As when the ssh or the pipe that a job writes to breaks; a signal still saves and gives 3."""
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(0, *arguments(models, shards, run, "stages.0.steps=500")),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    process.stdout.close()
    try:
        until_lines(run, 3, process)
        process.terminate()
        assert process.wait(TIMEOUT) == 3
    finally:
        kill_tree(process)
    (newest, *_) = checkpoint.checkpoints(run / "checkpoints", "align")
    assert checkpoint.read_state(newest)["progress"]["step"] >= 3


@pytest.mark.parametrize("kind", ["nan", "infinite"])
def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(models, shards, two_ranks, tmp_path, kind):
    run = tmp_path / "run"
    done = train_with_fault(2, arguments(models, shards, run), 0, kind=kind, rank=1, calls=[3])
    assert "align step 3 skipped: its loss or gradient is not a finite number" in done.stdout
    records = [r for r in metrics(run) if r["kind"] == "train"]
    skipped = [r for r in records if r.get("skipped")]
    assert [(r["stage"], r["step"], r["loss"]) for r in skipped] == [("align", 3, None)]
    undisturbed = [r for r in metrics(two_ranks) if r["kind"] == "train"]
    assert records[1] == undisturbed[1]
    assert records[3]["loss"] != undisturbed[3]["loss"]  # the skipped step changed no weights
    assert all(r["loss"] is not None for r in records if r not in skipped)
    (line,) = (run / "ledger.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["step"] == 3 and len(record["keys"]) == 4  # the global batch


def test_too_many_skipped_steps_end_the_run(models, shards, tmp_path):
    run = tmp_path / "run"
    args = arguments(models, shards, run, "training.max_skipped_steps=1")
    done = train_with_fault(2, args, 2, kind="nan", rank=0, calls=[2, 3])
    assert "2 steps had a loss or gradient that is not a finite number" in done.stderr
    assert "stages.0.lr" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "kind, message, fresh",
    [
        ("exception", "vlmds: rank 1: RuntimeError: injected failure", False),
        ("kill", "rank 1 died while it was at align step 3, in forward and backward (v", True),
    ],
)
def test_a_rank_that_fails_takes_the_job_down_and_is_named(models, shards, tmp_path, kind, message, fresh):
    """Under a launcher, which ends the other rank, and without one. In the second of two
    micro-batches: the gradients of the first are waiting to be reduced."""
    args = arguments(models, shards, tmp_path / "run", "training.micro_batch=1")
    done = train_with_fault(2, args, None, fresh, kind=kind, rank=1, call=6)
    assert message in done.stderr, done.stderr
    assert "at align step 3, in forward and backward (v" in done.stderr  # with the samples
    again = "run the same command again to continue"
    if kind == "kill":
        assert done.stderr.count(again) == 1 and "Traceback" not in done.stderr
    else:  # its own traceback, and none of the survivor, which is no cause
        assert done.stderr.count("Traceback") == 1 and again not in done.stderr


def test_a_disk_that_fills_up_is_one_line(models, shards, tmp_path):
    args = arguments(models, shards, tmp_path / "run")
    done = train_with_fault(0, args, 2, kind="full", rank=0, call=3)
    assert done.stderr.splitlines()[-1] == (
        "vlmds: /full/disk: No space left on device; make room there, or name another place"
    )
    assert "Traceback" not in done.stderr


def test_a_rank_stuck_in_data_ends_the_job_within_the_timeout(models, shards, tmp_path):
    args = arguments(models, shards, tmp_path / "run", "training.timeout_minutes=0.2", "logging.stall_seconds=2")
    done = train_with_fault(2, args, None, kind="stuck", rank=1, call=5)
    assert "vlmds: rank 1: still at align step 3, waiting for data" in done.stderr, done.stderr
    assert "vlmds: rank 1: no progress for 12 s" in done.stderr, done.stderr
    said = next(line for line in done.stderr.splitlines() if "rank 1: it was at align" in line)
    assert "step 3, waiting for data" in said and "reader 0 has been reading sample v" in said, said


def test_the_watch_counts_from_its_start(tmp_path):
    """Not from the import of its module, which in a notebook may be hours before."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import time, torch.distributed as dist\n"
        "from vlmds.distributed import watchdog\n"
        "dist.init_process_group('gloo')\n"
        "started = watchdog.PROCESS.activity\n"
        "watchdog.PROCESS.activity = started._replace(since=started.since - 3600)\n"
        "watchdog.start_watch(timeout_minutes=1, stall_seconds=1)\n"
        "time.sleep(0.2)\n"
    )
    forked(1, str(script), log=tmp_path / "log")


def test_the_watch_ends_with_the_training(tmp_path):
    """A process that goes on after it, as a notebook, is not ended for that."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import time, torch.distributed as dist\n"
        "from vlmds.distributed import watchdog\n"
        "from vlmds.distributed.ranks import leave\n"
        "dist.init_process_group('gloo')\n"
        "watchdog.start_watch(timeout_minutes=0.02, stall_seconds=1)\n"
        "leave()\n"
        "time.sleep(3)\n"
        "watchdog.doing('something else')\n"
    )
    forked(1, str(script), log=tmp_path / "log")


def test_a_full_disk_costs_checkpoints_not_the_run(models, shards, two_ranks, tmp_path):
    """checkpoints/ on a file system of 140 kB: one fits, the next does not."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=140k", "tmpfs", str(run / "checkpoints")]
    if os.geteuid() or subprocess.run(mount, capture_output=True, timeout=30).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        done = train(2, *arguments(models, shards, run))
        assert "WARNING: align-0000004 not saved" in done.stdout, done.stdout
        assert "No space left" in done.stdout or "os error 28" in done.stdout, done.stdout
        (left,) = (run / "checkpoints").iterdir()  # and no half of another
        assert left.name == "align-0000002" and checkpoint.check(left) is None
        assert metrics(run) == metrics(two_ranks)
        assert_same_weights(weights(run), weights(two_ranks))
    finally:
        subprocess.run(["umount", str(run / "checkpoints")], check=True, timeout=30)


def test_a_stop_without_a_checkpoint_is_not_reported_as_one_with(models, shards, tmp_path):
    """A scheduler starts what ended with 3 again, here for ever."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(run / "checkpoints")]
    if os.geteuid() or subprocess.run(mount, capture_output=True, timeout=30).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        done = train_with_fault(2, arguments(models, shards, run), 2, kind="signal", name="SIGTERM", rank=1, call=3)
        assert "stopped by a signal after step 4 of 6, but align-0000004 not saved" in done.stderr
    finally:
        subprocess.run(["umount", str(run / "checkpoints")], check=True, timeout=30)


def test_changed_base_weights_are_refused_by_name(models, shards, two_ranks, tmp_path):
    copy = tmp_path / "models"
    shutil.copytree(models, copy)
    path = copy / "qwen3" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    run = shutil.copytree(two_ranks, tmp_path / "run")
    done = train(0, *arguments(copy, shards, run), expect=2)
    assert "llm.model: model.safetensors of" in done.stderr
    assert (run / "run.json").read_text() == (two_ranks / "run.json").read_text()


@pytest.mark.parametrize(
    ("there", "fault", "line"),
    [
        (["--set", "llm.model=/nowhere/qwen3"], {}, "llm.model: /nowhere/qwen3"),
        (["--ds-config", "zero9"], {}, "--ds-config: zero9 is neither a file nor"),
        ([], {"kind": "nan", "rank": 0, "calls": [1]}, "more than training.max_skipped_steps 0"),
    ],
)
def test_what_one_node_finds_or_all_is_one_line(models, shards, tmp_path, there, fault, line):
    """And ends both with bad input, not one by a lost connection."""
    env = {"VLMDS_TEST_FAULT": json.dumps(fault)} if fault else {}
    done = train(
        2,
        *arguments(models, shards, tmp_path / "run", "training.max_skipped_steps=0"),
        expect=2,
        script=ROOT / "tests" / "training" / "nodes.py",
        VLMDS_TEST_NODES=json.dumps(there),
        **env,
    )
    (said,) = [text for text in done.stderr.splitlines() if text.startswith("vlmds: ")]
    assert line in said and "Traceback" not in done.stderr, done.stderr
