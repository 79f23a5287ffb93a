"""Launchers: restarts, exit codes, and lost ranks and links."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time

import pytest

from tests.distributed import namespaces
from tests.manual import restarts
from tests.training.launch import (
    ROOT,
    SCRIPT,
    TIMEOUT,
    arguments,
    environment,
    fork,
    free_port,
    kill_tree,
    metrics,
    ranks_of,
)
from tests.training.test_training import assert_same_weights, weights

pytestmark = pytest.mark.distributed


def launch(tmp_path, *words):
    """launch/torchrun.py on two ranks, with its output in tmp_path/log."""
    with (tmp_path / "log").open("a") as log:
        return subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "launch" / "torchrun.py"),
                "--nproc_per_node",
                "2",
                "--rdzv-backend",
                "c10d",
                "--rdzv-endpoint",
                f"127.0.0.1:{free_port()}",
                "--rdzv-id",
                "test",
                *words,
            ],
            env=environment(),
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def wait(process, tmp_path, expect):
    code = process.wait(TIMEOUT)
    assert code == expect, f"{code}\n{(tmp_path / 'log').read_text()[-5000:]}"


def until(condition, process):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)


def test_torchrun_starts_again_after_a_rank_was_killed(models, shards, two_ranks, tmp_path):
    """Within one torchrun; the restart resumes from a checkpoint."""
    run = tmp_path / "run"
    process = launch(tmp_path, "--max-restarts", "1", str(SCRIPT), *arguments(models, shards, run))
    try:
        until(lambda: len(metrics(run)) >= 5, process)
        os.kill(ranks_of(process)[1], signal.SIGKILL)
        wait(process, tmp_path, 0)
    finally:
        kill_tree(process)
    assert len(json.loads((run / "run.json").read_text())["starts"]) == 2
    assert metrics(run) == metrics(two_ranks)
    assert_same_weights(weights(run), weights(two_ranks))


def test_torchrun_starts_again_on_both_of_two_nodes(models, shards, two_ranks, tmp_path):
    """The rank that dies is on the node that hosts the rendezvous. See restarts.py for the rest."""
    try:
        restarts.scenario(tmp_path, models, shards, two_ranks, ("kill -9 of the rank on node 0",))
    except namespaces.Unavailable as problem:
        pytest.skip(f"no network namespaces here: {problem}")


def settled(*words):
    """Options that launch/torchrun.py passes to torch."""
    launcher = runpy.run_path(str(ROOT / "launch" / "torchrun.py"))
    args = launcher["run"].parse_args([*words, "script.py"])
    launcher["settle_rendezvous"](args)
    return args.local_addr, args.rdzv_conf


def test_given_options_of_the_rendezvous_are_kept():
    c10d = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:29500"]
    assert settled("--nnodes", "2", "--master_addr", "127.0.0.1") == (None, "")
    assert settled("--nnodes", "2", *c10d) == (None, "keep_alive_max_attempt=100000000")
    assert settled("--nnodes", "1:2", *c10d) == (None, "")  # dead nodes must be noticed here
    given = ("10.0.0.7", "join_timeout=9,keep_alive_max_attempt=3")
    assert settled("--local-addr", given[0], "--rdzv-conf", given[1], *c10d) == given


RANK = """
import os, signal, sys, time
signal.signal(signal.{name}, lambda *_: (time.sleep(0.5), sys.exit(3)))
open(f"{{sys.argv[1]}}/up-{{os.environ['RANK']}}", "a").write("x")
time.sleep({sleep}); sys.exit({code})
"""


@pytest.mark.parametrize(("name", "expect"), [("SIGTERM", 3), ("SIGUSR1", 3), (None, 2), (None, 3)])
def test_the_exit_code_of_the_ranks_is_kept(tmp_path, name, expect):
    """The launcher waits for stopped ranks. It restarts neither them nor those with bad input, although
    restarts are left."""
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(name=name or "SIGTERM", sleep=TIMEOUT if name else 0, code=expect))
    process = launch(tmp_path, "--max-restarts", "3", str(script), str(tmp_path))
    try:
        if name:
            until(lambda: len(list(tmp_path.glob("up-*"))) == 2, process)
            os.kill(process.pid, signal.Signals[name])
        wait(process, tmp_path, expect)
        assert {up.read_text() for up in tmp_path.glob("up-*")} == {"x"}
    finally:
        kill_tree(process)


@pytest.mark.parametrize("code", [2, 3])
def test_a_rank_that_the_launcher_ended_itself_does_not_cause_a_restart(tmp_path, code):
    """Rank 1 is still importing, and has no handler of SIGTERM, when rank 0 returns."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys, time\n"
        "rank = os.environ['RANK']\n"
        "open(f'{sys.argv[1]}/up-{rank}', 'a').write('x')\n"
        "while not os.path.exists(f'{sys.argv[1]}/up-1'):\n"
        "    time.sleep(0.01)\n"
        f"time.sleep({TIMEOUT} if rank == '1' else 0); sys.exit({code})\n"
    )
    process = launch(tmp_path, "--max-restarts", "3", str(script), str(tmp_path))
    try:
        wait(process, tmp_path, code)
        assert {up.name: up.read_text() for up in tmp_path.glob("up-*")} == {"up-0": "x", "up-1": "x"}
    finally:
        kill_tree(process)


def node(tmp_path, rank, port, *words):
    """The one rank of a node, started by hand; its output is in node{rank}.out and .err."""
    return fork(
        0,
        str(SCRIPT),
        *words,
        log=tmp_path / f"node{rank}",
        RANK=str(rank),
        LOCAL_RANK="0",
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
    )


def test_a_problem_of_another_node_is_reported_there(tmp_path):
    process = node(tmp_path, 1, str(free_port()), "--exp", str(tmp_path / "e7.yaml"))
    try:
        assert process.wait(TIMEOUT) == 2
    finally:
        kill_tree(process)
    assert f"vlmds: rank 1: {tmp_path / 'e7.yaml'}" in (tmp_path / "node1.err").read_text()


def test_nodes_with_different_experiments_are_refused(models, shards, tmp_path):
    port = str(free_port())
    nodes = [
        node(tmp_path, rank, port, *arguments(models, shards, tmp_path / "run", f"stages.1.lr={lr}"))
        for rank, lr in enumerate((0.1, 0.2))
    ]
    try:
        assert [process.wait(TIMEOUT) for process in nodes] == [2, 2]
    finally:
        for process in nodes:
            kill_tree(process)
    printed = [(tmp_path / f"node{rank}.err").read_text() for rank in (0, 1)]
    assert "--exp: stages.1.lr 0.1 and 0.2 on ranks 0 and 1; give all nodes the same" in printed[0]
    assert "stages.1.lr" not in printed[1] and not (tmp_path / "run").exists()


def test_a_silently_cut_link_ends_both_sides_and_the_run_resumes(models, shards, tmp_path):
    try:
        namespaces.scenario(tmp_path, models, shards, cuts=("every packet dropped silently",))
    except namespaces.Unavailable as problem:
        pytest.skip(f"no network namespaces here: {problem}")
