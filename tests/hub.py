"""A Hugging Face hub on this machine, for tests: repositories in memory, served as the hub does."""

import base64
import hashlib
import json
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

LFS = (".safetensors", ".bin", ".h5")
PIECE = 1 << 14


class Hub(ThreadingHTTPServer):
    """Repositories by name and commit, and what was asked of them.

    repositories: name -> {commit: {path: bytes}}, the newest commit last; branch "main" is the newest.
    gated: names that only say that they exist. visibility: of the repositories that clients made.
    downloads: how often each "name/path" was sent whole. asked: all requests, "METHOD path".
    cuts: so many times, a file is sent up to its half and the connection closed.
    claimed: path -> bytes that the hub claims of a file. private: names that clients cannot see;
    denied: names whose files this account may not read. broken: so many times, a weight file is
    answered with 500. listings, sizes: whether the files of a repository can be listed, and how large
    they are.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.gated, self.visibility = {}, set(), []
        self.downloads, self.asked, self.cuts, self.claimed = Counter(), [], 0, {}
        self.ranges, self.private, self.denied = [], set(), set()
        self.broken, self.listings, self.sizes = 0, True, True
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """Of a process that uses this hub, with its cache in ``home``."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
        }

    def add(self, name: str, folder: Path, **files: bytes) -> str:
        """A new commit of a folder's files; returns it."""
        content = {path.name: path.read_bytes() for path in sorted(folder.iterdir())} | files
        return self.commit(name, content)

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(
            repr(sorted((k, hashlib.sha1(v).hexdigest()) for k, v in files.items())).encode()
        ).hexdigest()
        self.repositories.setdefault(name, {})[digest] = files
        return digest

    def find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repositories[name]
        commit = list(commits)[-1] if revision == "main" else revision
        return (commit, commits[commit]) if commit in commits else None


@contextmanager
def running():
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


def use(monkeypatch, url: str, home: Path) -> None:
    """In this process, what HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE and HF_HUB_OFFLINE set before the
    first import."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    monkeypatch.setenv("HF_TOKEN", "hf_test")


class _Handler(BaseHTTPRequestHandler):
    """Those of the hub's endpoints that models, snapshots and one commit of small files need."""

    server: Hub

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            self.server.repositories.setdefault(name, {"0" * 40: {}})
            self.server.visibility.append(wanted["visibility"])
            self.answer({"url": f"{self.server.url}/{name}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            name = "/".join(self.path.split("/")[3:5])
            values = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
            commit = self.server.commit(name, {v["path"]: base64.b64decode(v["content"]) for v in values})
            self.answer({"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit})
        else:
            self.refuse(404, "EntryNotFound")

    def do_GET(self):
        with self.server.lock:
            self.server.asked.append(f"{self.command} {self.path}")
        parts = self.path.partition("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2])
        if name not in self.server.repositories:
            return self.refuse(404, "RepoNotFound")
        if name in self.server.gated:
            return self.refuse(403, "GatedRepo")
        if name in self.server.private:
            return self.refuse(401, "")
        rest = parts[4:] if parts[0] == "api" else parts[2:]
        revision = rest[1].replace("%2F", "/") if len(rest) > 1 else "main"
        found = self.server.find(name, revision)
        if found is None:
            return self.refuse(404, "RevisionNotFound")
        commit, files = found
        if rest[:1] == ["tree"] and not self.server.listings:
            return self.refuse(404, "")
        if rest[:1] == ["resolve"] and name in self.server.denied:
            return self.refuse(403, "")
        if rest[:1] == ["tree"]:
            return self.answer(
                [{"type": "file", "path": path, **self.described(path, data)} for path, data in files.items()]
            )
        if rest[:1] == ["resolve"]:
            path = "/".join(rest[2:])
            return self.send(name, commit, path, files[path]) if path in files else self.refuse(404, "EntryNotFound")
        return self.answer(
            {
                "id": name,
                "sha": commit,
                "private": True,
                "siblings": [
                    {"rfilename": path, **(self.described(path, data) if self.server.sizes else {})}
                    for path, data in files.items()
                ],
            }
        )

    do_HEAD = do_GET

    def described(self, path: str, data: bytes) -> dict:
        size = self.server.claimed.get(path, len(data))
        facts = {"size": size, "oid": hashlib.sha1(data).hexdigest()}
        if path.endswith(LFS):
            sha256 = hashlib.sha256(data).hexdigest()
            facts["lfs"] = {"size": size, "sha256": sha256, "oid": sha256, "pointerSize": 134}
        return facts

    def send(self, name: str, commit: str, path: str, data: bytes) -> None:
        begin = 0
        if self.command == "GET" and path.endswith(LFS):
            with self.server.lock:
                broken, self.server.broken = self.server.broken, max(0, self.server.broken - 1)
            if broken:
                return self.refuse(500, "")
        if wanted := self.headers.get("Range"):
            begin = int(wanted.removeprefix("bytes=").partition("-")[0])
            with self.server.lock:
                self.server.ranges.append((path, begin))
        self.send_response(206 if begin else 200)
        end = len(data)
        if self.command == "GET" and path.endswith(LFS):
            with self.server.lock:
                if self.server.cuts:
                    self.server.cuts -= 1
                    end = begin + (len(data) - begin) // 2
        digest = hashlib.sha256 if path.endswith(LFS) else hashlib.sha1
        for key, value in (
            ("Content-Length", len(data) - begin),
            ("X-Repo-Commit", commit),
            ("ETag", f'"{digest(data).hexdigest()}"'),
            ("Accept-Ranges", "bytes"),
        ):
            self.send_header(key, str(value))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        for start in range(begin, end, PIECE):
            self.wfile.write(data[start : min(start + PIECE, end)])
        if end < len(data):
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(2)
        else:
            with self.server.lock:
                self.server.downloads[f"{name}/{path}"] += 1

    def refuse(self, status: int, code: str) -> None:
        self.answer({"error": code}, status, {"X-Error-Code": code} if code else {})

    def answer(self, content, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass
