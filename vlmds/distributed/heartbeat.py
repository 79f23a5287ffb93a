"""The heartbeat: ends the job within ``training.heartbeat_seconds`` of the loss of a node.

When a node fails without closing its connections, the other ranks keep waiting for their GPU, and the
collectives' timeout would end that only half an hour later. So every rank keeps an idle connection to
rank 0, which the kernels at both ends probe (TCP keepalive). An answer shows that the machine and the
link work, whatever its Python does: holding the interpreter's lock for long, waiting for a disk, SIGSTOP
or swapping are not taken for a loss. A process that makes no progress on a machine that answers is left
to ``training.timeout_minutes``.

A rank that cannot be reached tries to reconnect. The job ends if it has not come back within
``heartbeat_seconds`` and the rank that waits for it has made no progress in that time. A machine may
thus be paused, or a link be down, for almost ``heartbeat_seconds``. Rank 0 ends all others; if rank 0 is
lost, each rank notices that by itself. Time in which the observing process was itself stopped does not
count, and clocks of different machines are never compared. A thread ends the rank; it needs the
interpreter's lock, which PyTorch releases wherever it waits for a GPU or for other ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from dataclasses import dataclass

import torch.distributed as dist

from vlmds.console.progress import log_line
from vlmds.distributed.lost_ranks import reports_for_machine
from vlmds.distributed.watchdog import MOST_RANKS, end_job, idle_seconds

TICK = 1.0  # seconds between two checks
CONNECT_SECONDS = 2.0
LONGEST_LINE = 1024  # bytes
MOST_ROUNDS = 64  # of reading from the connections, between two checks


def start_heartbeat(seconds: float | None) -> None:
    """Watch the other ranks from now on. All ranks call it, once the process group exists.

    Args:
        seconds: from the last answer to the end of the job; None watches no rank.
    """
    if seconds is None or dist.get_world_size() == 1:
        return
    store = dist.PrefixStore("heartbeat", dist.distributed_c10d._get_default_store())
    side: Centre | Member
    if dist.get_rank() == 0:
        side = Centre(seconds, secrets.token_hex(16), dist.get_world_size())
        store.set("address", json.dumps([side.port, side.token, socket.gethostname()]))
    else:
        port, token, host = json.loads(store.get("address"))
        side = Member(dist.get_rank(), seconds, token, (os.environ["MASTER_ADDR"], port), host)
    threading.Thread(target=side.run, daemon=True).start()
    atexit.register(side.leave)
    # A reader process that outlives its rank must not keep the connection open.
    os.register_at_fork(after_in_child=side.forget)


@dataclass
class _Rank:
    """A rank that has connected; connection: None once it is lost. lost: seconds since then. silent: seconds
    without an answer before that."""

    host: str
    connection: socket.socket | None
    lost: float = 0.0
    silent: float = 0.0


class _Clock:
    """Seconds between calls, not counting time in which this process itself was stopped."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self) -> float:
        last, self._last = self._last, time.monotonic()
        return min(self._last - last, TICK + CONNECT_SECONDS + 1)


