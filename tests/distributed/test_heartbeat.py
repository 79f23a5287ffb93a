"""The heartbeat: the loss of a node or rank ends the others in time, also in a wait outside of collectives; a
slow rank does not end the job."""

import json
import os
import resource
import socket
import threading
import time

import pytest

from tests.distributed import namespaces
from tests.training.launch import FAULTY, TIMEOUT, arguments, fork, forked, kill_tree, metrics, train
from vlmds.distributed.heartbeat import Centre

pytestmark = pytest.mark.distributed

SECONDS = 4  # training.heartbeat_seconds, the minimum


def struck(models, shards, run, expect, **fault):
    return train(
        2,
        *arguments(models, shards, run, f"training.heartbeat_seconds={SECONDS}"),
        expect=expect,
        script=FAULTY,
        VLMDS_TEST_FAULT=json.dumps(fault),
    )


@pytest.mark.parametrize("survivor", [0, 1])
def test_a_rank_that_was_killed_ends_the_other_in_its_wait(models, shards, tmp_path, survivor):
    note = tmp_path / "note"
    done = struck(models, shards, tmp_path / "run", None, kind="alone", rank=survivor, call=3, note=str(note))
    # The rest is the end of the processes, on a machine that may be busy; a collective has three minutes.
    assert time.monotonic() - float(note.read_text()) < SECONDS + 120
    assert f"vlmds: rank {survivor}: rank {1 - survivor} on " in done.stderr, done.stderr
    assert "s ago without reporting an error (training.heartbeat_seconds), ending the job" in done.stderr
    assert f"rank {survivor}: it was at align step 3, in forward and backward (v" in done.stderr


@pytest.mark.parametrize(("kind", "rank"), [("lock", 0), ("stop", 1)])
def test_a_stopped_rank_is_not_taken_for_lost(models, shards, two_ranks, tmp_path, kind, rank):
    """It is stopped for twice heartbeat_seconds."""
    note = tmp_path / "note"
    struck(models, shards, tmp_path / "run", 0, kind=kind, rank=rank, call=3, seconds=2 * SECONDS, note=str(note))
    assert time.monotonic() - float(note.read_text()) > 2 * SECONDS
    assert metrics(tmp_path / "run") == metrics(two_ranks)


@pytest.mark.parametrize("survivor", [0, 1])
def test_the_loss_of_a_node_ends_the_other_in_its_wait(models, shards, tmp_path, survivor):
    try:
        code, _, words = namespaces.node_gone(tmp_path, models, shards, survivor, SECONDS)
    except namespaces.Unavailable as problem:
        pytest.skip(f"no network namespaces here: {problem}")
    assert code == 1, words  # node_gone waits for it no longer than a few seconds
    said = f"node {survivor}: vlmds: rank {survivor}: rank {1 - survivor} on "
    (line,) = [line for line in words if said in line]
    assert "has not answered for" in line and "(training.heartbeat_seconds)" in line
    asked = "rank 1 was last at align" if survivor == 0 else "the other ranks cannot be asked"
    assert any(asked in line for line in words), words


RANK = """
import os, socket, struct, sys, time
import torch.distributed as dist
from vlmds.distributed import heartbeat, ranks

ranks.init_distributed(1, heartbeat_seconds={seconds})
if dist.get_rank() == 1:
    mine = [o for o in __import__("gc").get_objects() if isinstance(o, heartbeat.Member)][0]
    for _ in range(3):  # reset, as by a firewall that has dropped the connection
        while mine._connection is None or mine._connection.fileno() < 0:
            time.sleep(0.05)
        mine._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        mine._connection.shutdown(socket.SHUT_RD)
        time.sleep(0.5)
    with socket.create_connection(mine._address) as stranger:
        stranger.sendall(b"hello somebody 1 here\\n\\xff" + b"x" * 5000)
    time.sleep({seconds} * 2)
ranks.gather(None)
if dist.get_rank() == 0:
    centre = [o for o in __import__("gc").get_objects() if isinstance(o, heartbeat.Centre)][0]
    print("all there:", [rank.connection is not None for rank in centre._ranks.values()] == [True], flush=True)
ranks.gather(None)
if dist.get_rank() == 0:
    time.sleep({seconds} * 2)  # the other has left normally
"""


def test_a_rank_reconnects_and_a_rank_that_left_is_not_lost(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(seconds=SECONDS))
    printed = forked(2, str(script), log=tmp_path / "log")
    assert "all there: True" in printed and "vlmds:" not in printed, printed


KILLED = """
import gc, os, signal, time
import torch.distributed as dist
from vlmds.distributed import heartbeat, ranks

ranks.init_distributed(1, heartbeat_seconds={seconds})
if dist.get_rank() == 0:
    (centre,) = [o for o in gc.get_objects() if isinstance(o, heartbeat.Centre)]
    while len(centre._ranks) < 3:
        time.sleep(0.05)
ranks.gather(None)
if dist.get_rank() == 3:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""


def test_not_every_survivor_reports_the_same(tmp_path):
    """Only the first rank of a machine and rank 1 report."""
    script = tmp_path / "rank.py"
    script.write_text(KILLED.format(seconds=SECONDS))
    process = fork(4, str(script), log=tmp_path / "log")
    try:
        assert process.wait(TIMEOUT) != 0
    finally:
        kill_tree(process)
    said = (tmp_path / "log.err").read_text()
    for rank, count in enumerate((1, 1, 0, 0)):
        assert said.count(f"vlmds: rank {rank}: rank 3 on ") == count, said


class CountingCentre(Centre):
    """Counts its checks."""

    checks = 0

    def _check(self, elapsed):
        self.checks += 1
        super()._check(elapsed)


def test_checks_go_on_with_too_many_open_files():
    """A connection that cannot be accepted stays ready; it is accepted when that is possible."""
    centre = CountingCentre(SECONDS, "token", 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.create_connection(("localhost", centre.port)):
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))  # one more: the selector
        try:
            threading.Thread(target=centre.run, daemon=True).start()
            until(lambda: centre.checks > 1)
            accepted = len(centre._received)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert accepted == 0
        until(lambda: len(centre._received) == 1)
    centre.leave()


def until(true):
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
