"""Models by hub name, from a hub on this machine."""

import json
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from tests import hub as hubs
from tests import tiny
from vlmds.cli import main
from vlmds.errors import InputError
from vlmds.experiments.reading import load_experiment
from vlmds.models import hub_download
from vlmds.models.assemble import load_model
from vlmds.models.fetch import download, fetch_models, model_folder, pin_models, presence
from vlmds.models.hub import cached_folder, commit_of, snapshot
from vlmds.models.pretrained import load_config
from vlmds.runs.lineage import base_files

CLIP, QWEN = "team/clip", "team/qwen3"
NEVER = {
    "tf_model.h5": b"tensorflow",
    "flax_model.msgpack": b"flax",
    "README.md": b"# card",
    "consolidated.safetensors": b"twice",
    "original/params.json": b"{}",
}


def publish(hub, folder: Path) -> None:
    """The tiny models as the hub has their like: CLIP as .bin, Qwen3 in two files with an index."""
    folder.mkdir()
    models = tiny.make_models(folder / "models")
    weights = models / "clip" / "model.safetensors"
    torch.save(load_file(weights), models / "clip" / "pytorch_model.bin")
    weights.unlink()
    split(models / "qwen3")
    hub.add(CLIP, models / "clip", **NEVER)
    hub.add(QWEN, models / "qwen3", **NEVER)


