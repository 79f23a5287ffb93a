"""The JSON endpoints, over HTTP."""

import base64
import gzip
import io
import json
import socket
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("gradio")

import contextlib

import httpx  # noqa: E402

from tests.clips import write_video  # noqa: E402
from tests.serve.conftest import LIMIT, SAYINGS  # noqa: E402
from tests.video.test_pool import long_video  # noqa: E402
from vlmds.inference.generation import GenerationOptions  # noqa: E402
from vlmds.serve.limits import Limits  # noqa: E402
from vlmds.serve.loaded import WAITING, Models  # noqa: E402


def data_url(data: bytes) -> str:
    return "data:video/mp4;base64," + base64.b64encode(data).decode()


def chat(url: str, text: str | None = None, **more) -> dict:
    parts = [{"type": "video_url", "video_url": {"url": url}}]
    if text is not None:
        parts.append({"type": "text", "text": text})
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 6, **more}


def post(server, body=None, **more) -> httpx.Response:
    if body is not None:
        more["json"] = body
    return httpx.post(f"{server.url}/caption", timeout=60, **more)


def upload(server, data: bytes, name="clip.mp4", **fields) -> httpx.Response:
    return post(server, files={"video": (name, data)}, data={"max_tokens": "6", **fields})


def refused(reply: httpx.Response, status: int, message: str) -> None:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert message in error["message"] and error["code"] == status
    assert "\n" not in error["message"] and "/tmp" not in reply.text and 'File "' not in reply.text


def test_captions_are_those_of_the_captioner(server, clip):
    options = GenerationOptions(max_new_tokens=6)
    want = {
        name: next(captioner.caption([str(clip)], options, prompt=prompt, workers=1))
        for (name, captioner), prompt in zip(server.models.captioners.items(), (None, "무엇?"))
    }
    assert want["e3"].startswith(SAYINGS["e3"])
    first = upload(server, clip.read_bytes()).json()
    assert first["model"] == "e3" and first["object"] == "chat.completion"
    assert first["choices"][0]["message"] == {"role": "assistant", "content": want["e3"]}
    assert first["choices"][0]["finish_reason"] == "length"
    body = chat(data_url(clip.read_bytes()), "무엇?", model="e7")
    assert post(server, body).json()["choices"][0]["message"]["content"] == want["e7"]
    form = upload(server, clip.read_bytes(), model="e7", prompt="무엇?")
    assert form.json()["choices"][0]["message"]["content"] == want["e7"]
    found = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert [model["id"] for model in found] == ["e3", "e7"]


def test_a_stream_gives_the_same_in_pieces(server, clip):
    body = chat(data_url(clip.read_bytes()), max_completion_tokens=30, temperature=0.7, seed=3)
    whole = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body | {"stream": True}, timeout=60) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert events.pop() == "[DONE]"
    pieces = [json.loads(event)["choices"][0] for event in events]
    assert len(pieces) > 3 and pieces[0]["delta"]["role"] == "assistant"
    text = "".join(piece["delta"].get("content", "") for piece in pieces)
    assert text.strip() == whole["choices"][0]["message"]["content"]
    reasons = [piece["finish_reason"] for piece in pieces]
    assert set(reasons[:-1]) == {None} and reasons[-1] == whole["choices"][0]["finish_reason"]


def tar_bomb() -> bytes:
    """64 MB of zeros in a tar, some tens of KB when compressed."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        entry = tarfile.TarInfo("zeros.mp4")
        entry.size = 64 << 20
        tar.addfile(entry, io.BytesIO(bytes(entry.size)))
    return gzip.compress(out.getvalue(), 1)


def linked_tar() -> bytes:
    """The one way in which a symbolic link can be sent."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        entry = tarfile.TarInfo("clip.mp4")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(entry)
    return out.getvalue()


def damaged(clip) -> bytes:
    data = bytearray(clip.read_bytes())
    begin = data.index(b"mdat") + 400
    data[begin : begin + 2000] = b"\xff" * 2000
    return bytes(data)


