"""The server of `vlmds serve`: a page that captions videos, and JSON endpoints."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from vlmds.serve.limits import Limits
from vlmds.serve.listening import address, check_installed, is_loopback, listen, run_server, trusted_hosts
from vlmds.serve.loaded import Models


def serve(
    runs: Sequence[Path],
    *,
    host: str = "127.0.0.1",
    port: int,
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
    check_installed("gradio", "serving")
    with listen(host, port) as listening:  # before minutes go into loading
        models = Models.load(runs, limits or Limits(), device=device, overrides=overrides)
        with TemporaryDirectory(prefix="vlmds-serve-") as folder:  # mode 0700
            _run(models, Path(folder), listening, host)


def _run(models: Models, folder: Path, listening: socket.socket, host: str) -> None:
    app = make_app(models, folder, host)
    port = listening.getsockname()[1]
    print(f"{', '.join(models.names)}: {address(host, port)} (Ctrl-C ends it)", flush=True)
    if not is_loopback(host):
        print(
            "WARNING: anyone who can reach this machine can use this server; it has no password",
            file=sys.stderr,
            flush=True,
        )
    run_server(app, listening)


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
    if is_loopback(host):
        app.add_middleware(TrustedHostMiddleware, www_redirect=False, allowed_hosts=trusted_hosts(host))
    app.add_middleware(PageLimit, most=models.limits.bytes + (1 << 20))
    add_api(app, models, folder)
    return add_page(app, models)
