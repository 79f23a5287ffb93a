"""`vlmds doctor`: is this machine, or this cluster, ready to train?

As a plain process it looks at one machine; as launch/doctor.py in the place of launch/train.py, under
any launcher, at all machines and at what lies between them. Each check says ok, warning or FAILED,
and the fix. None can hang: a local check runs in a thread that is left behind at its deadline, and
what ranks do together has the process group's timeout.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vlmds.console.text import counted
from vlmds.data.dataset import open_dataset
from vlmds.distributed.cores import cores_of_rank
from vlmds.distributed.ranks import gather, init_distributed, is_main
from vlmds.distributed.watchdog import doing
from vlmds.doctor.network import Measure, check_clocks, measure_links
from vlmds.doctor.node import (
    FAILED,
    OK,
    WARNING,
    Finding,
    Patient,
    check_accelerator,
    check_dataset,
    check_disk,
    check_limits,
    check_models,
    check_shared_memory,
    decode_rate,
)
from vlmds.errors import InputError
from vlmds.experiments.schema import Experiment
from vlmds.models.assemble import meta_models
from vlmds.models.trainable import freeze
from vlmds.planning.cards import Card, device_card
from vlmds.planning.propose import predicted_rate
from vlmds.runs.folder import git_commit, versions


def examine(experiment: Experiment, output: Path, *, seconds: float, samples: int, wanted: float | None) -> int:
    """All checks, printed by rank 0. Returns 0, or 2 if one FAILED, on every rank."""
    try:
        device = init_distributed(4 * seconds / 60, probing=True)
    except (RuntimeError, ValueError) as error:  # DistError is a RuntimeError
        _print(
            "ranks",
            Finding(
                FAILED,
                f"rank {os.environ.get('RANK')} cannot join the others at "
                f"{os.environ.get('MASTER_ADDR')}: {_first_line(error)}",
                "are all nodes started, the port open, and GLOO_SOCKET_IFNAME and "
                "NCCL_SOCKET_IFNAME set to the network between the nodes?",
            ),
        )
        return 2
    patient = Patient(experiment, output, seconds, samples, wanted, device)
    places = gather((socket.gethostname(), int(os.environ.get("LOCAL_RANK", 0))))
    for host, local_rank in places:
        if local_rank == 0:
            number = len(patient.names)
            patient.names.append(f"{host}#{number}" if host in patient.names else host)
        patient.nodes.append(len(patient.names) - 1)
    if is_main():
        print(
            f"{counted(len(places), 'rank')} on {counted(len(patient.names), 'node')}: {', '.join(patient.names)}",
            flush=True,
        )
    failed = False
    for name, check in (
        ("accelerator", _by_each_rank(check_accelerator)),
        ("versions", check_versions),
        ("limits", _by_leaders(check_limits)),
        ("memory", _by_leaders(check_shared_memory)),
        ("clock", lambda p: _judge_clocks(p, check_clocks(p.nodes))),
        ("network", check_links),
        ("output", _by_leaders(check_disk)),
        ("same output", check_same_output),
        ("models", _by_leaders(check_models)),
        ("dataset", _by_leaders(check_dataset)),
        ("decoding", check_decoding),
    ):
        doing(f"checking {name}")
        try:
            findings = check(patient)
        except RuntimeError as error:  # of a collective; what a check finds is no exception
            _print(
                name,
                Finding(
                    FAILED,
                    f"rank {os.environ['RANK']} has lost the others: {_first_line(error)}",
                    "check the node whose launcher ended first, and the link",
                ),
            )
            return 2
        for finding in findings:
            failed |= finding.level == FAILED
            if is_main():
                _print(name, finding)
    return 2 if failed else 0


def _by_each_rank(check: Callable[[Patient], list[Finding]], leaders_only: bool = False):
    """The check on every rank, within its time; equal findings become one line."""

    def run(patient: Patient) -> list[Finding]:
        mine = []
        if patient.leader or not leaders_only:
            mine = within(patient.seconds, lambda: check(patient))
        return _merge(gather(mine), patient)

    return run


def _by_leaders(check: Callable[[Patient], list[Finding]]):
    return _by_each_rank(check, leaders_only=True)


def _merge(found: list[list[Finding]], patient: Patient) -> list[Finding]:
    where: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(found):
        for finding in findings:
            nodes = where.setdefault(finding, [])
            if patient.nodes[rank] not in nodes:
                nodes.append(patient.nodes[rank])
    return [
        finding
        if len(nodes) == len(patient.names)
        else Finding(finding.level, f"{', '.join(patient.names[n] for n in nodes)}: {finding.text}", finding.fix)
        for finding, nodes in where.items()
    ]


def within(seconds: float, check: Callable[[], list[Finding]]) -> list[Finding]:
    """What the check finds; if it does not end in time or breaks, that is what is found."""
    result: list[Finding] = []

    def work() -> None:
        try:
            result.extend(check())
        except InputError as error:
            result.append(Finding(FAILED, str(error)))
        except Exception as error:  # whatever breaks a check is what it found
            result.append(Finding(FAILED, f"{type(error).__name__}: {_first_line(error)}"))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return [
            Finding(
                FAILED,
                f"no answer within {seconds:g} s",
                "a disk or device that does not answer; look there, or give more --seconds",
            )
        ]
    return result


def check_versions(patient: Patient) -> list[Finding]:
    """Of every package, and of this source; equal on all ranks."""
    mine = {**versions(), "commit": git_commit() or "none"}
    everyone = gather(mine)
    findings = []
    for name in sorted(set().union(*everyone)):
        found: dict[str, set[str]] = {}
        for rank, theirs in enumerate(everyone):
            node = patient.names[patient.nodes[rank]]
            found.setdefault(theirs.get(name, "missing"), set()).add(node)
        if len(found) > 1:
            text = "; ".join(f"{version} on {', '.join(sorted(nodes))}" for version, nodes in sorted(found.items()))
            findings.append(
                Finding(FAILED, f"{name}: {text}", "install the same everywhere: pip install -c constraints.txt")
            )
    text = ", ".join(f"{name} {version}" for name, version in mine.items())
    return findings or [Finding(OK, text)]


def check_links(patient: Patient) -> list[Finding]:
    """All-reduce within nodes, between nodes, and over all; wrong sums and slow links."""
    measures = measure_links(patient.nodes, patient.names, patient.device, patient.seconds)
    if not measures:
        return [Finding(OK, "one rank, nothing to connect")]
    findings = [judge_link(measure, measures) for measure in measures]
    interfaces = {name: os.environ[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name in os.environ}
    if len(patient.names) > 1 and not interfaces:
        findings.append(
            Finding(OK, "interfaces are left to the libraries (no GLOO_SOCKET_IFNAME, no NCCL_SOCKET_IFNAME)")
        )
    return findings


def judge_link(measure: Measure, measures: list[Measure]) -> Finding:
    if measure.problem:
        return Finding(
            FAILED,
            f"{measure.name}: {measure.problem}",
            "check the link, firewalls, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO prints more",
        )
    text = f"{measure.name}: {measure.gb_per_s:.2f} GB/s"
    best = max(m.gb_per_s for m in measures if m.kind == measure.kind)
    if measure.kind == "pair" and measure.gb_per_s < best / 2:
        return Finding(
            WARNING,
            f"{text}, another pair reaches {best:.2f}",
            "one of the two nodes has a slow link or uses another interface",
        )
    return Finding(OK, text)


def _judge_clocks(patient: Patient, offsets: list[float]) -> list[Finding]:
    if len(offsets) < 2:
        return []
    worst = max(range(len(offsets)), key=lambda node: abs(offsets[node]))
    text = f"clocks differ by up to {abs(offsets[worst]):.3f} s"
    if abs(offsets[worst]) > 1:
        return [
            Finding(
                WARNING,
                f"{text} ({patient.names[worst]} from {patient.names[0]}); training "
                "does not mind, log files and credentials do",
                "run chrony or ntpd",
            )
        ]
    return [Finding(OK, text)]


def check_same_output(patient: Patient) -> list[Finding]:
    """A file that rank 0 writes must be seen from every node."""
    token = patient.output / ".doctor-token.tmp"
    text = os.urandom(8).hex()
    if is_main():
        try:
            token.write_text(text)
        except OSError:
            pass  # the check of the disk reports it
    text = gather(text)[0]

    def look() -> list[Finding]:
        deadline = time.monotonic() + min(10.0, patient.seconds / 2)  # network caches take seconds
        while time.monotonic() < deadline:
            if token.is_file() and token.read_text() == text:
                return [Finding(OK, f"{patient.output.absolute()} is one folder")]
            time.sleep(0.1)
        return [
            Finding(
                FAILED,
                f"{patient.output.absolute()} is not the folder that {patient.names[0]} sees",
                "put --output on a file system that all nodes share",
            )
        ]

    findings = _by_leaders(lambda p: look())(patient)
    if is_main():
        token.unlink(missing_ok=True)
    return findings if len(patient.names) > 1 else [f for f in findings if f.level != OK]


def check_decoding(patient: Patient) -> list[Finding]:
    """Samples per second that the reader processes of all ranks give at once."""
    data = patient.experiment.data
    if data.path is None and data.blend is None:
        return []
    rate, problem = 0.0, None
    try:
        rate = decode_rate(patient)
    except Exception as error:  # the other ranks wait for what this one found
        problem = f"{type(error).__name__}: {_first_line(error)}"
    rates = gather((rate, problem))
    if problem := next((p for _, p in rates if p), None):
        return [Finding(FAILED, problem)]
    total = sum(r for r, _ in rates)
    readers = counted(min(data.num_workers, cores_of_rank()), "reader process", "reader processes")
    text = f"{total:,.1f} samples/s by {readers} a rank on {os.cpu_count()} cores a node"
    if patient.wanted is not None or patient.device.type != "cuda":
        return [judge_decoding(total, patient.wanted, text)]
    card = device_card(torch.cuda.get_device_name(patient.device))
    return [judge_decoding(total, card and len(rates) * step_rate(patient.experiment, card), text, guessed=True)]


def step_rate(experiment: Experiment, card: Card) -> float:
    """Samples a second that one GPU is predicted to train, in the stage that takes most."""
    model, stage = meta_models(experiment), experiment.stages[-1]
    freeze(model.captioner, stage)
    stored = open_dataset(experiment.data).store == "features"
    return predicted_rate(experiment, stage, model, card, 0, stored)


def judge_decoding(total: float, wanted: float | None, text: str, guessed: bool = False) -> Finding:
    """Samples per second that there are against those that training wants. guessed: from shapes."""
    if wanted is None:
        return Finding(OK, text)
    text = f"{text}, {wanted:.4g} {'predicted of the GPUs' if guessed else 'wanted'}"
    if total >= 1.2 * wanted:
        return Finding(OK, text)
    return Finding(
        WARNING if guessed or total >= wanted else FAILED,
        text,
        "pack with --store frames or features, or raise data.num_workers where cores are idle",
    )


def _print(name: str, finding: Finding) -> None:
    fix = f"; {finding.fix}" if finding.fix else ""
    print(f"{finding.level:<8} {name}: {finding.text}{fix}", flush=True)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