HOSTILE = {  # what is sent, as (file, name of the file), and the answer
    "not a video": (lambda clip, tmp: (b"no video at all" * 99, "a.mp4"), 422, "cannot be read"),
    "0 bytes": (lambda clip, tmp: (b"", "a.mp4"), 422, "file is empty"),
    "1 x 1 pixel": (
        lambda clip, tmp: (
            write_video(tmp / "a.mkv", frames=5, width=1, height=1, codec="ffv1", pix_fmt="bgr0").read_bytes(),
            "a.mkv",
        ),
        200,
        "",
    ),
    "100,000 frames": (
        lambda clip, tmp: (long_video(tmp / "a.mkv", 100_000, False), "a.mkv"),
        422,
        "video too long: 3,333 s; this server takes at most 60 s",
    ),
    "AV1": (
        lambda clip, tmp: (write_video(tmp / "a.mp4", frames=10, codec="libsvtav1").read_bytes(), "a.mp4"),
        200,
        "",
    ),
    "corrupt": (lambda clip, tmp: (damaged(clip), "a.mp4"), 422, "cannot be"),
    "cut": (lambda clip, tmp: (clip.read_bytes()[:900], "a.mp4"), 422, "cannot be read"),
    "symbolic link": (lambda clip, tmp: (linked_tar(), "a.mp4"), 422, "cannot be read"),
    "long name": (lambda clip, tmp: (clip.read_bytes(), "../" * 99 + "가" * 300 + ".mp4"), 200, ""),
    "huge name": (lambda clip, tmp: (clip.read_bytes(), "가" * 100_000), 400, "the form cannot be read"),
    "HTML": (lambda clip, tmp: (b"<html><script>alert(1)</script></html>", "a.html"), 422, "cannot be read"),
    "bomb": (lambda clip, tmp: (tar_bomb(), "a.tar.gz"), 422, "not a video file"),
    "playlist": (lambda clip, tmp: (b"ffconcat version 1.0\nfile /etc/passwd\n", "a.mp4"), 422, "not a video file"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_uploads_get_a_clear_answer_and_the_server_lives(server, clip, tmp_path, what):
    make, status, message = HOSTILE[what]
    data, name = make(clip, tmp_path)
    reply = upload(server, data, name)
    if status == 200:
        assert reply.status_code == 200, reply.text
    else:
        refused(reply, status, message)
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    end = time.monotonic() + 20  # a request of the test before may just be leaving
    while list(server.folder.glob("*.video")) and time.monotonic() < end:
        time.sleep(0.01)
    assert not list(server.folder.glob("*.video"))


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "the request is not JSON"),
        (b"[" * 200_000, 400, "the request is not JSON"),
        ([], 400, "valid dictionary"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "무엇?"}]}, 400, "0 parts of type video_url"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}]}]},
            400,
            "0 parts of type video_url",
        ),
        ({"messages": [{"role": "system", "content": []}]}, 400, "messages: 0 of role user"),
        ({"messages": [{"role": "assistant", "content": "?"}]}, 400, "messages.0: "),
        ({"messages": [{"role": "user", "content": "?"}] * 2}, 400, "messages: 2 of role user"),
        (chat("file:///etc/passwd"), 400, "takes data: URLs only"),
        (chat("/etc/passwd"), 400, "takes data: URLs only"),
        (chat("http://127.0.0.1:1/clip.mp4"), 400, "takes data: URLs only"),
        (chat("data:video/mp4,abc"), 400, "not of the form"),
        (chat("data:video/mp4;base64,…"), 400, "cannot be decoded"),
        (chat(data_url(b"0"), model="e9"), 404, "model 'e9' is not here; there are: e3, e7"),
        (chat(data_url(b"0"), max_tokens=0), 400, "max_new_tokens 0: must be 1 or more"),
        (chat(data_url(b"0"), max_tokens=1 << 40), 400, "tokens are too many"),
        (chat(data_url(b"0"), temperature=-1), 400, "temperature -1"),
        (chat(data_url(b"0"), "?" * 5000), 400, "the prompt has 5,000 characters"),
        (chat(data_url(b"0"), n=2), 400, "n 2: this server writes one caption for a request; leave n out"),
        (chat(data_url(b"0"), stop=["a"] * 5), 400, "stop: 5 texts; this server takes at most 4"),
        (chat(data_url(b"0"), stop=""), 400, "stop: a text is empty"),
        (chat(data_url(b"0"), stream_options={"include_usage": True}), 400, "stream_options: only with stream"),
        (chat(data_url(b"0"), tools=[]), 400, "tools: "),
    ],
)
def test_bad_requests_are_told_what_is_wrong(server, body, status, message):
    reply = post(server, content=body) if isinstance(body, bytes) else post(server, body)
    refused(reply, status, message)


def test_forms_that_are_none(server, clip):
    refused(post(server, data={"prompt": "?"}, files={"clip": b"x"}), 400, "send one as video")
    refused(upload(server, clip.read_bytes(), prompts="?"), 400, "prompts")
    refused(
        post(server, content=b"abc", headers={"content-type": "multipart/form-data"}), 400, "the form cannot be read"
    )


def test_a_video_that_is_too_long_or_too_large(server, clip, tmp_path):
    slow = write_video(tmp_path / "slow.mp4", frames=3, times=[0.0, 50.0, 100.0])
    refused(upload(server, slow.read_bytes()), 422, "video too long: 150 s; this server takes at most 60 s")
    fits_the_request_only = clip.read_bytes() + bytes(int(LIMIT * 1e6))
    refused(upload(server, fits_the_request_only), 422, "at most 8 MB")


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
def test_a_body_without_end_is_refused_before_its_end(server, kind):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"POST /caption HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\n"
            "Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        start = b'--x\r\nContent-Disposition: form-data; name="video"; filename="a"\r\n\r\n'
        sent = 0
        for block in (start, *[b"0" * 100_000] * 400):
            connection.settimeout(0.01)
            try:
                answer = connection.recv(65536)
                break
            except TimeoutError:
                connection.settimeout(20)
                connection.sendall(b"%x\r\n%b\r\n" % (len(block), block))
                sent += len(block)
    assert answer.startswith(b"HTTP/1.1 413") and sent < 5 * LIMIT * 1e6