class Centre:
    """Rank 0's side, to which all other ranks connect."""

    def __init__(self, seconds: float, token: str, ranks: int):
        self.seconds, self.token = seconds, token
        both = socket.has_dualstack_ipv6()
        self._listener = socket.create_server(
            ("", 0), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=ranks
        )
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._ranks: dict[int, _Rank] = {}
        self._received: dict[socket.socket, bytes] = {}
        self._left = False

    def run(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        clock = _Clock()
        while not self._left:
            ready = self._selector.select(TICK)
            # Read from ranks that came back while this thread was stopped before checking. The limit is
            # for a connection that cannot be accepted as too many files are open: it is always ready.
            for _ in range(MOST_ROUNDS):
                for key, _ in ready:
                    assert isinstance(key.fileobj, socket.socket)
                    self._receive(key.fileobj)
                ready = self._selector.select(0)
                if not ready:
                    break
            self._check(clock())

    def leave(self) -> None:
        """This rank ends normally."""
        self._left = True
        self._send_all("bye")

    def forget(self) -> None:
        """Close the connections in a forked child."""
        for connection in [self._listener, *list(self._received)]:
            connection.close()

    def _receive(self, connection: socket.socket) -> None:
        if connection is self._listener:
            try:
                new, _ = connection.accept()
            except OSError:  # closed again, or too many open files in this process
                return
            new.setblocking(False)
            probe(new, self.seconds / 2)
            self._received[new] = b""
            self._selector.register(new, selectors.EVENT_READ)
            return
        try:
            data = connection.recv(LONGEST_LINE)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(connection, silence(error, self.seconds))
            return
        self._received[connection] += data
        *lines, rest = self._received[connection].split(b"\n")
        self._received[connection] = rest
        for line in lines:
            self._handle(connection, line.decode(errors="replace").split())
        if not data or len(rest) > LONGEST_LINE:
            self._lose(connection, 0.0)

    def _handle(self, connection: socket.socket, words: list[str]) -> None:
        if len(words) == 4 and words[:2] == ["hello", self.token]:
            self._ranks[int(words[2])] = _Rank(words[3], connection)
        elif words == ["bye"]:
            self._ranks = {n: r for n, r in self._ranks.items() if r.connection is not connection}

    def _lose(self, connection: socket.socket, silent: float) -> None:
        self._selector.unregister(connection)
        del self._received[connection]
        connection.close()
        for rank in self._ranks.values():
            if rank.connection is connection:
                rank.connection, rank.lost, rank.silent = None, 0.0, silent

    def _check(self, elapsed: float) -> None:
        lost = {number: rank for number, rank in self._ranks.items() if rank.connection is None}
        for rank in lost.values():
            rank.lost += elapsed
        longest = max((rank.lost for rank in lost.values()), default=0.0)
        if longest < self.seconds / 2 or idle_seconds() < self.seconds / 2:
            return
        problem = (
            "; ".join(
                describe(number, rank.host, rank.lost, rank.silent)
                for number, rank in sorted(lost.items())[:MOST_RANKS]
            )
            + " (training.heartbeat_seconds)"
        )
        self._send_all(f"end {problem}")
        end_job(problem)

    def _send_all(self, line: str) -> None:
        for connection in list(self._received):
            try:
                connection.send(f"{line}\n".encode())
            except OSError:  # this connection is lost, too
                pass


class Member:
    """The side of every rank except 0."""

    def __init__(self, rank: int, seconds: float, token: str, address: tuple[str, int], host: str):
        self._rank, self._seconds, self._token = rank, seconds, token
        self._address, self._host = address, host
        self._connection: socket.socket | None = None
        self._connected_once = self._left = False

    def run(self) -> None:
        lost, silent, clock = 0.0, 0.0, _Clock()
        while not self._left:
            if connection := self._connect():
                lost, silent = 0.0, self._listen(connection)
                clock()
            time.sleep(TICK)
            lost += clock()
            if lost >= self._seconds / 2:
                if not self._connected_once:
                    self._warn()
                    return
                if not self._left and idle_seconds() >= self._seconds / 2:
                    end_job(
                        f"{describe(0, self._host, lost, silent)} (training.heartbeat_seconds)",
                        report=reports_for_machine(),
                    )

    def leave(self) -> None:
        """This rank ends normally."""
        self._left = True
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.send(b"bye\n")

    def forget(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def _connect(self) -> socket.socket | None:
        hello = f"hello {self._token} {self._rank} {socket.gethostname()}\n"
        try:
            connection = socket.create_connection(self._address, CONNECT_SECONDS)
            connection.settimeout(None)
            probe(connection, self._seconds / 2)
            connection.sendall(hello.encode())
        except OSError:
            return None
        self._connection, self._connected_once = connection, True
        return connection

    def _listen(self, connection: socket.socket) -> float:
        """Read until the connection is lost. Returns the seconds without an answer before that."""
        received = b""
        try:
            with connection:
                while data := connection.recv(LONGEST_LINE):
                    *lines, received = (received + data).split(b"\n")
                    for line in lines:
                        word, _, problem = line.decode().partition(" ")
                        if word == "end":
                            end_job(problem, report=reports_for_machine())
                        self._left = self._left or word == "bye"
        except OSError as error:
            return silence(error, self._seconds)
        return 0.0

    def _warn(self) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            host, port = self._address
            log_line(
                f"vlmds: rank {self._rank}: WARNING: port {port} of {host} cannot be "
                "reached; the loss of a node is noticed only after training.timeout_minutes",
                sys.stderr,
            )


def probe(connection: socket.socket, seconds: float) -> None:
    """Let the kernel probe the other machine, and end the connection after ``seconds`` without an answer."""
    every = max(1, round(seconds / 6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", every), ("TCP_KEEPINTVL", every), ("TCP_USER_TIMEOUT", int(seconds * 1000))):
        if hasattr(socket, name):  # on Linux
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def silence(error: OSError, seconds: float) -> float:
    """Seconds without an answer before a connection ended with this error. A process that ends closes or
    resets its connection; only the loss of a machine or a link is left to the probes."""
    return 0.0 if error.errno in (errno.ECONNRESET, errno.EPIPE) else seconds / 2


def describe(number: int, host: str, lost: float, silent: float) -> str:
    if silent:
        return f"rank {number} on {host} has not answered for {lost + silent:.0f} s"
    return f"rank {number} on {host} ended {lost:.0f} s ago without reporting an error"
