"""`deepspeed --hostfile` over real ssh, between two namespaces of this machine.

`python -m tests.manual.ssh FOLDER` (as root; needs Debian's openssh-server and pdsh) starts an
sshd in each of two namespaces of network and processes, trains over both from the first with one
command, makes it end in each way there is, starts it again, and compares with a run that nothing
happened to. Keys and configuration lie in FOLDER; nothing of the machine's own ssh is touched.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests import tiny
from tests.distributed.namespaces import (
    ADDRESSES,
    GRACE_SECONDS,
    TIMEOUT_MINUTES,
    Node,
    Unavailable,
    cut_silently,
    ip,
    kill_all,
    restore_packets,
    same_weights,
    two_nodes,
)
from tests.training.fixtures import make_shards
from tests.training.launch import ROOT, SCRIPT, START_SECONDS, arguments, environment, metrics, until_lines

SSHD, PDSH, SSH = "/usr/sbin/sshd", "/usr/bin/pdsh", "/usr/bin/ssh"

SSHD_CONFIG = """\
ListenAddress {address}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
"""
SSH_CONFIG = """\
Host *
    IdentityFile {folder}/user
    StrictHostKeyChecking no
    UserKnownHostsFile {folder}/known_hosts
    LogLevel ERROR
    # Or pdsh waits for ever for a node that has gone without a word.
    ServerAliveInterval 5
    ServerAliveCountMax 3
"""


def prepare(folder: Path) -> None:
    """Keys, ssh's configuration, the hostfile, and what DeepSpeed exports to the nodes.

    Raises:
        Unavailable: a program is missing.
    """
    for program in (SSHD, PDSH, SSH):
        if shutil.which(program) is None:
            raise Unavailable(f"no {program}; apt-get install openssh-server pdsh")
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd's jail; the service makes it at boot
    folder.mkdir(parents=True)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "config").write_text(SSH_CONFIG.format(folder=folder))
    # DeepSpeed and pdsh call plain `ssh`, which takes its configuration from root's real home.
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {SSH} -F {folder}/config "$@"\n')
    (folder / "bin" / "ssh").chmod(0o755)
    (folder / "hosts").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))


@contextmanager
def sshd(nodes: tuple[Node, Node], folder: Path) -> Iterator[None]:
    """An sshd on each node, in a namespace of processes whose first one it is: there DeepSpeed's
    own `pkill -f` finds the node's processes only."""
    with ExitStack() as stack:
        for node in nodes:
            stack.callback(kill_all, node)
            config = folder / f"sshd-{node.rank}"
            config.write_text(SSHD_CONFIG.format(folder=folder, address=node.address))
            log = stack.enter_context((folder / f"sshd-{node.rank}.log").open("w"))
            stack.callback(
                subprocess.Popen(
                    [
                        "ip",
                        "netns",
                        "exec",
                        node.namespace,
                        "unshare",
                        "--pid",
                        "--fork",
                        "--mount-proc",
                        SSHD,
                        "-D",
                        "-e",
                        "-f",
                        str(config),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                ).wait
            )
            stack.callback(kill_all, node)
        for node in nodes:
            inside = over_ssh(nodes[0], node, folder, "readlink", "/proc/self/ns/pid")
            if inside == os.readlink("/proc/self/ns/pid"):
                raise Unavailable("a namespace of processes could not be made")
        yield


def over_ssh(source: Node, target: Node, folder: Path, *words: str) -> str:
    deadline = time.monotonic() + 10
    while True:
        done = subprocess.run(
            ["ip", "netns", "exec", source.namespace, str(folder / "bin" / "ssh"), target.address, *words],
            capture_output=True,
            text=True,
            timeout=20,
        )
        if done.returncode == 0:
            return done.stdout.strip()
        if time.monotonic() > deadline:
            raise Unavailable(f"ssh {target.address}: {done.stderr.strip()}")
        time.sleep(0.1)


@contextmanager
def launched(nodes: tuple[Node, Node], folder: Path, log: Path, train: list[str]) -> Iterator[subprocess.Popen]:
    """`deepspeed --hostfile` on the first node. Its environment does not travel, but for PYTHON…
    and what the file says that DeepSpeed calls .deepspeed_env."""
    variables = environment(
        PATH=f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        DS_ENV_FILE=str(folder / "deepspeed_env"),
    )
    exported = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": nodes[0].interface}
    (folder / "deepspeed_env").write_text("".join(f"{k}={v}\n" for k, v in exported.items()))
    with log.open("w") as out:
        process = subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                nodes[0].namespace,
                str(Path(sys.executable).with_name("deepspeed")),
                "--hostfile",
                str(folder / "hosts"),
                str(SCRIPT),
                *train,
            ],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=variables,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def rank_of(node: Node) -> int | None:
    """Process id of the node's rank, if it runs."""
    for pid in map(int, ip("netns", "pids", node.namespace).split()):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[2:3] == [str(SCRIPT).encode()] and f"RANK={node.rank}".encode() in variables:
            return pid
    return None


