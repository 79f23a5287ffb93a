"""Two simulated machines: network namespaces with a link that can be cut.

`python -m tests.distributed.namespaces FOLDER` (as root) trains across them, cuts the link in both
stages, once by taking an interface down and once by silently dropping every packet, starts again, and
compares with a run on one machine. The addresses exist in the namespaces only.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests import tiny
from tests.training.fixtures import make_shards
from tests.training.launch import (
    FAULTY,
    ROOT,
    SCRIPT,
    START_SECONDS,
    arguments,
    environment,
    metrics,
    train,
    until_lines,
)

ADDRESSES = ("10.87.65.1", "10.87.65.2")
TIMEOUT_MINUTES = 0.2
LAUNCHERS = ("torchrun", "deepspeed")
GRACE_SECONDS = 60  # from the run's own timeout to the end of the last process


class Unavailable(Exception):
    """Namespaces cannot be created here; the message is the reason."""


@dataclass(frozen=True)
class Node:
    namespace: str
    interface: str
    address: str
    rank: int

    def run(self, *words: str) -> None:
        ip("netns", "exec", self.namespace, *words)


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise Unavailable(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two connected nodes; at the end all their processes are killed and they are removed.

    Raises:
        Unavailable: not root, no iproute2, or a kernel that does not allow it.
    """
    if os.geteuid():
        raise Unavailable("needs root")
    nodes = tuple(Node(f"vlmds{os.getpid()}n{rank}", "veth0", ADDRESSES[rank], rank) for rank in (0, 1))
    try:
        for node in nodes:
            ip("netns", "add", node.namespace)
        first, second = nodes
        ip(
            "-n",
            first.namespace,
            "link",
            "add",
            first.interface,
            "type",
            "veth",
            "peer",
            "name",
            second.interface,
            "netns",
            second.namespace,
        )
        for node in nodes:
            ip("-n", node.namespace, "address", "add", f"{node.address}/24", "dev", node.interface)
            for interface in ("lo", node.interface):
                ip("-n", node.namespace, "link", "set", interface, "up")
        yield nodes
    except FileNotFoundError as error:
        raise Unavailable(f"no {error.filename}") from None
    finally:
        for node in nodes:
            with ExitStack() as stack:
                stack.callback(
                    subprocess.run, ["ip", "netns", "del", node.namespace], timeout=20, stderr=subprocess.DEVNULL
                )
                kill_all(node)


def kill_all(node: Node) -> None:
    """SIGKILL all processes in the namespaces, launchers and ranks."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        listed = subprocess.run(["ip", "netns", "pids", node.namespace], capture_output=True, text=True, timeout=20)
        if not listed.stdout.split():
            return
        for pid in map(int, listed.stdout.split()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def cut_by_interface(nodes: tuple[Node, Node]) -> None:
    ip("-n", nodes[1].namespace, "link", "set", nodes[1].interface, "down")


def restore_interface(nodes: tuple[Node, Node]) -> None:
    ip("-n", nodes[1].namespace, "link", "set", nodes[1].interface, "up")


def cut_silently(nodes: tuple[Node, Node]) -> None:
    """Send frames to a hardware address that does not exist: links stay up, and no error comes back."""
    for node, other in (nodes, nodes[::-1]):
        ip(
            "-n",
            node.namespace,
            "neigh",
            "replace",
            other.address,
            "lladdr",
            "02:00:00:00:00:99",
            "nud",
            "permanent",
            "dev",
            node.interface,
        )


def restore_packets(nodes: tuple[Node, Node]) -> None:
    for node, other in (nodes, nodes[::-1]):
        ip("-n", node.namespace, "neigh", "del", other.address, "dev", node.interface)


CUTS = {  # name: (lines of metrics before it, cut, restore)
    "interface of node 1 down": (8, cut_by_interface, restore_interface),
    "every packet dropped silently": (30, cut_silently, restore_packets),
}


def launch_command(node: Node, launcher: str, hostfile: Path, port: int, script: Path) -> list[str]:
    """One rank on each of two nodes; launcher "restarts" is torchrun with restarts."""
    torchrun = [sys.executable, str(ROOT / "launch" / "torchrun.py"), "--nnodes", "2", "--nproc_per_node", "1"]
    if launcher == "restarts":
        return [
            *torchrun,
            "--max-restarts",
            "3",
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            f"{ADDRESSES[0]}:{port}",
            "--rdzv-id",
            "test",
            str(script),
        ]
    place = ["--node_rank", str(node.rank), "--master_addr", ADDRESSES[0], "--master_port", str(port)]
    if launcher == "torchrun":
        return [*torchrun, *place, str(script)]
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    return [deepspeed, "--hostfile", str(hostfile), "--no_ssh", *place, str(script)]


@contextmanager
def launched(
    nodes: tuple[Node, Node],
    launcher: str,
    log: Path,
    port: int,
    words: list[str],
    clock: str | None = None,
    script: Path = SCRIPT,
    **env: str,
) -> Iterator[list[subprocess.Popen]]:
    """The launcher on each node, with its output in {log}-{rank}.log; all killed at the end. clock:
    error of node 1's clock, in the format of faketime."""
    with ExitStack() as stack:
        processes = []
        for node in nodes:
            stack.callback(kill_all, node)
            out = stack.enter_context(Path(f"{log}-{node.rank}.log").open("w"))
            command = launch_command(node, launcher, log.with_suffix(".hosts"), port, script)
            if clock and node.rank:
                command = ["faketime", "-f", clock, *command]
            processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", node.namespace, *command, *words],
                    cwd=ROOT,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    env=environment(GLOO_SOCKET_IFNAME=node.interface, **env),
                )
            )
        yield processes


