"""Folders to and from the hub, imitated by a server of this machine."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from tests import tiny
from tests.test_inference import made
from vlmds.cli import main
from vlmds.errors import InputError
from vlmds.inference import VideoCaptioner
from vlmds.models.artifact import resolve_artifact

COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """Those of the hub's endpoints that one commit of small files and a snapshot need."""

    repositories: dict[str, dict[str, bytes]]

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            self.repositories.setdefault(name, {})
            self.visibility.append(wanted["visibility"])
            self.answer({"url": f"{constants.ENDPOINT}/{name}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular",
                                    "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            name = "/".join(self.path.split("/")[3:5])
            files = self.repositories[name]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    files[value["path"]] = base64.b64decode(value["content"])
            self.answer({"commitUrl": f"{constants.ENDPOINT}/{name}/commit/{COMMIT}",
                         "commitOid": COMMIT})
        else:
            self.answer({"error": self.path}, 404)

    def do_GET(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            files = self.repositories.get("/".join(parts[2:4]))
            if files is None:
                self.answer({"error": "Repository not found"}, 404)
            elif "tree" in parts:
                self.answer([{"type": "file", "path": name, "size": len(data),
                              "oid": hashlib.sha1(data).hexdigest()}
                             for name, data in files.items()])
            else:
                self.answer({"id": "/".join(parts[2:4]), "sha": COMMIT, "private": True,
                             "siblings": [{"rfilename": name} for name in files]})
        elif "resolve" in parts:
            data = self.repositories["/".join(parts[:2])]["/".join(parts[4:])]
            self.answer(data, etag=hashlib.sha1(data).hexdigest())
        else:
            self.answer({"error": self.path}, 404)

    do_HEAD = do_GET

    def answer(self, content, status=200, etag=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        if etag:
            self.send_header("ETag", f'"{etag}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    Hub.repositories, Hub.visibility = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    use(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path)
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()


def use(monkeypatch, endpoint, tmp_path):
    """What HF_ENDPOINT, HF_TOKEN and HF_HUB_CACHE set before the first import."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
    monkeypatch.setenv("HF_TOKEN", "hf_test")


def test_a_pushed_folder_loads_by_its_name(hub, tmp_path, capsys):
    models = tiny.make_models(tmp_path / "models")
    original = made(models, tmp_path / "run", "e8").state_dict()
    code = main(["export", "--run", str(tmp_path / "run"), "--output", str(tmp_path / "out"),
                 "--push-to-hub", "team/e8"])
    assert code == 0 and "pushed: " in capsys.readouterr().out
    assert hub.visibility == ["private"]
    assert "README.md" in hub.repositories["team/e8"]
    loaded = VideoCaptioner.from_pretrained("team/e8", device="cpu").model.captioner.state_dict()
    for name, tensor in original.items():
        assert torch.equal(loaded[name], tensor), name
    folder = resolve_artifact("team/e8@main")
    assert not (folder / "README.md").exists()  # only what loading needs
    with pytest.raises(InputError, match="team/none: neither a folder here nor a repository"):
        resolve_artifact("team/none")


def test_without_a_network_one_line_says_so(tmp_path, monkeypatch, capsys):
    use(monkeypatch, "http://127.0.0.1:9", tmp_path)
    models = tiny.make_models(tmp_path / "models")
    made(models, tmp_path / "run", "e1")
    code = main(["export", "--run", str(tmp_path / "run"), "--output", str(tmp_path / "out"),
                 "--push-to-hub", "team/e1"])
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1
    assert "--push-to-hub team/e1: " in error and "hf upload team/e1" in error
    assert (tmp_path / "out" / "artifact.json").is_file()
    for name, message in (("team/e1", "neither a folder here nor a repository"),
                          ("./nowhere", "no such folder"), ("nowhere", "no such folder")):
        with pytest.raises(InputError, match=message) as caught:
            VideoCaptioner.from_pretrained(name)
        assert "\n" not in str(caught.value)
