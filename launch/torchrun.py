"""torchrun that keeps the ranks' exit code: python launch/torchrun.py [torchrun's options] launch/train.py …

torchrun itself turns every failure into exit code 1, so that a scheduler cannot tell a run which was
stopped and saved its checkpoint (3) from bad input (2). SIGTERM and SIGUSR1 go on to the ranks of
this node, which finish their step and save; the exit code is then 3 if every one of them said 3.
"""

import os
import signal
import socket
import sys
from argparse import Namespace
from multiprocessing import active_children

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

STOPPED = 3
KEPT = (2, STOPPED)


def stop_ranks(signum: int, frame) -> None:
    """Pass the signal on, wait for the ranks, exit. There is no deadline here: whoever sent the
    signal has one, and a checkpoint may take minutes."""
    for again in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(again, signal.SIG_IGN)
    helpers = {child.pid for child in active_children()}
    ranks = [p for p in psutil.Process().children() if p.pid not in helpers]
    print(f"launch/torchrun.py: {signal.Signals(signum).name}: {len(ranks)} ranks finish their step "
          "and save", file=sys.stderr, flush=True)
    for rank in ranks:
        rank.send_signal(signum)
    codes = {rank.wait() for rank in ranks}
    sys.exit(STOPPED if codes == {STOPPED} else 0 if codes == {0} else 1)


def settle_addresses(args: Namespace) -> None:
    """With --rdzv-backend c10d: this node's address, and whether it hosts the rendezvous.

    torch takes both from the host's own name, which is of no use where that resolves to a loopback
    address: no node hosts the rendezvous, or ranks of other nodes look for rank 0 on their own. The
    route to the endpoint tells both, on every node with the same command. What was given stands.
    """
    if args.rdzv_backend != "c10d" or not args.rdzv_endpoint:
        return
    host, port = parse_rendezvous_endpoint(args.rdzv_endpoint, default_port=29400)
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return  # the name does not resolve yet, or there is no route: torch waits, and says so
    if own in ("::1", "0.0.0.0") or own.startswith("127."):
        return
    args.local_addr = args.local_addr or own
    if own == target[0] and "is_host" not in args.rdzv_conf:
        args.rdzv_conf = ",".join(filter(None, (args.rdzv_conf, "is_host=1")))


def main() -> int:
    # With --rdzv-backend c10d: a store of its own for every restart. In torchrun's shared one, gloo
    # finds the addresses of the ranks that are dead, and no restart ever connects (torch 2.13).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    signal.signal(signal.SIGTERM, stop_ranks)
    signal.signal(signal.SIGUSR1, stop_ranks)
    try:
        args = run.parse_args(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *sys.argv[1:]])
        settle_addresses(args)
        run.run(args)
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
        code = error.get_first_failure()[1].exitcode
        return code if code in KEPT else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
