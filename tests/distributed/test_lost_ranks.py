"""Reports of the ranks that survive a lost one: which one it was, and what to do, in one line."""

import json
import re

import pytest
import torch.distributed as dist

from tests.training.launch import TIMEOUT, fork, kill_tree
from vlmds.distributed.lost_ranks import connection_lost, report_loss

RANK = """
import json, os, signal, sys, time
import torch, torch.distributed as dist
from vlmds.distributed import watchdog
from vlmds.distributed.failures import run_on_ranks
dist.init_process_group("gloo")
rank, fault = dist.get_rank(), json.loads(os.environ["FAULT"])
watchdog.start_watch(timeout_minutes=5, stall_seconds=60)
watchdog.doing("at align step 3", ["v1", "v2"])
dist.barrier()
def command():
    if rank == fault["rank"]:
        if fault["kind"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("a fault")
    if rank == 3:
        time.sleep(fault["busy"])  # in something else
    dist.all_reduce(torch.ones(1))
run_on_ranks(command)
"""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("kill", "rank 1 died while it was at align step 3 (v1, v2); run the same command again to continue"),
        ("fail", "rank 1 failed first; its message names the cause"),
    ],
)
def test_one_line_for_a_machine_names_the_rank(tmp_path, kind, line):
    """Rank 3, which has not noticed the loss yet, is not reported."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    process = fork(4, str(script), log=tmp_path / "log", FAULT=json.dumps({"kind": kind, "rank": 1, "busy": 5}))
    try:
        assert process.wait(TIMEOUT) != 0
    finally:
        kill_tree(process)
    err = (tmp_path / "log.err").read_text()
    said = [said for said in err.splitlines() if "rank 1 died" in said or "failed first" in said]
    assert [re.sub(r"^vlmds: rank [023]: ", "", text) for text in said] == [line], err
    assert "rank 3 died" not in err, err
    own = kind == "fail"  # the traceback is that of rank 1 alone
    assert err.count("Traceback") == own and ("vlmds: rank 1: ValueError: a fault" in err) == own, err


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:9"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:1] Read error [::1]:9: Connection reset by peer"), True),
        (dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."), True),
        (
            dist.DistBackendError(
                "ncclRemoteError: a call failed possibly due to a network error or a remote process exited prematurely."
            ),
            True,
        ),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1000ms"), False),
        (dist.DistBackendError("ncclUnhandledCudaError: Call to CUDA function failed."), False),
        (ConnectionResetError("Connection reset by peer"), False),  # for example of a data server
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_which_errors_mean_a_lost_rank(error, lost):
    assert connection_lost(error) == lost


@pytest.mark.parametrize(("rank", "local", "lines"), [(8, 0, 1), (1, 1, 1), (2, 2, 0)])
def test_before_the_ranks_have_joined_the_first_of_a_machine_and_rank_1_report(monkeypatch, capsys, rank, local, lines):
    """Rank 1 too, because rank 0 may be the lost one."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local))
    report_loss(None)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == lines
    assert all(f"vlmds: rank {rank}: the connection to rank 0 is lost; " in line for line in said)
