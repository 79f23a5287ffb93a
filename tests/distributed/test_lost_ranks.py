"""What the survivors of a rank that died say: which one, and what to do, in one line."""

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
from vlmds.distributed.lost_ranks import connection_lost
dist.init_process_group("gloo")
rank, fault = dist.get_rank(), json.loads(os.environ["FAULT"])
watchdog.start_watch(timeout_minutes=5, stall_seconds=60)
watchdog.doing("at align step 3", ["v1", "v2"])
dist.barrier()
try:
    if rank == fault["rank"]:
        if fault["kind"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("a fault")
    if rank == 3:
        time.sleep(fault["busy"])  # in something else
    dist.all_reduce(torch.ones(1))
except Exception as error:
    watchdog.report_lost_rank() if connection_lost(error) else watchdog.report_failure(f"{error}")
    print(f"{rank} {type(error).__name__}", flush=True)
    os._exit(1)
"""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (
            "kill",
            "rank 1 died while it was at align step 3 (v1, v2); run the same command again to "
            "continue from the last checkpoint",
        ),
        ("fail", "rank 1 failed first; its message names the cause"),
    ],
)
def test_one_line_for_a_machine_names_the_rank(tmp_path, kind, line):
    """Not those that have not noticed yet, such as rank 3."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    process = fork(4, str(script), log=tmp_path / "log", FAULT=json.dumps({"kind": kind, "rank": 1, "busy": 5}))
    try:
        assert process.wait(TIMEOUT) != 0
    finally:
        kill_tree(process)
    out, err = ((tmp_path / f"log.{end}").read_text() for end in ("out", "err"))
    said = [said for said in err.splitlines() if "rank 1 died" in said or "failed first" in said]
    assert [re.sub(r"^vlmds: rank [023]: ", "", text) for text in said] == [line], err
    assert "rank 3 died" not in err and "Traceback" not in err, err
    assert ("1 ValueError" in out) == (kind == "fail")


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
        (ConnectionResetError("Connection reset by peer"), False),  # of a data server, for one
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_what_is_taken_for_a_lost_rank(error, lost):
    assert connection_lost(error) == lost


@pytest.mark.parametrize(("rank", "local", "lines"), [(8, 0, 1), (1, 1, 1), (2, 2, 0)])
def test_before_there_is_a_store_the_first_of_a_machine_and_rank_1_report(monkeypatch, capsys, rank, local, lines):
    """Rank 1 too, because it may be rank 0 that is gone."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local))
    report_loss(None)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == lines
    assert all(f"vlmds: rank {rank}: the connection to rank 0 is lost; " in line for line in said)