def codes(processes: list[subprocess.Popen], seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in processes]


def final_reports(log: Path) -> list[str]:
    """The lines in which both sides report their end."""
    return [
        f"  node {rank}: {line}"
        for rank in (0, 1)
        for line in Path(f"{log}-{rank}.log").read_text().splitlines()
        if line.startswith(("vlmds: rank", "vlmds:   "))
    ]


def same_weights(a: Path, b: Path) -> bool:
    files = sorted(path.relative_to(a) for path in (a / "artifacts").rglob("*.safetensors"))
    return bool(files) and all(
        (x := load_file(a / file)).keys() == (y := load_file(b / file)).keys()
        and all(torch.equal(x[name], y[name]) for name in x)
        for file in files
    )


def node_gone(folder: Path, models: Path, shards: Path, survivor: int, seconds: float) -> tuple[int, float, list[str]]:
    """While the rank on node ``survivor`` waits outside of collectives (as for a GPU), the other node is
    lost: no packet passes any more, and all its processes are killed.

    Args:
        seconds: training.heartbeat_seconds.

    Returns:
        Exit code of the survivor's launcher, seconds from the loss to its end, and the final reports.

    Raises:
        Unavailable: see :func:`two_nodes`.
    """
    struck, log = folder / f"struck{survivor}", folder / f"gone{survivor}"
    fault = {"kind": "wait", "rank": survivor, "call": 5, "note": str(struck)}
    words = arguments(
        models,
        shards,
        folder / f"gone-run{survivor}",
        "training.timeout_minutes=10",
        f"training.heartbeat_seconds={seconds}",
    )
    with (
        two_nodes() as nodes,
        launched(nodes, "torchrun", log, 29506, words, script=FAULTY, VLMDS_TEST_FAULT=json.dumps(fault)) as processes,
    ):
        deadline = time.monotonic() + START_SECONDS
        while not struck.exists():
            assert time.monotonic() < deadline and processes[survivor].poll() is None
            time.sleep(0.01)
        cut_silently(nodes)
        kill_all(nodes[1 - survivor])
        began = time.monotonic()
        code = processes[survivor].wait(seconds + GRACE_SECONDS)
        return code, time.monotonic() - began, final_reports(log)


def scenario(
    folder: Path, models: Path, shards: Path, launcher: str = "torchrun", cuts: tuple[str, ...] = tuple(CUTS)
) -> None:
    """Run and print the whole scenario. Raises AssertionError or TimeoutExpired if it fails.

    Raises:
        Unavailable: see :func:`two_nodes`.
    """
    settings = (
        f"training.timeout_minutes={TIMEOUT_MINUTES}",
        "stages.0.steps=20",
        "stages.1.steps=20",
        "training.validate_every=10",
        "training.checkpoint_every=5",
    )
    whole, cut = folder / "whole", folder / "cut"
    with two_nodes() as nodes:
        print(
            f"{launcher} on {' and '.join(f'{n.namespace} ({n.address})' for n in nodes)}, "
            f"training.timeout_minutes={TIMEOUT_MINUTES}"
        )
        train(2, *arguments(models, shards, whole, *settings))
        print(f"undisturbed, on one machine: exit code 0, {len(metrics(whole))} lines of metrics")
        for number, what in enumerate(cuts):
            lines, sever, restore = CUTS[what]
            log = folder / f"cut{number}"
            with launched(nodes, launcher, log, 29502 + number, arguments(models, shards, cut, *settings)) as processes:
                until_lines(cut, lines, *processes)
                sever(nodes)
                began = time.monotonic()
                ends = codes(processes, TIMEOUT_MINUTES * 60 + GRACE_SECONDS)
                taken = time.monotonic() - began
            said = final_reports(log)
            print(
                f"{what}, after {len(metrics(cut))} lines: exit codes {ends[0]} and {ends[1]} "
                f"after {taken:.1f} s\n" + "\n".join(said)
            )
            assert all(ends), "a side ended with exit code 0"
            for rank in (0, 1):
                assert any(line.startswith(f"  node {rank}: vlmds: rank {rank}: ") for line in said)
            restore(nodes)
        with launched(nodes, launcher, folder / "last", 29504, arguments(models, shards, cut, *settings)) as processes:
            assert codes(processes, START_SECONDS) == [0, 0], final_reports(folder / "last")
    assert metrics(cut) == metrics(whole)
    assert same_weights(cut, whole)
    print(
        "link restored, started again: exit codes 0 and 0; metrics and weights equal the undisturbed run's, bit for bit"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--launcher", choices=LAUNCHERS, default="torchrun")
    args = parser.parse_args()

    args.folder.mkdir(parents=True)
    scenario(args.folder, tiny.make_models(args.folder / "models"), make_shards(args.folder / "data"), args.launcher)
