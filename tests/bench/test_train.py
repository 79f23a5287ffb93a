"""`vlmds bench train`, which compares equal trainings, and `bench scaling`, which predicts from counted bytes."""

import json
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.bench.test_bench import curves
from tests.training.launch import environment, forked
from vlmds.bench import many_gpus, train, workload
from vlmds.bench.clock import StepClock
from vlmds.bench.many_gpus import bench_scaling, communication_seconds, sent_bytes
from vlmds.errors import InputError
from vlmds.experiments.reading import load_experiment
from vlmds.models.assemble import meta_models

SMALL = ["data.num_frames=2", "training.gradient_accumulation=1"]


@pytest.fixture
def small_models(monkeypatch):
    """Few rows of the vocabulary: the tests check losses, not times."""
    monkeypatch.setattr(workload.TINY_LLM, "vocab_size", 700)
    monkeypatch.setattr(workload.TINY_LLM, "num_hidden_layers", 2)
    monkeypatch.setattr(workload.TINY_LLM, "layer_types", ["full_attention"] * 2)


@pytest.fixture
def forked_workers(monkeypatch, tmp_path):
    """Processes of one rank are forked; torchrun starts several."""

    def run(command, **options):
        if "torch.distributed.run" in command:
            return subprocess.run(command, **options)
        printed = forked(0, *command[1:], log=tmp_path / f"log-{command[-2]}")
        return subprocess.CompletedProcess(command, 0, printed, "")

    monkeypatch.setattr(train, "subprocess", SimpleNamespace(run=run))


@pytest.mark.parametrize("steps", range(2, 7))
def test_a_gpu_times_whole_steps_and_split_ones(tmp_path, steps):
    work = workload.Workload(tmp_path, steps)
    timed = [work.is_split(number) for number in range(work.total_steps)][work.WARM_UP : -1]
    assert len(timed) == steps and timed == sorted(timed) and {*timed} == {False, True}


def test_one_step_is_two_on_a_gpu_and_none_is_refused(tmp_path, monkeypatch):
    asked = []

    def measured(folder, exp, tiny, baselines, steps, ranks, overrides):
        asked.append(steps)
        raise RuntimeError("enough")

    monkeypatch.setattr(train, "_measure", measured)
    for gpus, steps in ((0, 1), (1, 1), (1, 3)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        with pytest.raises(RuntimeError, match="enough"):
            train.bench_train(tmp_path, ["e3"], tiny=True, steps=steps)
    assert asked == [1, 2, 3]
    with pytest.raises(InputError, match="--steps 0: must be at least 1"):
        train.bench_train(tmp_path / "none", ["e3"], tiny=True, steps=0)
    assert not (tmp_path / "none").exists()


@pytest.mark.distributed
@pytest.mark.parametrize(("exp", "baselines"), [("e3", ["reference", "hf"]), ("e8", ["reference"])])
def test_all_variants_train_the_same(small_models, forked_workers, tmp_path, monkeypatch, capsys, exp, baselines):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train, "ROUNDS", 1)
    found = train.bench_train(tmp_path, [exp], tiny=True, baselines=baselines, steps=1, overrides=SMALL)
    rows = found[exp]["rows"]
    assert [row["variant"] for row in rows] == ["vlmds", *baselines]
    assert all(row["loss_difference"] < 1e-4 for row in rows[1:])
    assert len(set(rows[0]["losses"])) == 4  # it learns
    own = rows[0]
    assert 0 < sum(own["phases"].values()) <= own["split_step_seconds"] * 1.001
    assert own["resident"]["trainables"] == found[exp]["plan"]["trainables"]
    assert own["resident"]["LLM weights"] == pytest.approx(found[exp]["plan"]["LLM weights"], rel=0.01)
    assert "| share of a step |" in capsys.readouterr().out
    assert json.loads((tmp_path / "train.json").read_text())[exp]["rows"]
    assert not list(tmp_path.glob("train-*"))  # the weights are gone


def test_figures_of_a_gpu():
    """Rates of several ranks are all ranks', shares of the peak each rank's; baselines count no
    positions."""
    own = {
        "experiment": "e3",
        "variant": "vlmds",
        "ranks": 1,
        "device": "NVIDIA H200",
        "batch": 8,
        "step_seconds": 2.0,
        "positions": 40_000,
        "peak_bytes": 2e10,
        "libraries_bytes": 0,
        "step_bytes": 1e9,
        "loss_difference": None,
        "weights": 8e9,
        "flops": {"total": 1e14},
    }
    row = train._time_row(own, own)
    assert row["tokens/s"] == "20,000" and row["samples/s"] == "4.00"
    assert row["MFU at 4N"] == f"{4 * 8e9 * 20_000 / 989e12:.1%}"
    two = train._time_row({**own, "ranks": 2, "positions": 80_000}, own)
    assert two["tokens/s"] == "40,000" and two["MFU at 4N"] == row["MFU at 4N"] and two["MFU"] == row["MFU"]
    other = train._time_row({**own, "variant": "hf", "positions": 0, "step_seconds": 4.0}, own)
    assert other["tokens/s"] == "10,000"


