"""launch/slurm.sbatch on a real Slurm: the controller and two nodes' daemons, all on this machine.

`python -m tests.manual.slurm FOLDER` (as root; needs Debian's slurm-wlm and munge) submits a
run, asks it to stop as Slurm does before the time limit, kills a rank of it, lets it go back into
the queue, and compares with an uninterrupted run. Configuration, keys, state and logs lie
in FOLDER; a Slurm of the machine's own is not touched.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests import tiny
from tests.distributed.namespaces import Unavailable, same_weights
from tests.training.fixtures import make_shards
from tests.training.launch import ROOT, SCRIPT, arguments, environment, free_port, metrics

NODES = ("node0", "node1")
SECONDS = 300  # until a job ends; one that went back into the queue waits there for two minutes

CONF = """\
ClusterName=vlmds
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def prepare(folder: Path) -> None:
    """The key of munge and Slurm's configuration. Raises Unavailable: a program is missing."""
    for program in ("munged", "slurmctld", "slurmd", "sbatch"):
        if shutil.which(program) is None:
            raise Unavailable(f"no {program}; apt-get install slurm-wlm munge")
    (folder / "state").mkdir(parents=True)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={free_port()} "
        f"CPUs=1 State=UNKNOWN"
        for name in NODES
    )
    (folder / "slurm.conf").write_text(
        CONF.format(host=socket.gethostname(), port=free_port(), folder=folder, nodes=nodes)
    )


@contextmanager
def slurm(folder: Path) -> Iterator[None]:
    """The daemons, until the nodes are idle and at most as long as the context. Raises Unavailable:
    they do not start."""
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    os.chmod(folder, 0o755)
    with ExitStack() as stack:
        for number, words in enumerate(
            (
                [
                    "munged",
                    "--foreground",
                    "--force",
                    f"--key-file={folder}/munge.key",
                    f"--socket={folder}/munge.socket",
                    f"--pid-file={folder}/munge.pid",
                    f"--seed-file={folder}/munge.seed",
                ],
                ["slurmctld", "-D", "-c"],
                *(["slurmd", "-D", "-N", name] for name in NODES),
            )
        ):
            log = stack.enter_context((folder / f"{number}-{words[0]}.out").open("w"))
            daemon = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            stack.callback(daemon.wait, 30)
            stack.callback(daemon.terminate)
            time.sleep(1)  # each wants the one before to answer
        deadline = time.monotonic() + 60
        while (state := ask("sinfo", "-h", "-o", "%t %D")) != "idle 2":
            if time.monotonic() > deadline:
                raise Unavailable(f"the nodes do not become idle: {state}")
            time.sleep(0.5)
        try:
            yield
        finally:
            ask("scancel", "--user=root")
            while ask("squeue", "-h"):  # a job ends thirty seconds after it is asked to, at most
                time.sleep(0.5)


def ask(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    return (done.stdout + done.stderr).strip()


def submit(log: Path, words: list[str]) -> str:
    """The number of a job of launch/slurm.sbatch, with a rank on each node."""
    variables = environment(
        PYTHON=sys.executable, RANKS_PER_NODE="1", GLOO_SOCKET_IFNAME="lo", SLURM_CONF=os.environ["SLURM_CONF"]
    )
    done = subprocess.run(
        [
            "sbatch",
            "--parsable",
            "--gpus-per-node=0",
            "--cpus-per-task=1",
            f"--output={log}",
            str(ROOT / "launch" / "slurm.sbatch"),
            *words,
        ],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode:
        raise Unavailable(f"sbatch: {done.stderr.strip()}")
    return done.stdout.strip()


def facts(job: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in ask("scontrol", "show", "job", job).split() if "=" in word)


def wait_for(job: str, *states: str) -> dict[str, str]:
    """The job's facts as soon as it is in one of these states."""
    deadline = time.monotonic() + SECONDS
    while (found := facts(job)).get("JobState") not in states:
        if time.monotonic() > deadline:
            raise TimeoutError(f"job {job} is {found.get('JobState')}, not {' or '.join(states)}")
        time.sleep(0.2)
    return found


def until_lines(run: Path, lines: int, job: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < lines:
        if time.monotonic() > deadline:
            raise TimeoutError(f"job {job}: {facts(job).get('JobState')}, no {lines} lines of metrics")
        time.sleep(0.05)


def ranks() -> list[int]:
    """Process ids of the training's ranks."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"launch/train.py" in words[1:4] or str(SCRIPT).encode() in words[1:4]:
            found.append(int(pid))
    return found


def scenario(folder: Path, models: Path, shards: Path) -> None:
    """The whole story, printed; an AssertionError or a TimeoutError where it goes wrong."""
    settings = (
        "training.timeout_minutes=0.5",
        "stages.0.steps=20",
        "stages.1.steps=80",
        "training.validate_every=10",
        "training.checkpoint_every=5",
    )
    whole, ended = folder / "whole", folder / "ended"
    prepare(folder / "slurm")
    with slurm(folder / "slurm"):
        job = submit(folder / "whole.log", arguments(models, shards, whole, *settings))
        found = wait_for(job, "COMPLETED", "FAILED")
        assert found["JobState"] == "COMPLETED", (folder / "whole.log").read_text()[-3000:]
        print(f"undisturbed: {found['JobState']}, ranks on {found['NodeList']}, {len(metrics(whole))} lines of metrics")
        job = submit(folder / "bad.log", arguments(models, shards, folder / "bad", "training.global_batch=3"))
        found = wait_for(job, "COMPLETED", "FAILED")
        assert (found["ExitCode"], found["Restarts"]) == ("2:0", "0"), found
        print(f"bad input: {found['JobState']}, exit code {found['ExitCode']}, not started again")

        job = submit(folder / "ended.log", arguments(models, shards, ended, *settings))
        until_lines(ended, 6, job)
        ask("scancel", "--signal=USR1", "--batch", job)
        wait_for(job, "PENDING", "REQUEUED")
        print(f"USR1, as before the time limit, after {len(metrics(ended))} lines: back in the queue")
        until_lines(ended, len(metrics(ended)) + 8, job)
        os.kill(ranks()[0], signal.SIGKILL)
        print(f"kill -9 of a rank after {len(metrics(ended))} lines: torchrun restarts both nodes'")
        found = wait_for(job, "COMPLETED", "FAILED")
        assert found["JobState"] == "COMPLETED", (folder / "ended.log").read_text()[-3000:]
    assert found["Restarts"] == "1", found
    assert metrics(ended) == metrics(whole)
    assert same_weights(ended, whole)
    print("COMPLETED after one requeue; metrics and weights equal the undisturbed run's, bit for bit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()

    args.folder = args.folder.absolute()
    if args.inside:
        names = Path("/etc/hosts").read_text() + f"127.0.0.1 {' '.join(NODES)}\n"
        (args.folder / "hosts").write_text(names)
        subprocess.run(["mount", "--bind", str(args.folder / "hosts"), "/etc/hosts"], check=True)
    else:  # the nodes' names are for this program alone
        args.folder.mkdir(parents=True)
        os.execvp(
            "unshare", ["unshare", "--mount", sys.executable, "-m", "tests.manual.slurm", str(args.folder), "--inside"]
        )
    scenario(args.folder, tiny.make_models(args.folder / "models"), make_shards(args.folder / "data"))
