"""`vlmds doctor` on real ranks, without and with faults."""

import os
import re
import resource
import shutil
import subprocess
import sys
from importlib import metadata

import pytest
import torch

from tests import tiny
from tests.training.launch import ROOT, environment, forked, free_port, kill_tree
from vlmds.doctor.cluster import findings_within, judge_decoding, judge_link, step_rate
from vlmds.doctor.network import Measure
from vlmds.doctor.node import (
    FAILED,
    OK,
    WARNING,
    CheckContext,
    check_accelerator,
    check_dataset,
    check_disk,
    check_limits,
)
from vlmds.experiments.reading import load_experiment
from vlmds.planning.cards import find_card

pytestmark = pytest.mark.distributed

LEVELS = (OK, WARNING, FAILED)
FAKETIME = shutil.which("faketime")


def command(node, port, models, shards, output, *more):
    return [
        sys.executable,
        str(ROOT / "launch" / "torchrun.py"),
        "--nnodes",
        "2",
        "--node_rank",
        str(node),
        "--nproc_per_node",
        "1",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(port),
        str(ROOT / "launch" / "doctor.py"),
        "--data",
        str(shards),
        "--output",
        str(output),
        "--seconds",
        "20",
        "--samples",
        "20",
        *more,
        "--set",
        *tiny.settings(models),
        *tiny.RESAMPLER,
    ]


def examine(models, shards, outputs, *more, environments=({}, {}), wrap=()):
    """Two nodes of one rank; returns their exit codes and the output of rank 0. wrap: a command that runs
    that of the second node."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [*(wrap if node else ()), *command(node, port, models, shards, outputs[node], *more)],
            cwd=ROOT,
            text=True,
            env=environment(**environments[node]),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for node in (0, 1)
    ]
    try:
        printed = [process.communicate(timeout=200)[0] for process in processes]
        return [process.returncode for process in processes], printed[0]
    finally:
        for process in processes:
            kill_tree(process)


def test_two_healthy_nodes(models, shards, tmp_path):
    codes, printed = examine(models, shards, [tmp_path, tmp_path])
    assert codes == [0, 0], printed
    for line in (
        "same output:",
        "clock: clocks differ by up to",
        "GB/s",
        "checksums correct",
        "samples/s by",
        "written, fsync",
    ):
        assert any(text.startswith("ok") and line in text for text in printed.splitlines()), printed
    assert "FAILED" not in printed and not list(tmp_path.iterdir())


def test_every_fault_is_named(models, shards, tmp_path):
    """The second node has another version, output folder and time; --wanted is more than it can decode."""
    other = tmp_path / "packages" / "av-9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: av\nVersion: 9.9\n")
    path = {"PYTHONPATH": f"{other.parent}:{ROOT}"}
    codes, printed = examine(
        models,
        shards,
        [tmp_path / "a", tmp_path / "b"],
        "--samples-per-second",
        "1e9",
        environments=({}, path),
        wrap=["faketime", "-f", "-2h"] if FAKETIME else [],
    )
    assert codes == [2, 2], printed
    failed = [line for line in printed.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 3, printed
    assert f"av: {metadata.version('av')} on" in failed[0] and "9.9 on" in failed[0]
    assert "same output" in failed[1] and "1e+09 wanted" in failed[2]
    if FAKETIME:
        assert re.search(
            r"^warning  clock: clocks differ by up to 7\d{3}\.\d{3} s \(\S+ from \S+\)"
            r".*; run chrony or ntpd$",
            printed,
            re.M,
        ), printed


def context(models, output, *overrides):
    return CheckContext(
        load_experiment("e3", [*tiny.settings(models), *overrides]),
        output,
        seconds=5,
        samples=20,
        wanted=None,
        device=torch.device("cpu"),
        nodes=[0],
        names=["here"],
    )


def finding(check, *arguments):
    """The most severe finding of the check."""
    return max(findings_within(20, lambda: check(*arguments)), key=lambda found: LEVELS.index(found.level))


def alone(tmp_path, *words, before=(), **variables):
    """`vlmds doctor` as a plain process: exit code and output."""
    done = subprocess.run(
        [*before, sys.executable, str(ROOT / "launch" / "doctor.py"), *words],
        cwd=tmp_path,
        env=environment(**variables),
        text=True,
        capture_output=True,
        timeout=200,
    )
    return done.returncode, done.stdout + done.stderr


def test_one_machine_with_all_faults(models, shards, tmp_path):
    """Few open files, little shared memory, a disk that does not answer, a damaged shard."""
    broken = tmp_path / "broken"
    shutil.copytree(shards, broken)
    for shard in (broken / "train").glob("*.tar"):
        content = shard.read_bytes()
        shard.write_bytes(content[:512] + bytes(len(content) - 512))
    os.mkfifo(tmp_path / ".doctor-write-0.tmp")  # opening it for writing blocks
    small = "mount -t tmpfs -o size=64k tmpfs /dev/shm && "
    before = ["unshare", "--mount", "sh", "-c", small + 'ulimit -n 100 && exec "$@"', "sh"]
    if os.geteuid() or subprocess.run([*before, "true"], capture_output=True).returncode:
        pytest.skip("needs root and namespaces of mounts")
    code, printed = alone(
        tmp_path,
        "--data",
        str(broken),
        "--output",
        ".",
        "--seconds",
        "10",
        "--set",
        *tiny.settings(models),
        *tiny.RESAMPLER,
        "data.num_workers=1",
        before=before,
    )
    assert code == 2, printed
    failed = [line for line in printed.splitlines() if line.startswith("FAILED")]
    for line, words in zip(
        failed,
        (
            "limits: only 100 open files; ulimit -n",
            "memory: 0.00 GiB free in /dev/shm, readers",
            "output: no answer within 10 s; check whether a disk",
            "dataset:",
            "decoding:",
        ),
        strict=True,
    ):
        assert words in line, printed
    assert "000000.tar" in failed[3], printed


STUCK = """
import atexit, sys
from vlmds.cli import main
atexit.register(print, "normal exit of Python", flush=True)
sys.exit(main(["doctor", *sys.argv[1:]]))
"""


def test_a_plain_process_ends_beside_a_check_that_does_not(models, tmp_path):
    """Python's normal exit may abort while a thread is inside a library."""
    os.mkfifo(tmp_path / ".doctor-write-0.tmp")  # opening it for writing blocks
    done = subprocess.run(
        [sys.executable, "-c", STUCK, "--output", ".", "--seconds", "5", "--set", *tiny.settings(models)],
        cwd=tmp_path,
        env=environment(),
        text=True,
        capture_output=True,
        timeout=200,
    )
    assert done.returncode == 2, done.stderr
    assert "FAILED   output: no answer within 5 s" in done.stdout
    assert "normal exit" not in done.stdout