def split(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, chosen in parts.items():
        save_file({name: tensors[name] for name in chosen}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {n: f for f, ns in parts.items() for n in ns}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hubs.running() as server:
        publish(server, tmp_path / "published")
        hubs.use(monkeypatch, server.url, tmp_path)
        yield server


def experiment(*overrides: str, vision: str = CLIP, llm: str = QWEN):
    settings = [s for s in tiny.settings(Path("/none")) if not s.startswith(("vision.model", "llm.model"))]
    return load_experiment("e3", [*settings, f"vision.model={vision}", f"llm.model={llm}", *overrides])


def weights(hub) -> dict[str, int]:
    return {name: count for name, count in hub.downloads.items() if name.endswith(hubs.LFS)}


ONCE = {
    f"{CLIP}/pytorch_model.bin": 1,
    f"{QWEN}/model-00001-of-00002.safetensors": 1,
    f"{QWEN}/model-00002-of-00002.safetensors": 1,
}


def test_an_empty_cache_is_filled_with_what_is_needed_and_nothing_else(hub):
    wanted = fetch_models(experiment())
    assert weights(hub) == ONCE
    assert not any(name.partition("/")[2].partition("/")[2] in NEVER for name in hub.downloads)
    assert wanted.vision.revision == hub.find(CLIP, "main")[0]
    assert wanted.llm.revision == hub.find(QWEN, "main")[0]
    assert sorted(base_files(wanted)) == [
        "llm/model-00001-of-00002.safetensors",
        "llm/model-00002-of-00002.safetensors",
        "vision/pytorch_model.bin",
    ]
    hub.asked.clear()
    model = load_model(wanted, torch.device("cpu"))
    assert not hub.asked  # whatever is in the cache needs no network
    assert model.captioner.llm.config._name_or_path == QWEN  # what an adapter will name as its base


def test_a_half_filled_cache_is_completed(hub):
    folder = download(experiment().llm)
    lost = folder / "model-00002-of-00002.safetensors"
    lost.resolve().unlink()
    lost.unlink()
    assert cached_folder(experiment().llm) is None
    hub.downloads.clear()
    assert model_folder(experiment().llm) == folder
    assert weights(hub) == {f"{QWEN}/{lost.name}": 1}


def test_a_connection_that_is_cut_goes_on_where_it_was(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 12)  # these files are small
    hub.cuts = 3
    folder = download(experiment().llm)
    sent = hub.find(QWEN, "main")[1]
    assert all((folder / name).read_bytes() == data for name, data in sent.items() if name.startswith("model-"))
    assert any(begin > 0 for _, begin in hub.ranges)


def test_a_download_that_breaks_off_is_tried_again(hub, monkeypatch, capfd):
    monkeypatch.setattr(hub_download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(hub_download, "TRIES", 3)
    reports = []
    hub.broken = 2  # downloads of a weight file that the hub answers with 500
    download(experiment().vision, reports.append)
    assert weights(hub) == {f"{CLIP}/pytorch_model.bin": 1}
    assert capfd.readouterr().err.count("; trying again in ") == 2
    total = len(hub.find(CLIP, "main")[1]["pytorch_model.bin"])
    assert reports[-1].startswith(f"downloading {CLIP}: {total / 1e6:.0f} of {total / 1e6:.0f} MB")
    hub.broken = 99
    with pytest.raises(InputError, match=f"llm.model: {QWEN}: http.* answers 500") as caught:
        download(experiment().llm)
    assert "\n" not in str(caught.value) and hub.broken == 99 - 2 * 3  # two files, three tries


def test_a_listing_that_fails_is_no_empty_repository(hub, monkeypatch):
    """With a folder of the commit there, huggingface_hub then returns it as if all were there."""
    monkeypatch.setattr(hub_download.time, "sleep", lambda seconds: None)
    commit, files = hub.find(QWEN, "main")
    folder = snapshot(QWEN, commit)
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(files["config.json"])
    hub.listings = False
    with pytest.raises(InputError, match="llm.model: team/qwen3: .* gave no list of its files"):
        download(experiment().llm)
    hub.listings = True
    assert not weights(hub) and download(experiment().llm) == folder


def test_a_configuration_needs_no_weights(hub):
    assert load_config(experiment().llm).model_type == "qwen3"
    assert list(hub.downloads) == [f"{QWEN}/config.json"]


def test_offline_what_is_there_is_used_and_what_is_not_is_one_line(hub, monkeypatch):
    download(experiment().vision)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert commit_of(model_folder(experiment().vision)) == hub.find(CLIP, "main")[0]
    with pytest.raises(InputError, match="llm.model: team/qwen3 is not complete in .*HF_HUB_OFFLINE"):
        fetch_models(experiment())
    assert not hub.asked


def test_without_a_hub_what_is_there_is_used(hub, tmp_path, monkeypatch):
    fetch_models(experiment())
    hubs.use(monkeypatch, "http://127.0.0.1:9", tmp_path)
    fetch_models(experiment())
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(InputError, match="cannot be reached .*; run vlmds fetch") as caught:
        fetch_models(experiment())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llm": "team/none"}, "llm.model: http.* has no repository team/none, or it is private"),
        ({"llm": "team/gated"}, "llm.model: team/gated is gated: ask for access at http"),
        ({"llm": "team/bare"}, "llm.model: team/bare has no weights on the hub"),
        ({"llm": "team/holes"}, "llm.model: team/holes has no weights on the hub .model-00002"),
        ({"vision": QWEN}, "vision.model: team/qwen3 has no preprocessor_config.json on the hub"),
        ({"llm": "team/secret"}, "llm.model: team/secret: http.* answers 401: .*; log in"),
        ({"llm": "team/denied"}, "llm.model: http.* refuses team/denied to this account; log in"),
        ({"llm": "team/inside"}, "model.safetensors.index.json names parts/a.safetensors, but weights"),
        ({"llm": "a/b c"}, "llm.model: a/b c is neither a folder here nor a name of the hub"),
    ],
)
def test_what_cannot_be_had_is_one_line(hub, change, message):
    files = hub.find(QWEN, "main")[1]
    hub.commit("team/gated", files)
    hub.gated.add("team/gated")
    hub.commit("team/secret", files)
    hub.private.add("team/secret")
    hub.commit("team/denied", files)
    hub.denied.add("team/denied")
    index = json.dumps({"weight_map": {"a": "parts/a.safetensors"}}).encode()
    hub.commit("team/inside", {**files, "model.safetensors.index.json": index})
    hub.commit("team/bare", {"config.json": files["config.json"]})
    hub.commit("team/holes", {k: v for k, v in files.items() if "00002-of" not in k})
    with pytest.raises(InputError, match=message) as caught:
        fetch_models(experiment(**change))
    assert "\n" not in str(caught.value)


def test_a_revision_pins_a_commit(hub, tmp_path):
    old = hub.find(QWEN, "main")[0]
    new = hub.commit(QWEN, {**hub.find(QWEN, "main")[1], "notes.txt": b"newer"})
    assert fetch_models(experiment(f"llm.revision={old}")).llm.revision == old
    # The cache knows no main yet; then a commit that the hub has since replaced stays in use.
    assert fetch_models(experiment()).llm.revision == new
    newest = hub.commit(QWEN, {**hub.find(QWEN, "main")[1], "notes.txt": b"newest"})
    assert fetch_models(experiment()).llm.revision == new
    # A run goes on with the commit that it recorded, unless the experiment names one.
    assert pin_models(experiment(), {"llm": old}).llm.revision == old
    assert pin_models(experiment(f"llm.revision={new}"), {"llm": old}).llm.revision == new
    assert main(["fetch", "--exp", "e3", "--set", f"vision.model={CLIP}", f"llm.model={QWEN}"]) == 0
    assert fetch_models(experiment()).llm.revision == newest
    with pytest.raises(InputError, match="llm.revision: team/qwen3 has no revision v9"):
        fetch_models(experiment("llm.revision=v9"))
    folder = tmp_path / "published" / "models" / "qwen3"
    with pytest.raises(InputError, match=f"llm.revision: v9 names a commit of the hub, but llm.model {folder}"):
        fetch_models(experiment(f"llm.model={folder}", "llm.revision=v9"))
    # Another model starts without a revision, whatever the order of the overrides.
    assert load_experiment("e3", ["llm.revision=v9", "llm.model=a/b"]).llm.revision == "v9"
    path = tmp_path / "pinned.yaml"
    path.write_text("extends: e3.yaml\nname: pinned\nllm: {revision: v9}\n")
    assert load_experiment(path).llm.revision == "v9"
    assert load_experiment(path, ["llm.model=a/b"]).llm.revision is None


def test_a_disk_without_room_is_refused_before_the_download(hub, tmp_path):
    hub.claimed["model-00002-of-00002.safetensors"] = 10**16
    with pytest.raises(InputError, match=r"needs 10,000 TB in .*cache, but only .* are free; free some"):
        fetch_models(experiment())
    assert f"{QWEN}/model-00001-of-00002.safetensors" not in hub.downloads


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_is_one_line(hub, monkeypatch):
    def full(*_, **__):
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"0")

    monkeypatch.setattr(hub_download, "snapshot_download", full)  # no disk of a test's own can be filled
    with pytest.raises(InputError, match="the disk of .* is full; free some, or set HF_HOME"):
        fetch_models(experiment())


