"""Measurements of the monitor."""

import json
import re
import subprocess
import sys

import torch

from tests.training.launch import environment
from vlmds.experiments.reading import load_experiment
from vlmds.training.monitor import Monitor, peak_memory


def test_peak_memory_is_of_this_program_alone():
    """Linux reports the peak of the starting program as that of the new one."""
    ballast = bytearray(b"x") * (1 << 30)
    assert peak_memory() > 1e9
    code = "from vlmds.training.monitor import peak_memory; print(peak_memory())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), text=True, timeout=120, capture_output=True, check=True
    )
    del ballast
    assert 50e6 < int(done.stdout) < 1e9


def test_the_first_step_after_a_start_is_logged_at_once(tmp_path, capsys):
    """Then each logging.every-th, and the last."""
    experiment = load_experiment("e3", ["logging.every=10", "logging.tensorboard=false"])
    monitor = Monitor(tmp_path, experiment, active=True)
    monitor.start_stage("align", 3, 25, 0)
    for step in range(3, 25):
        monitor.step(
            step,
            loss=torch.tensor(2.0),
            grad_norm=1.0,
            lr=1e-3,
            samples=4,
            positions=9,
            supervised=3,
            waited=0.0,
            skipped=False,
        )
    shown = re.findall(r"align step (\d+)/25", capsys.readouterr().out)
    assert shown == ["4", "10", "20", "25"]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(4, 26))
    assert [r["step"] for r in records if "samples_per_s" in r] == [4, 10, 20, 25]