SLOW = """
from pathlib import Path
import torch
from vlmds.experiments.reading import load_experiment
from vlmds.doctor.cluster import check_links
from vlmds.doctor.node import CheckContext
from vlmds.distributed.ranks import init_distributed, is_main

init_distributed(1)
found = check_links(CheckContext(load_experiment("e3"), Path(), 0.001, 1, None, torch.device("cpu"),
                            [0, 1], ["a", "b"]))
if is_main():
    print(found[0].level, found[0].text, found[0].fix, flush=True)
"""


def test_a_link_that_misses_its_timeout_is_reported(tmp_path):
    """No link transfers 16 MiB in a millisecond, and some do not even connect in that time."""
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SLOW],
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(RANK=rank, LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
        )
        for rank in "01"
    ]
    try:
        printed = [process.communicate(timeout=100)[0] for process in ranks][0]
    finally:
        for process in ranks:
            kill_tree(process)
    # Which reason gloo gives depends on how far the two had come.
    assert re.search("^FAILED a and b: .+ check the link, firewalls", printed, re.M), printed


HUNG = """
import os, time
from pathlib import Path
import torch
from vlmds.doctor import network
from vlmds.experiments.reading import load_experiment
from vlmds.doctor.cluster import check_links
from vlmds.doctor.node import CheckContext
from vlmds.distributed.ranks import init_distributed, is_main

init_distributed(4 * 0.5 / 60, probing=True)
network._all_reduce_rate = lambda *_: time.sleep(3600)  # as NCCL waits for a connection
for _ in range(2):  # and the next check finds all ranks together
    found = check_links(CheckContext(load_experiment("e3"), Path(), 0.5, 1, None, torch.device("cpu"),
                                [0, 1, 2], ["a", "b", "c"]))
    if is_main():
        for one in found:
            print(f"{one.level} {one.text} {one.fix}", flush=True)  # in one piece: others print, too
print(f"NCCL raises: {os.environ['TORCH_NCCL_BLOCKING_WAIT']}", flush=True)
os._exit(0)
"""