def test_what_is_missing_is_counted(hub):
    files = hub.find(QWEN, "main")[1]
    found = presence(experiment().llm)
    wanted = sum(
        len(data)
        for name, data in files.items()
        if name.endswith((".json", ".txt", ".jinja", ".model")) or name.startswith("model-")
        if "/" not in name
    )
    # The index is not read for it: consolidated.safetensors counts as well.
    assert not found.here and found.missing == wanted + len(NEVER["consolidated.safetensors"])
    assert re.match(r"\d\S* k?B are to be downloaded to .*\(\S+ \wB free\)", found.text), found.text
    download(experiment().llm)
    found = presence(experiment().llm)
    assert found.here and found.missing == 0 and hub.find(QWEN, "main")[0][:12] in found.text


def test_a_mirror_without_sizes_serves_all_the_same(hub):
    hub.sizes = False
    assert cached_folder(experiment().llm) is None
    assert model_folder(experiment().llm) == cached_folder(experiment().llm)


def test_what_may_not_be_read_is_one_line(hub, tmp_path, monkeypatch):
    download(experiment().llm)

    def denied(*_):
        raise PermissionError(13, "Permission denied", str(tmp_path / "cache"))

    monkeypatch.setattr("vlmds.models.hub.missing_file", denied)  # root may read everything
    with pytest.raises(InputError, match=f"llm.model: {tmp_path}/cache"):
        cached_folder(experiment().llm)


def test_newer_commits_are_asked_for_where_that_is_possible(hub, monkeypatch, capsys):
    words = ["fetch", "--exp", "e3", "--set", f"vision.model={CLIP}", f"llm.model={QWEN}"]
    assert main(words) == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    capsys.readouterr()
    assert main(words) == 0
    assert capsys.readouterr().out.count("(no newer one could be asked for: ") == 2


def test_a_hub_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    waiting = threading.Event()
    monkeypatch.setattr(hub_download.HfApi, "model_info", lambda *_, **__: waiting.wait())  # as DNS may
    with pytest.raises(InputError, match="cannot be reached .no answer within 0 s"):
        hub_download.ask_hub(experiment().llm, timeout=0.05)
    waiting.set()
