"""`vlmds doctor`: checks of whether this machine or cluster is ready to train.

A plain process checks one machine. launch/doctor.py, started by any launcher like launch/train.py, checks
all machines and the links between them. Each check prints ok, warning or FAILED, and the fix. No check can
hang: a local check runs in a thread with a deadline, and collectives have the process group's timeout.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vlmds.console.text import counted
from vlmds.data.dataset import Dataset, open_given, stages_with
from vlmds.distributed.cores import cores_of_rank
from vlmds.distributed.deadline import finishes_within
from vlmds.distributed.ranks import gather, init_distributed, is_main
from vlmds.distributed.watchdog import doing
from vlmds.doctor.network import Measure, check_clocks, measure_links
from vlmds.doctor.node import (
    FAILED,
    OK,
    WARNING,
    CheckContext,
    Finding,
    check_accelerator,
    check_dataset,
    check_disk,
    check_limits,
    check_models,
    check_shared_memory,
    check_start,
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
    """Run all checks; rank 0 prints the results. Returns 0, or 2 if a check FAILED, on every rank."""
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
    context = CheckContext(experiment, output, seconds, samples, wanted, device)
    places = gather((socket.gethostname(), int(os.environ.get("LOCAL_RANK", 0))))
    for host, local_rank in places:
        if local_rank == 0:
            number = len(context.names)
            context.names.append(f"{host}#{number}" if host in context.names else host)
        context.nodes.append(len(context.names) - 1)
    if is_main():
        print(
            f"{counted(len(places), 'rank')} on {counted(len(context.names), 'node')}: {', '.join(context.names)}",
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
        ("projector", _by_leaders(lambda p: check_start(p) if is_main() else [])),  # it reads the source
        ("dataset", _by_leaders(check_dataset)),
        ("decoding", check_decoding),
    ):
        doing(f"checking {name}")
        try:
            findings = check(context)
        except RuntimeError as error:  # of a collective; checks raise none
            _print(
                name,
                Finding(
                    FAILED,
                    f"rank {os.environ['RANK']} lost the connection to the others: {_first_line(error)}",
                    "check the node whose launcher ended first, and the link",
                ),
            )
            return 2
        for finding in findings:
            failed |= finding.level == FAILED
            if is_main():
                _print(name, finding)
    return 2 if failed else 0


def _by_each_rank(check: Callable[[CheckContext], list[Finding]], leaders_only: bool = False):
    """The check on every rank, within the time limit; equal findings become one line."""

    def run(context: CheckContext) -> list[Finding]:
        mine = []
        if context.leader or not leaders_only:
            mine = findings_within(context.seconds, lambda: check(context))
        return _merge(gather(mine), context)

    return run


def _by_leaders(check: Callable[[CheckContext], list[Finding]]):
    return _by_each_rank(check, leaders_only=True)


def _merge(found: list[list[Finding]], context: CheckContext) -> list[Finding]:
    """Each different finding once, with the names of its nodes unless it is of all."""
    where: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(found):
        for finding in findings:
            nodes = where.setdefault(finding, [])
            if context.nodes[rank] not in nodes:
                nodes.append(context.nodes[rank])
    return [
        finding
        if len(nodes) == len(context.names)
        else Finding(finding.level, f"{', '.join(context.names[n] for n in nodes)}: {finding.text}", finding.fix)
        for finding, nodes in where.items()
    ]


def findings_within(seconds: float, check: Callable[[], list[Finding]]) -> list[Finding]:
    """The findings of the check, or one FAILED finding if it raises or does not end in time."""
    result: list[Finding] = []

    def work() -> None:
        try:
            result.extend(check())
        except InputError as error:
            result.append(Finding(FAILED, str(error)))
        except Exception as error:  # an error of any kind is the finding
            result.append(Finding(FAILED, f"{type(error).__name__}: {_first_line(error)}"))

    if finishes_within(seconds, work):
        return result
    return [
        Finding(
            FAILED,
            f"no answer within {seconds:g} s",
            "check whether a disk or device does not answer, or give more --seconds",
        )
    ]


def check_versions(context: CheckContext) -> list[Finding]:
    """The versions of all packages and of this source are equal on all ranks."""
    mine = {**versions(), "commit": git_commit() or "none"}
    everyone = gather(mine)
    findings = []
    for name in sorted(set().union(*everyone)):
        found: dict[str, set[str]] = {}
        for rank, theirs in enumerate(everyone):
            node = context.names[context.nodes[rank]]
            found.setdefault(theirs.get(name, "missing"), set()).add(node)
        if len(found) > 1:
            text = "; ".join(f"{version} on {', '.join(sorted(nodes))}" for version, nodes in sorted(found.items()))
            findings.append(
                Finding(
                    FAILED, f"{name}: {text}", "install the same version everywhere: pip install -c constraints.txt"
                )
            )
    text = ", ".join(f"{name} {version}" for name, version in mine.items())
    return findings or [Finding(OK, text)]


def check_links(context: CheckContext) -> list[Finding]:
    """All-reduce within nodes, between nodes and over all ranks: errors, wrong sums, slow links."""
    measures = measure_links(context.nodes, context.names, context.device, context.seconds)
    if not measures:
        return [Finding(OK, "one rank, no links to check")]
    findings = [judge_link(measure, measures) for measure in measures]
    interfaces = {name: os.environ[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name in os.environ}
    if len(context.names) > 1 and not interfaces:
        findings.append(
            Finding(OK, "network interfaces are chosen by the libraries (no GLOO_SOCKET_IFNAME, no NCCL_SOCKET_IFNAME)")
        )
    return findings


def judge_link(measure: Measure, measures: list[Measure]) -> Finding:
    """The finding of one link, compared with the others of its kind."""
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


def _judge_clocks(context: CheckContext, offsets: list[float]) -> list[Finding]:
    if len(offsets) < 2:
        return []
    worst = max(range(len(offsets)), key=lambda node: abs(offsets[node]))
    text = f"clocks differ by up to {abs(offsets[worst]):.3f} s"
    if abs(offsets[worst]) > 1:
        return [
            Finding(
                WARNING,
                f"{text} ({context.names[worst]} from {context.names[0]}); this does "
                "not affect training, but log times and credentials",
                "run chrony or ntpd",
            )
        ]
    return [Finding(OK, text)]


def check_same_output(context: CheckContext) -> list[Finding]:
    """A file that rank 0 writes to --output is visible from every node."""
    token = context.output / ".doctor-token.tmp"
    text = os.urandom(8).hex()
    if is_main():
        try:
            token.write_text(text)
        except OSError:
            pass  # check_disk reports it
    text = gather(text)[0]

    def find_token() -> list[Finding]:
        deadline = time.monotonic() + min(10.0, context.seconds / 2)  # caches of network file systems take seconds
        while time.monotonic() < deadline:
            if token.is_file() and token.read_text() == text:
                return [Finding(OK, f"{context.output.absolute()} is the same folder on all nodes")]
            time.sleep(0.1)
        return [
            Finding(
                FAILED,
                f"{context.output.absolute()} is not the folder that {context.names[0]} sees",
                "put --output on a file system that all nodes share",
            )
        ]

    findings = _by_leaders(lambda _: find_token())(context)
    if is_main():
        token.unlink(missing_ok=True)
    return findings if len(context.names) > 1 else [f for f in findings if f.level != OK]


def check_decoding(context: CheckContext) -> list[Finding]:
    """Samples per second that the reader processes of all ranks decode at the same time."""
    datasets, problem = [], None
    try:
        datasets = open_given(context.experiment)
    except Exception as error:  # the other ranks wait for this one's result
        problem = f"{type(error).__name__}: {_first_line(error)}"
    if problem := next(filter(None, gather(problem)), None):
        return [Finding(FAILED, problem)]
    found = stages_with(datasets)
    return [_check_rate(context, dataset, numbers[-1]) for dataset, numbers in found.items() if dataset]


def _check_rate(context: CheckContext, dataset: Dataset, number: int) -> Finding:
    """The rate of the data of stage ``number``."""
    rate, problem = 0.0, None
    try:
        rate = decode_rate(context, dataset)
    except Exception as error:  # the other ranks wait for this one's result
        problem = f"{type(error).__name__}: {_first_line(error)}"
    rates = gather((rate, problem))
    if problem := next((p for _, p in rates if p), None):
        return Finding(FAILED, problem)
    total = sum(r for r, _ in rates)
    workers = context.experiment.data.num_workers
    readers = counted(min(workers, cores_of_rank()), "reader process", "reader processes")
    own = f"{dataset.key}: " if dataset.key != "data" else ""
    text = f"{own}{total:,.1f} samples/s by {readers} a rank on {os.cpu_count()} cores a node"
    if context.wanted is not None or context.device.type != "cuda":
        return judge_decoding(total, context.wanted, text)
    card = device_card(torch.cuda.get_device_name(context.device))
    stored = dataset.store == "features"
    predicted = len(rates) * step_rate(context.experiment, number, stored, card) if card else None
    return judge_decoding(total, predicted, text, predicted=True)


def step_rate(experiment: Experiment, number: int, stored: bool, card: Card) -> float:
    """Predicted samples per second of one GPU in stage ``number``. stored: the data holds CLIP's features."""
    model, stage = meta_models(experiment), experiment.stages[number]
    freeze(model.captioner, stage)
    return predicted_rate(experiment, model, card, 0, stored)


def judge_decoding(total: float, wanted: float | None, text: str, predicted: bool = False) -> Finding:
    """Compare decoded samples per second with those that training needs.

    Args:
        wanted: None if unknown.
        predicted: ``wanted`` is a prediction, so a lower rate is a warning only.
    """
    if wanted is None:
        return Finding(OK, text)
    text = f"{text}, {wanted:.4g} {'predicted for the GPUs' if predicted else 'wanted'}"
    if total >= 1.2 * wanted:
        return Finding(OK, text)
    return Finding(
        WARNING if predicted or total >= wanted else FAILED,
        text,
        "pack with --store frames or features, or raise data.num_workers if cores are idle",
    )


def _print(name: str, finding: Finding) -> None:
    fix = f"; {finding.fix}" if finding.fix else ""
    print(f"{finding.level:<8} {name}: {finding.text}{fix}", flush=True)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