def test_a_link_that_never_answers_is_reported(tmp_path):
    """NCCL, for example, has no timeout while it connects. All links together take longer than the watchdog
    allows for one."""
    script = tmp_path / "rank.py"
    script.write_text(HUNG)
    printed = forked(3, str(script), log=tmp_path / "log")
    for link in ("a and b", "a and c", "b and c", "all ranks"):
        assert printed.count(f"FAILED {link}: no answer within 1.5 s check the link") == 2, printed
    assert printed.count("NCCL raises: 1") == 3, printed


def test_a_slow_link_is_compared_with_the_others():
    links = [Measure("pair", name, rate) for name, rate in (("a and b", 10.0), ("b and c", 4.9))]
    good, slow = (judge_link(link, links) for link in links)
    assert (good.level, slow.level) == (OK, WARNING)
    assert slow.text == "b and c: 4.90 GB/s, another pair reaches 10.00"


@pytest.mark.parametrize(("total", "level"), [(130, OK), (110, WARNING), (90, FAILED)])
def test_decoding_is_compared_with_the_wanted_rate(total, level):
    found = judge_decoding(total, 100, "all")
    assert (found.level, found.text) == (level, "all, 100 wanted")
    assert bool(found.fix) == (level != OK)


def test_decoding_is_compared_with_the_predicted_rate_of_the_gpus():
    """At full size: with tiny models every card waits for the host."""
    found = judge_decoding(90, 100, "all", predicted=True)
    assert (found.level, found.text) == (WARNING, "all, 100 predicted for the GPUs")
    rates = [step_rate(load_experiment("e3"), 1, False, find_card(card)) for card in ("b200", "rtx4090")]
    assert rates[0] > rates[1] > 0


def test_low_limits_give_a_warning_first(models, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        found = finding(check_limits, context(models, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (found.level, found.text) == (WARNING, "only 1,024 open files")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_machine_without_a_gpu_gives_a_warning(models, tmp_path, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    found = finding(check_accelerator, context(models, tmp_path))
    assert found.level == WARNING and "no GPU found" in found.text


def test_the_output_is_not_a_folder_or_too_small(models, tmp_path):
    (tmp_path / "file").touch()
    found = finding(check_disk, context(models, tmp_path / "file" / "runs"))
    assert found.level == FAILED and found.text.startswith("NotADirectoryError: ")
    found = finding(check_disk, context(models, tmp_path, "training.keep_checkpoints=100000000"))
    assert found.level == FAILED and "100000002 checkpoints of each stage of e3 need" in found.text
    assert "training.keep_checkpoints" in found.fix
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_data_not_given_or_cut_short(models, shards, tmp_path):
    found = finding(check_dataset, context(models, tmp_path))
    assert (found.level, found.text) == (WARNING, "not checked")
    cut = tmp_path / "cut"
    shutil.copytree(shards, cut)
    os.truncate(cut / "train" / "000001.tar", 1000)
    found = finding(check_dataset, context(models, tmp_path, f"data.path={cut}"))
    assert found.level == FAILED and "000001.tar" in found.text


def test_a_node_that_never_joins_is_reported(models, tmp_path):
    code, printed = alone(
        tmp_path,
        "--seconds",
        "0.5",
        "--set",
        *tiny.settings(models),
        RANK="0",
        WORLD_SIZE="2",
        LOCAL_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
    )
    assert code == 2, printed
    assert "FAILED   ranks: rank 0 cannot join the others at 127.0.0.1: " in printed


def test_a_node_that_is_lost_is_reported(models, shards, tmp_path):
    port = str(free_port())
    words = [
        sys.executable,
        str(ROOT / "launch" / "doctor.py"),
        "--data",
        str(shards),
        "--output",
        str(tmp_path),
        "--seconds",
        "20",
        "--set",
        *tiny.settings(models),
    ]
    first, second = (
        subprocess.Popen(
            words,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(RANK=rank, LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
        )
        for rank in "01"
    )
    try:
        printed = []
        for line in first.stdout:
            printed.append(line)
            if "versions:" in line:
                second.kill()
        code = first.wait(60)
    finally:
        for process in (first, second):
            kill_tree(process)
    failed = [line for line in printed if line.startswith("FAILED")]
    assert code == 2 and len(failed) == 1 and "rank 0 lost the connection to the others: " in failed[0], printed