@pytest.mark.distributed
def test_a_baseline_that_fails_is_left_out(small_models, forked_workers, tmp_path, monkeypatch, capsys):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train, "ROUNDS", 1)
    run = train._run

    def failing(variant, number):
        if variant.name == "reference":
            raise RuntimeError("reference failed with exit code 1: out of memory")
        return run(variant, number)

    monkeypatch.setattr(train, "_run", failing)
    found = train.bench_train(tmp_path, ["e3"], tiny=True, baselines=["reference"], steps=1, overrides=SMALL)
    assert [row["variant"] for row in found["e3"]["rows"]] == ["vlmds"]
    assert "reference is left out" in capsys.readouterr().out


def test_other_losses_are_refused_with_both():
    assert train.check_losses("float32", {"a": [2.0, 1.0], "b": [2.0, 1.0005]}) == {"b": pytest.approx(5e-4)}
    for wrong in ([2.01, 1.0], [2.0, 1.01], [2.0, float("nan")]):
        with pytest.raises(RuntimeError, match="not the same training"):
            train.check_losses("float32", {"a": [2.0, 1.0], "b": wrong})


def test_what_a_baseline_cannot_train_is_refused(tmp_path):
    with pytest.raises(InputError, match="no perceiver projector"):
        train.bench_train(tmp_path, ["e7"], tiny=True, baselines=["hf"])


def test_phases_inside_each_other_count_once(monkeypatch):
    clock = StepClock(torch.device("cpu"))
    monkeypatch.setattr(clock, "_now", iter((0.0, 1.0, 4.0, 6.0)).__next__)
    with clock.phase("outer"):
        with clock.phase("inner"):
            pass
    found = clock.lap()
    assert (found["outer"], found["inner"]) == (3.0, 3.0)
    assert "outer" not in clock.lap()


def test_what_the_host_takes_is_counted_where_nothing_is_split():
    clock = StepClock(torch.device("cpu"), split=False)
    with clock.phase("forward"):
        time.sleep(0.01)
    found = clock.lap()
    assert found["host"]["forward"] >= 0.01 and "forward" not in found
    assert clock.lap()["host"] == {}


def test_the_assumed_time_of_a_linear_is_what_a_gpu_would_give():
    """Out of the host's seconds that 123 µs make comes 123 µs, with any recomputation; whole
    weights have no such time."""
    experiment = load_experiment("e7")
    model = meta_models(experiment)
    for every in (0, 1, 3):
        # 36 layers of 7 Linears and 100 kernels of 5 µs.
        micro = (2 + (1 / every if every else 0)) * 36 * (7 * 123e-6 + 100 * 5e-6)
        host = {"forward": micro, "backward": 3 * micro}  # of 4 micro-batches
        assert train.linear_seconds(host, experiment, model, every) == pytest.approx(123e-6)
    assert train.linear_seconds({}, load_experiment("e7", ["llm.load_in_4bit=false"]), model, 0) is None


def test_bytes_of_collectives_are_those_of_a_ring(tmp_path):
    """Four ranks, each of which sends 2 (W - 1) / W of the tensor in an all-reduce."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "from vlmds.bench.clock import StepClock\n"
        "clock = StepClock(torch.device('cpu')); clock.watch_collectives()\n"
        "dist.init_process_group('gloo')\n"
        "dist.all_reduce(torch.zeros(1000))\n"
        "assert clock.lap()['sent'] == 2 * 3 * 4000 // 4\n"
        "dist.destroy_process_group()\n"
    )
    forked(4, str(script), log=tmp_path / "log")
    assert not dist.is_initialized()


def test_scaling_is_drawn_and_more_gpus_cost_more(tmp_path, monkeypatch):
    assert communication_seconds(1e8, 8, 200) == 0
    assert communication_seconds(1e8, 512, 200) > communication_seconds(1e8, 64, 200) > 0
    # Owners get their part up to 64 ranks; over more, gradients are all-reduced.
    assert sent_bytes(1.0, 64) == 2 * 63 / 64 and sent_bytes(1.0, 128) == 3 * 127 / 128
    assert communication_seconds(1e8, 64, 400) < communication_seconds(1e8, 64, 200)
    monkeypatch.setattr(many_gpus, "EXPERIMENTS", ("e3", "e8"))
    found = bench_scaling(tmp_path, "h200")
    assert [row["experiment"] for row in found["rows"]] == ["e3", "e8"]
    efficiency = [float(found["rows"][1][f"{gpus} GPUs, 200 Gb/s"].rstrip("%")) for gpus in (8, 64, 512)]
    assert efficiency == sorted(efficiency, reverse=True) and efficiency[0] == 100
    assert curves(tmp_path / "scaling.png") == {0, 1}


@pytest.mark.distributed
def test_two_ranks_send_no_more_than_they_must(small_models, forked_workers, tmp_path, monkeypatch):
    """Each rank sends half of the gradients and half of the weights, once, whatever the number of
    micro-batches."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train, "ROUNDS", 1)
    found = train.bench_train(
        tmp_path,
        ["e3"],
        tiny=True,
        steps=1,
        ranks=2,
        overrides=["data.num_frames=2", "training.gradient_accumulation=4"],
    )
    row = found["e3"]["rows"][1]
    bound = 2 * row["trained_bytes"] * (2 - 1) / 2
    # A few bytes more: counts, norms and flags.
    assert row["sent"] == pytest.approx(bound, rel=1e-3)
    assert sent_bytes(row["trained_bytes"], 2) == bound
