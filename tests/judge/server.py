"""A server on this machine that speaks the protocol of chat completions."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any], int], tuple[int, dict[str, str], Any]]
"""(status, headers, body) of a request and its number. A body that is text is sent as it is, else as JSON."""


@dataclass
class Server:
    """requests: the bodies of all requests. keys: the keys that came with them."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    models: tuple[int, Any] = (200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]})


def said(text: str | None, **more: Any) -> tuple[int, dict[str, str], Any]:
    """A completion with this text. more: of its message, or finish_reason."""
    reason = more.pop("finish_reason", "stop")
    message = {"role": "assistant", "content": text, **more}
    body = {
        "id": "1", "object": "chat.completion", "created": 1, "model": "tiny",
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }  # fmt: skip
    return 200, {}, body


def chose(choice: str, **more: Any) -> tuple[int, dict[str, str], Any]:
    return said(json.dumps({"reason": "이유", "first_marks": [], "second_marks": [], "choice": choice, **more}))


def captions(request: dict[str, Any]) -> tuple[str, str]:
    """The two captions of a request, in its order."""
    content = request["messages"][1]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    first, second = (json.loads(line.partition(": ")[2]) for line in text.splitlines()[1:])
    return first, second


def prefers_shorter(request: dict[str, Any], number: int) -> tuple[int, dict[str, str], Any]:
    """An unbiased judge."""
    first, second = captions(request)
    key = [(len(text), text) for text in (first, second)]
    return chose("both_bad" if first == second else "first" if key[0] < key[1] else "second")


@contextmanager
def serving(answer: Answer = prefers_shorter) -> Iterator[Server]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(server.models[0], {}, server.models[1])

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                server.requests.append(request)
                server.keys.append(self.headers["authorization"])
                number = len(server.requests)
            self._send(*answer(request, number))

        def _send(self, status: int, headers: dict[str, str], body: Any) -> None:
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {
                "content-type": "application/json",
                "content-length": str(len(data)),
                **headers,
            }.items():
                self.send_header(name, value)
            with suppress(ConnectionError):  # the client has given up
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server = Server(f"http://127.0.0.1:{http.server_address[1]}/v1")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
