"""The server of `vlmds serve`: a page that captions videos, and JSON endpoints."""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from vlmds.console.text import install_hint
from vlmds.errors import InputError
from vlmds.serve.limits import Limits
from vlmds.serve.loaded import Models


def serve(
    runs: Sequence[Path],
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    limits: Limits | None = None,
    device: str | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Serve until a signal ends it.

    Args:
        port: 0 is a free one.

    Raises:
        InputError: the serve extra is missing, the address cannot be used, or a run cannot be loaded.
    """
    if importlib.util.find_spec("gradio") is None:
        raise InputError(f"serving needs more packages: {install_hint('serve')}")
    with _listen(host, port) as listening:  # before minutes go into loading
        models = Models.load(runs, limits or Limits(), device=device, overrides=overrides)
        with TemporaryDirectory(prefix="vlmds-serve-") as folder:  # mode 0700
            _run(models, Path(folder), listening, host)


def _run(models: Models, folder: Path, listening: socket.socket, host: str) -> None:
    import uvicorn

    app = make_app(models, folder, host)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
    port = listening.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    print(f"{', '.join(models.names)}: http://{shown}:{port} (Ctrl-C ends it)", flush=True)
    if not _is_loopback(host):
        print(
            "WARNING: anyone who can reach this machine can use this server; it has no password",
            file=sys.stderr,
            flush=True,
        )
    # After its own shutdown uvicorn sends itself the signal again; this leaves time to clean up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])


def make_app(models: Models, folder: Path, host: str = "127.0.0.1"):
    """The FastAPI application. folder: private, for uploads; it deletes old ones, and the caller
    deletes the folder."""
    # Read by Gradio when it is imported, or when the page is made.
    os.environ.update(
        GRADIO_ANALYTICS_ENABLED="False",
        GRADIO_TEMP_DIR=str(folder),
        GRADIO_SHARE="False",
        HF_HUB_DISABLE_TELEMETRY="1",
    )
    from fastapi import FastAPI
    from starlette.middleware.body_limit import RequestBodyLimitMiddleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from vlmds.serve.api import add_api
    from vlmds.serve.page import add_page

    class PageLimit:
        """A size limit for the page's requests; Gradio limits only its uploads."""

        def __init__(self, app, most: int):
            self.app, self.bounded = app, RequestBodyLimitMiddleware(app, max_body_size=most)

        async def __call__(self, scope, receive, send) -> None:
            page = scope["type"] == "http" and scope["path"].startswith("/gradio_api/")
            await (self.bounded if page else self.app)(scope, receive, send)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if _is_loopback(host):
        # Against DNS rebinding: a web page whose name resolves to this machine could read the answers.
        app.add_middleware(
            TrustedHostMiddleware, www_redirect=False, allowed_hosts=["localhost", "127.0.0.1", "::1", "[::1]", host]
        )
    app.add_middleware(PageLimit, most=models.limits.bytes + (1 << 20))
    add_api(app, models, folder)
    return add_page(app, models)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"--host {host} --port {port}: cannot listen there: {why}") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