def gone(nodes: tuple[Node, Node], seconds: float) -> bool:
    """Whether no rank is left on any node within that time."""
    deadline = time.monotonic() + seconds
    while any(rank_of(node) for node in nodes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def sever(nodes: tuple[Node, Node], process: subprocess.Popen) -> None:
    cut_silently(nodes)


# name: (lines of metrics before it, what is done, exit codes that may come back)
Strike = Callable[[tuple[Node, Node], subprocess.Popen], None]
ENDS: dict[str, tuple[int, Strike, tuple[int, ...]]] = {
    "SIGTERM to the rank on node 1": (6, lambda nodes, _: os.kill(rank_of(nodes[1]), signal.SIGTERM), (3,)),
    "kill -9 of the rank on node 1": (14, lambda nodes, _: os.kill(rank_of(nodes[1]), signal.SIGKILL), (1, 247)),
    "kill -9 of the rank on node 0": (22, lambda nodes, _: os.kill(rank_of(nodes[0]), signal.SIGKILL), (1, 247)),
    "every packet dropped silently": (26, sever, (1, 255)),
    "SIGTERM to deepspeed itself": (34, lambda _, process: os.kill(process.pid, signal.SIGTERM), (1,)),
}


def scenario(folder: Path, models: Path, shards: Path) -> None:
    """The whole story, printed; an AssertionError or a TimeoutExpired where it goes wrong.

    Raises:
        Unavailable: see :func:`two_nodes` and :func:`prepare`.
    """
    settings = (
        f"training.timeout_minutes={TIMEOUT_MINUTES}",
        "stages.0.steps=20",
        "stages.1.steps=80",
        "training.validate_every=10",
        "training.checkpoint_every=5",
    )
    whole, ended, keys = folder / "whole", folder / "ended", folder / "ssh"
    prepare(keys)

    def start(run: Path, log: str, *more: str):
        return launched(nodes, keys, folder / log, arguments(models, shards, run, *settings, *more))

    with two_nodes() as nodes, sshd(nodes, keys):
        with start(whole, "whole.log") as process:
            until_lines(whole, 1, process)
            places = [rank_of(node) for node in nodes]
            assert all(places), f"no rank on a node: {places}"
            assert process.wait(START_SECONDS) == 0, (folder / "whole.log").read_text()[-3000:]
        print(f"undisturbed: exit code 0, one rank on each node, {len(metrics(whole))} lines of metrics")
        with start(folder / "bad", "bad.log", "training.global_batch=3") as process:
            assert process.wait(START_SECONDS) == 2
        print("bad input: exit code 2:\n" + said(folder / "bad.log"))
        for number, (what, (lines, strike, allowed)) in enumerate(ENDS.items()):
            with start(ended, f"end{number}.log") as process:
                until_lines(ended, lines, process)
                strike(nodes, process)
                began = time.monotonic()
                code = process.wait(TIMEOUT_MINUTES * 60 + GRACE_SECONDS)
                taken = time.monotonic() - began
                if strike is sever:
                    restore_packets(nodes)
                assert gone(nodes, GRACE_SECONDS), "ranks were left behind"
            print(
                f"{what}, after {len(metrics(ended))} lines: exit code {code} after {taken:.1f} s, "
                f"all ranks gone {time.monotonic() - began - taken:.1f} s later\n" + said(folder / f"end{number}.log")
            )
            newest = max((ended / "checkpoints").glob("[a-z]*-*"), key=lambda p: p.stat().st_mtime)
            print(f"  newest checkpoint: {newest.name}")
            assert code in allowed, code
        with start(ended, "last.log") as process:
            assert process.wait(START_SECONDS) == 0, (folder / "last.log").read_text()[-3000:]
    assert metrics(ended) == metrics(whole)
    assert same_weights(ended, whole)
    print("started again: exit code 0; metrics and weights equal the undisturbed run's, bit for bit")


def said(log: Path) -> str:
    """What the ranks said of their end, with pdsh's address before it."""
    return "\n".join(
        f"  {line}"
        for line in log.read_text().splitlines()
        if any(mark in line for mark in (": vlmds: rank", ": vlmds:   ", "stopped by", ": vlmds: training."))
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()

    args.folder = args.folder.absolute()
    args.folder.mkdir(parents=True)
    scenario(args.folder, tiny.make_models(args.folder / "models"), make_shards(args.folder / "data"))