def test_a_request_that_says_it_is_too_large_is_refused(server):
    refused(post(server, content=bytes(30_000_000)), 413, "videos of at most 8 MB")


def idle(models, seconds: float) -> bool:
    """Whether the device becomes free within so many seconds."""
    if models._device.lanes.acquire(timeout=seconds):
        models._device.lanes.release()
        return True
    return False


@pytest.mark.parametrize("stream", [True, False])
def test_the_writing_ends_when_the_reader_leaves(server, clip, stream):
    body = json.dumps(chat(data_url(clip.read_bytes()), max_tokens=100_000, stream=stream)).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /caption HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        end = time.monotonic() + 30
        while idle(server.models, 0) and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.5)
        assert not idle(server.models, 0)  # it is at it, and has long to go
    assert idle(server.models, 20)


def test_more_than_can_wait_are_turned_away(server, clip):
    places = server.models._device._places
    for _ in range(WAITING):
        assert places.acquire(timeout=20)  # a request of the test before may just be leaving
    try:
        refused(upload(server, clip.read_bytes()), 503, "too many requests are waiting")
        refused(upload(server, clip.read_bytes(), stream="true"), 503, "too many requests")
    finally:
        places.release(WAITING)


def test_a_bug_shows_no_trace(server, clip, monkeypatch):
    def broken(*_):
        raise RuntimeError("secret /tmp/place")

    monkeypatch.setattr(server.models, "facts", broken)
    refused(upload(server, clip.read_bytes()), 500, "internal error; see the server's log")


def test_another_host_name_is_refused(server):
    """A page elsewhere whose name is made to point here (DNS rebinding)."""
    reply = httpx.get(f"{server.url}/models", headers={"host": "evil.example"})
    assert reply.status_code == 400 and "e3" not in reply.text


@pytest.fixture
def site(clip):
    """A web server with the clip, and the paths that were asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response({"/clip.mp4": 200, "/big": 200, "/moved": 302}.get(self.path, 404))
            self.send_header("Location", "/clip.mp4")
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(
                    clip.read_bytes() if self.path == "/clip.mp4" else bytes(12_000_000) if self.path == "/big" else b""
                )

        def log_message(self, *_):
            pass

    site = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{site.server_port}", asked
    site.shutdown()
    site.server_close()


def test_urls_only_where_they_are_allowed(server, site, tmp_path):
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from vlmds.serve.api import add_api

    url, asked = site
    refused(post(server, chat(f"{url}/clip.mp4")), 400, "takes data: URLs only")
    assert not asked
    app = FastAPI()
    add_api(app, Models(server.models.captioners, Limits(megabytes=LIMIT, urls=True)), tmp_path)
    client = TestClient(app, raise_server_exceptions=False)
    assert client.post("/caption", json=chat(f"{url}/clip.mp4")).status_code == 200
    for bad, status, message in (
        (f"{url}/none", 422, "answered with 404"),
        (f"{url}/moved", 422, "answered with 302"),
        (f"{url}/big", 413, "too large"),
        ("file:///etc/passwd", 400, "neither a data: nor"),
        ("http://127.0.0.1:1/a.mp4", 422, "cannot be fetched"),
        ("http://[", 422, "cannot be fetched"),
    ):
        refused(client.post("/caption", json=chat(bad)), status, message)
    assert asked.count("/clip.mp4") == 1


def test_the_page_opens_neither_files_nor_addresses(server, site, clip):
    url, asked = site
    for path in ("/etc/passwd", "/proc/self/environ", "../../etc/passwd"):
        reply = httpx.get(f"{server.url}/gradio_api/file={path}")
        assert reply.status_code in (403, 404) and "root:" not in reply.text
    config = httpx.get(f"{server.url}/config").json()
    events = [event["id"] for event in config["dependencies"] if len(event["inputs"]) == 5]
    assert len(events) == 1
    files = [
        {"path": path, "meta": {"_type": "gradio.FileData"}}
        for path in (f"{url}/clip.mp4", str(clip), "/etc/passwd", f"{server.folder}/../../../etc/passwd")
    ]
    for data in (
        *([file, ["e3"], "", 5, 0] for file in files),
        [None, ["e3"], files[0], 5, 0],
        [None, [files[1]], "", 5, 0],
    ):
        call = {"data": data, "fn_index": events[0], "session_hash": "s", "event_data": None}
        assert httpx.post(f"{server.url}/gradio_api/queue/join", json=call).status_code == 200
        with httpx.stream("GET", f"{server.url}/gradio_api/queue/data?session_hash=s", timeout=30) as reply:
            answer = next(line for line in reply.iter_lines() if "process_completed" in line)
        assert '"success":false' in answer and "uploads only" in answer
    assert not asked
    large = httpx.post(f"{server.url}/gradio_api/queue/join", content=bytes(12_000_000))
    assert large.status_code == 413
