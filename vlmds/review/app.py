"""The server of `vlmds review`: the page, its requests (JSON), and the clips (byte ranges)."""

from __future__ import annotations

import re
import secrets
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qsl, urlencode

from pydantic import BaseModel, Field, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

from vlmds.errors import InputError, SampleError
from vlmds.evaluation.reviews import CHOICES, Choice, Pair, SideMarks, reviewer_name
from vlmds.review.folder import Opened
from vlmds.review.page import SCRIPT, STYLE, page_html
from vlmds.review.sessions import Sessions
from vlmds.serve.korean import in_korean
from vlmds.serve.listening import address, is_loopback, listen, run_server, trusted_hosts

MOST_BYTES = 100_000
"""Of a request."""
HEADERS = {
    # Nothing from elsewhere, and nothing to elsewhere: also no referrer with the address.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class _Corrected(BaseModel):
    text: str = Field(min_length=1, max_length=8000)
    side: str = Field(pattern="^(left|right)$")


class _Request(BaseModel):
    """The body of a request. Those other than "answer" have only the first two."""

    reviewer: str
    pair: str = ""
    choice: Choice = CHOICES[0]
    marks: SideMarks = SideMarks()
    corrected: _Corrected | None = None
    seconds: float | None = Field(default=None, ge=0, le=86400)


def serve_reviews(opened: Opened, *, host: str = "127.0.0.1", port: int) -> None:
    """Serve until a signal ends it.

    Raises:
        InputError: the address cannot be used.
    """
    with listen(host, port) as listening:
        sessions = Sessions(opened)
        for line in sessions.warnings:
            print(f"WARNING: {line}", file=sys.stderr, flush=True)
        token = None if is_loopback(host) else secrets.token_urlsafe(24)
        print(_where(host, listening, token), flush=True)
        run_server(make_app(sessions, host, token), listening)


def _where(host: str, listening: socket.socket, token: str | None) -> str:
    """The line for the user."""
    shown = socket.gethostname() if host in ("0.0.0.0", "::") else host
    url = address(shown, listening.getsockname()[1])
    if token is None:
        return f"reviews: {url} (Ctrl-C ends it)"
    return f"reviews: {url}/?token={token} (for each reviewer; whoever has this address can answer. Ctrl-C ends it)"


def make_app(sessions: Sessions, host: str = "127.0.0.1", token: str | None = None) -> Starlette:
    """The application. token: requests must have it, in the address of the first one and then in a cookie."""
    handlers = _Handlers(sessions)
    routes = [
        Route("/", handlers.page),
        Route("/page.js", lambda request: Response(SCRIPT, media_type="text/javascript")),
        Route("/page.css", lambda request: Response(STYLE, media_type="text/css")),
        *(Route(f"/api/{name}", handlers.asked(name), methods=["POST"]) for name in handlers.requests),
        Route("/clip/{pair}", handlers.clip),
        Route("/clip/{pair}/encoded", handlers.encoded),
        Route("/clip/{pair}/{number:int}.jpg", handlers.frame),
    ]
    middleware = [Middleware(_Guard, token=token)]
    if is_loopback(host):
        middleware.insert(0, Middleware(TrustedHostMiddleware, www_redirect=False, allowed_hosts=trusted_hosts(host)))
    return Starlette(routes=routes, middleware=middleware)


class _Guard:
    """Headers of every response, and the token of every request."""

    def __init__(self, app: Any, token: str | None):
        self.app, self.token = app, token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message["headers"]}
                message["headers"] += [
                    (name.lower().encode(), value.encode())
                    for name, value in HEADERS.items()
                    if name.lower().encode() not in given
                ]
            await send(message)

        refusal = self._refusal(Request(scope))
        await (refusal or self.app)(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> Response | None:
        """The answer to a request without the token, or the redirect that puts it into a cookie."""
        if self.token is None:
            return None
        cookie = f"vlmds-review-{request.url.port or 80}"  # cookies are shared by the ports of a host
        if secrets.compare_digest(request.cookies.get(cookie, "").encode(), self.token.encode()):
            return None
        if not secrets.compare_digest(request.query_params.get("token", "").encode(), self.token.encode()):
            return PlainTextResponse(
                "Open the address that vlmds review printed, with its token.\n"
                "vlmds review가 출력한, 토큰이 포함된 주소로 접속하세요.\n",
                status_code=403,
            )
        rest = urlencode([(name, value) for name, value in parse_qsl(request.url.query) if name != "token"])
        answer = RedirectResponse(request.url.path + (f"?{rest}" if rest else ""), status_code=303)
        answer.set_cookie(cookie, self.token, httponly=True, samesite="strict")
        return answer


class _Handlers:
    """The handlers of requests; those of JSON run in threads, as they wait for the disk."""

    def __init__(self, sessions: Sessions):
        self.sessions = sessions
        self.requests: dict[str, Callable[[str, Pair | None, _Request], dict[str, Any]]] = {
            "next": lambda name, pair, body: self.sessions.next(name),
            "answer": self._answer,
            "skip": self._skip,
            "undo": self._undo,
            "references": self._references,
        }

    async def page(self, request: Request) -> Response:
        return Response(page_html(), media_type="text/html; charset=utf-8")

    def asked(self, action: str) -> Callable[[Request], Awaitable[Response]]:
        """The handler of a request of the page. Only JSON is taken: other sites cannot send it to this server."""

        async def handler(request: Request) -> Response:
            if request.headers.get("content-type", "").partition(";")[0] != "application/json":
                return JSONResponse({"error": _both("JSON is expected", "JSON 형식이 아닙니다.")}, 415)
            data = b""
            async for part in request.stream():
                data += part
                if len(data) > MOST_BYTES:
                    return JSONResponse({"error": _both("the request is too large", "요청이 너무 큽니다.")}, 413)
            return await run_in_threadpool(self._handle, action, data)

        return handler

    def _handle(self, action: str, data: bytes) -> Response:
        try:
            body = _Request.model_validate_json(data)
            name = reviewer_name(body.reviewer)
        except ValidationError:
            return JSONResponse({"error": _both("the request is not valid", "요청이 올바르지 않습니다.")}, 422)
        except InputError:
            text = "give a name of letters, digits, - _ . (40 at most)"
            return JSONResponse({"error": _both(text, "이름은 글자, 숫자, - _ . 로 40자 이내로 입력하세요.")}, 422)
        pair = self.sessions.pairs.get(body.pair)
        if pair is None and action in ("answer", "skip", "references"):
            return JSONResponse({"error": _both("there is no such pair", "해당 비교 쌍이 없습니다.")}, 404)
        try:
            return JSONResponse(self.requests[action](name, pair, body))
        except OSError as error:
            english = f"could not be saved: {error.strerror}"
            return JSONResponse({"error": _both(english, f"저장하지 못했습니다: {error.strerror}")}, 507)

    def _answer(self, name: str, pair: Pair | None, body: _Request) -> dict[str, Any]:
        assert pair is not None
        corrected = (body.corrected.text, body.corrected.side) if body.corrected else None
        replaced = self.sessions.answer(name, pair, body.choice, body.marks, corrected, body.seconds)
        return {**self.sessions.next(name), "replaced": replaced}

    def _skip(self, name: str, pair: Pair | None, body: _Request) -> dict[str, Any]:
        assert pair is not None
        self.sessions.skip(name, pair)
        return self.sessions.next(name)

    def _undo(self, name: str, pair: Pair | None, body: _Request) -> dict[str, Any]:
        undone = self.sessions.undo(name)
        found = self.sessions.next(name)
        if undone is None:
            return {**found, "undone": False}
        upcoming = next(
            (each for each in (found["pair"], found["upcoming"]) if each and each["id"] != undone["id"]), None
        )
        return {**found, "pair": undone, "upcoming": upcoming, "undone": True}

    def _references(self, name: str, pair: Pair | None, body: _Request) -> dict[str, Any]:
        assert pair is not None
        return {"references": self.sessions.references(name, pair)}

    async def clip(self, request: Request) -> Response:
        """The video as it is stored, by byte ranges."""
        return await self._media(request, self._stored)

    async def encoded(self, request: Request) -> Response:
        """The clip's span, encoded for browsers."""

        def found(request: Request, key: str) -> Response:
            return FileResponse(self.sessions.clips.encoded(key), media_type="video/mp4", headers=_KEPT)

        return await self._media(request, found)

    async def frame(self, request: Request) -> Response:
        def found(request: Request, key: str) -> Response:
            data = self.sessions.clips.frame(key, request.path_params["number"])
            return Response(data, 200 if data else 404, media_type="image/jpeg", headers=_KEPT)

        return await self._media(request, found)

    async def _media(self, request: Request, found: Callable[[Request, str], Response]) -> Response:
        pair = self.sessions.pairs.get(request.path_params["pair"])
        if pair is None:
            return JSONResponse({"error": _both("there is no such pair", "해당 비교 쌍이 없습니다.")}, 404)
        try:
            return await run_in_threadpool(found, request, pair.clip)
        except SampleError as error:
            return JSONResponse({"error": _both(str(error), in_korean(str(error)))}, 410)

    def _stored(self, request: Request, key: str) -> Response:
        size, media_type = self.sessions.clips.size(key)
        headers = {**_KEPT, "Accept-Ranges": "bytes"}
        asked = byte_range(request.headers.get("range"), size)
        begin, end = asked or (0, size)
        if asked and begin >= end:
            return Response(status_code=416, headers={**headers, "Content-Range": f"bytes */{size}"})
        if asked:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        headers["Content-Length"] = str(end - begin)
        parts = self.sessions.clips.read(key, begin, end)
        return StreamingResponse(parts, 206 if asked else 200, headers, media_type)


_KEPT = {"Cache-Control": "private, max-age=3600"}
"""Of media: the next pair's clip is fetched before it is shown."""


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """(first byte, byte after the last one) of a Range header (RFC 9110). None without one, or for several ranges or
    another unit: the whole is sent. The first is not before the second if nothing is left to send."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", (header or "").replace(" ", ""))
    if not found or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size


def _both(english: str, korean: str) -> dict[str, str]:
    return {"en": english, "ko": korean}
