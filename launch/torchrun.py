"""torchrun that returns the ranks' exit code: python launch/torchrun.py [torchrun's options] launch/train.py …

torchrun itself turns every failure into exit code 1, and a scheduler cannot distinguish a run that
was stopped with a saved checkpoint (3) from bad input (2). SIGTERM and SIGUSR1 are forwarded to the
ranks of this node, which finish their step and save; the exit code is then 3 if all ranks returned 3.
"""

import os
import signal
import socket
import sys
from argparse import Namespace
from ipaddress import ip_address
from multiprocessing import active_children

import psutil
from torch.distributed import run
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher import api

STOPPED = 3
KEPT = (2, STOPPED)


class Agent(LocalElasticAgent):
    """Does not restart ranks that were stopped or had bad input: a restart would end the same way.

    The first rank that failed decides. torch then ends the others of this node itself, and lists their
    signals (-15, of a rank that is still importing) among the failures.
    """

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.failures:
            first = min(result.failures.values(), key=lambda failure: failure.timestamp)
            if first.exitcode in KEPT:
                self._remaining_restarts = 0
        return result


def stop_ranks(signum: int, frame) -> None:
    """Forward the signal, wait for the ranks, exit. There is no deadline here: the sender of the signal
    has one, and a checkpoint may take minutes."""
    for again in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(again, signal.SIG_IGN)
    helpers = {child.pid for child in active_children()}
    ranks = [p for p in psutil.Process().children() if p.pid not in helpers]
    print(
        f"launch/torchrun.py: {signal.Signals(signum).name}: {len(ranks)} ranks finish their step and save",
        file=sys.stderr,
        flush=True,
    )
    for rank in ranks:
        rank.send_signal(signum)
    codes = {rank.wait() for rank in ranks}
    sys.exit(STOPPED if codes == {STOPPED} else 0 if codes == {0} else 1)


def settle_rendezvous(args: Namespace) -> None:
    """Set options of --rdzv-backend c10d that torch (2.13) guesses wrongly; given options are kept.

    This node's address, and whether it hosts the rendezvous, follow from the route to the endpoint.
    torch uses the host name instead: if that resolves to a loopback address, no node hosts the
    rendezvous, or ranks of other nodes search for rank 0 on themselves.

    No node is dropped because of old heartbeats. They are wall-clock times of another machine: torch
    would treat a node whose clock is 15 s off as dead, and train without it, whatever --nnodes says.
    """
    if args.rdzv_backend != "c10d" or not args.rdzv_endpoint:
        return
    configured = args.rdzv_conf.split(",") if args.rdzv_conf else []
    fewest, most = run.parse_min_max_nnodes(args.nnodes)
    if fewest == most and "keep_alive_max_attempt" not in args.rdzv_conf:
        configured.append(f"keep_alive_max_attempt={10**8}")  # of 5 s each: years
    own, target = route(args.rdzv_endpoint)
    if own is not None and not ip_address(own).is_loopback:
        args.local_addr = args.local_addr or own
        if own == target and "is_host" not in args.rdzv_conf:
            configured.append("is_host=1")
    args.rdzv_conf = ",".join(configured)


def route(endpoint: str) -> tuple[str | None, str | None]:
    """(this node's address on the route to the endpoint, the endpoint's address); None if the name does
    not resolve or there is no route: torch then waits for it, and logs this."""
    host, port = parse_rendezvous_endpoint(endpoint, default_port=29400)
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # for a datagram socket this sends nothing
            return probe.getsockname()[0], target[0]
    except OSError:
        return None, None


def main() -> int:
    # With --rdzv-backend c10d: a new store for every restart. In torchrun's shared store, gloo finds the
    # addresses of dead ranks, and no restart ever connects (torch 2.13).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    signal.signal(signal.SIGTERM, stop_ranks)
    signal.signal(signal.SIGUSR1, stop_ranks)
    try:
        args = run.parse_args(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *sys.argv[1:]])
        settle_rendezvous(args)
        api.LocalElasticAgent = Agent  # torchrun has no option for it
        run.run(args)
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
        code = error.get_first_failure()[1].exitcode
        return code if code in KEPT else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
