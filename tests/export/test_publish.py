"""Upload to the hub and download from it, imitated by a local server."""

import pytest
import torch
from huggingface_hub import constants

from tests import hub as hubs
from tests import tiny
from tests.inference.test_video_captioner import made
from vlmds.cli import main
from vlmds.errors import InputError
from vlmds.inference.video_captioner import VideoCaptioner
from vlmds.models.artifact import resolve_artifact


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hubs.running() as server:
        hubs.use(monkeypatch, server.url, tmp_path)
        yield server


def test_a_pushed_folder_loads_by_its_name(hub, tmp_path, monkeypatch, capsys):
    models = tiny.make_models(tmp_path / "models")
    original = made(models, tmp_path / "run", "e8").state_dict()
    code = main(
        ["export", "--run", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--push-to-hub", "team/e8"]
    )
    assert code == 0 and "pushed: " in capsys.readouterr().out
    assert hub.visibility == ["private"]
    assert "README.md" in hub.find("team/e8", "main")[1]
    loaded = VideoCaptioner.from_pretrained("team/e8", device="cpu").model.captioner.state_dict()
    for name, tensor in original.items():
        assert torch.equal(loaded[name], tensor), name
    folder = resolve_artifact("team/e8@main")
    assert not (folder / "README.md").exists()  # only what loading needs
    # A newer commit is taken; without a hub, the newest one that is here.
    commit = hub.commit("team/e8", {**hub.find("team/e8", "main")[1], "adapter/notes.txt": b"newer"})
    newer = resolve_artifact("team/e8")
    assert newer.name == commit and (newer / "adapter" / "notes.txt").read_bytes() == b"newer"
    assert resolve_artifact(f"team/e8@{folder.name}") == folder
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert resolve_artifact("team/e8") == newer
        (newer / "projector.safetensors").unlink()
        with pytest.raises(InputError, match="artifact: team/e8 is not complete in .* HF_HUB_OFFLINE"):
            resolve_artifact("team/e8")
    assert resolve_artifact("team/e8") == newer and (newer / "projector.safetensors").is_file()
    with pytest.raises(InputError, match="artifact: http.* has no repository team/none, or it is private"):
        resolve_artifact("team/none")


def test_without_a_network_there_is_one_line(tmp_path, monkeypatch, capsys):
    hubs.use(monkeypatch, "http://127.0.0.1:9", tmp_path)
    models = tiny.make_models(tmp_path / "models")
    made(models, tmp_path / "run", "e1")
    code = main(
        ["export", "--run", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--push-to-hub", "team/e1"]
    )
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1
    assert "--push-to-hub team/e1: " in error and "hf upload team/e1" in error
    assert (tmp_path / "out" / "artifact.json").is_file()
    for name, message in (
        ("team/e1", "artifact: team/e1 is not complete in .* cannot be reached .*; copy its folder"),
        ("./nowhere", "no such folder"),
        ("nowhere", "no such folder"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            VideoCaptioner.from_pretrained(name)
        assert "\n" not in str(caught.value)
