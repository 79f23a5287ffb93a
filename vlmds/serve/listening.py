"""The address on which a server listens. Nothing heavy is imported."""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import signal
import socket
from typing import Any

from vlmds.console.text import install_hint
from vlmds.errors import InputError


def check_installed(package: str, what: str) -> None:
    """Raise InputError unless the package is installed, which the extra serve installs. what: that needs it."""
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{what} needs more packages: {install_hint('serve')}")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. port: 0 is a free one. Raises InputError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"--host {host} --port {port}: cannot listen there: {why}") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def trusted_hosts(host: str) -> list[str]:
    """Host names in requests to a loopback address. Others are refused against DNS rebinding: a web page whose name
    resolves to this machine could read the answers."""
    return ["localhost", "127.0.0.1", "::1", "[::1]", host]


def address(host: str, port: int) -> str:
    """The URL of a server."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def run_server(app: Any, listening: socket.socket) -> None:
    """Serve an ASGI application until a signal ends it. Requests are not logged."""
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
    # After its own shutdown uvicorn sends itself the signal again; this leaves time to clean up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])
