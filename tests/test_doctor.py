"""The doctor on real ranks, healthy and with something wrong."""

import subprocess
import sys

import pytest

from tests import tiny
from tests.training.launch import ROOT, environment, free_port, kill_tree

pytestmark = pytest.mark.distributed


def command(node, port, models, shards, output, *more):
    return [sys.executable, str(ROOT / "launch" / "torchrun.py"), "--nnodes", "2", "--node_rank",
            str(node), "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port",
            str(port), str(ROOT / "launch" / "doctor.py"), "--data", str(shards), "--output",
            str(output), "--seconds", "20", "--samples", "20", *more, "--set",
            *tiny.settings(models), *tiny.RESAMPLER]


def examine(models, shards, outputs, *more, environments=({}, {})):
    """Two nodes of one rank; returns their exit codes and what rank 0 printed."""
    port = free_port()
    processes = [subprocess.Popen(
        command(node, port, models, shards, outputs[node], *more), cwd=ROOT, text=True,
        env=environment(**environments[node]), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True) for node in (0, 1)]
    try:
        printed = [process.communicate(timeout=200)[0] for process in processes]
        return [process.returncode for process in processes], printed[0]
    finally:
        for process in processes:
            kill_tree(process)


def test_two_healthy_nodes(models, shards, tmp_path):
    codes, printed = examine(models, shards, [tmp_path, tmp_path])
    assert codes == [0, 0], printed
    for line in ("same output:", "clock: clocks differ by up to", "GB/s", "checksums right",
                 "samples/s by", "written, fsync"):
        assert any(text.startswith("ok") and line in text for text in printed.splitlines()), printed
    assert "FAILED" not in printed and not list(tmp_path.iterdir())


def test_every_fault_is_named(models, shards, tmp_path):
    """Another version and another folder on the second node, and more speed wanted than there is."""
    other = tmp_path / "packages" / "decord-9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: decord\nVersion: 9.9\n")
    path = {"PYTHONPATH": f"{other.parent}:{ROOT}"}
    codes, printed = examine(models, shards, [tmp_path / "a", tmp_path / "b"],
                             "--samples-per-second", "1e9", environments=({}, path))
    assert codes == [2, 2], printed
    failed = [line for line in printed.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 3, printed
    assert "decord: 0.6.0 on" in failed[0] and "9.9 on" in failed[0]
    assert "same output" in failed[1] and "1e+09 wanted" in failed[2]
