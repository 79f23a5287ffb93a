"""`vlmds new`: its file loads, plans and trains like the packaged experiment that it extends."""

import pytest
import yaml

from tests import tiny
from vlmds.cli import main
from vlmds.experiments.reading import PACKAGED, load_experiment, packaged_experiments
from vlmds.experiments.schema import PROJECTORS

PAIRS = {(e.projector.type, e.peft.type): e for e in map(load_experiment, packaged_experiments()) if e.name != "demo"}


@pytest.mark.parametrize(("projector", "adapter"), PAIRS)
def test_a_new_file_is_the_packaged_experiment_under_its_own_name(projector, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["new", "my.yaml", "--projector", projector, "--adapter", adapter]) == 0
    packaged = PAIRS[projector, adapter]
    new, old = (e.model_dump(exclude={"name"}) for e in (load_experiment("my.yaml"), packaged))
    assert new == old and load_experiment("my.yaml").name == "my"
    text = (tmp_path / "my.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text)["extends"] == packaged.name
    for key in ("lr:", "epochs:", "# global_batch: 8", "validate_every: 200", "# keep: best"):
        assert key in text
    flat = " ".join(text.replace("#", " ").split())
    assert str(type(packaged.projector).__doc__).replace("``", "") in flat and packaged.projector.rate_advice in flat
    assert ("num_queries: Number of learned queries" in flat) == hasattr(packaged.projector, "num_queries")


def test_a_projector_without_a_packaged_experiment_extends_the_base(tmp_path, monkeypatch):
    """As a fifth projector, right after its registration."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vlmds.planning.new_experiment.packaged_experiments", lambda: ["demo", "e1", "e2"])
    assert main(["new", "my.yaml", "--projector", "mlp", "--adapter", "dora"]) == 0
    new = load_experiment("my.yaml")
    assert new.model_dump(exclude={"name", "owner", "priority"}) == PAIRS["mlp", "dora"].model_dump(
        exclude={"name", "owner", "priority"}
    )


def test_its_values_are_those_of_the_packaged_files(tmp_path, monkeypatch):
    """A change of base.yaml shows in what is written next."""
    packaged = tmp_path / "packaged"
    packaged.mkdir()
    for file in PACKAGED.glob("*.yaml"):
        text = file.read_text(encoding="utf-8").replace("epochs: 5", "epochs: 7")
        (packaged / file.name).write_text(text.replace("micro_batch: 2", "micro_batch: 3"))
    monkeypatch.setattr("vlmds.experiments.reading.PACKAGED", packaged)
    assert main(["new", str(tmp_path / "my.yaml"), "--projector", "mlp", "--clips", "2400"]) == 0
    text = (tmp_path / "my.yaml").read_text(encoding="utf-8")
    assert "micro_batch: 3" in text and "# global_batch: 12" in text
    assert "epochs: 7.0}  # 1,400 steps" in text and "validate_every: 100 " in text


def test_its_steps_are_those_that_the_plan_counts(models, shards, tmp_path, capsys):
    path = tmp_path / "my.yaml"
    assert main(["new", str(path), "--projector", "mlp", "--data", str(shards)]) == 0
    printed, text = capsys.readouterr().out, path.read_text(encoding="utf-8")
    assert f"next: vlmds plan --exp {path} --data {shards}" in printed
    assert "Steps are those of 10 clips at a global batch of 8" in text and "# 3 steps" in text
    assert "loss on split val" in text and "are few" in text
    places = [f"vision.model={models / 'clip'}", f"llm.model={models / 'qwen3'}", f"data.num_frames={tiny.FRAMES}"]
    assert main(["plan", "--exp", str(path), "--data", str(shards), "--set", *places]) == 0
    printed = capsys.readouterr().out
    assert "stage align: trains projector, lr 0.001, 2 epochs of 10 samples = 3 steps" in printed


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("there.yaml", [], "there.yaml: is there already; choose another name"),
        ("e7.yaml", [], "e7 is the name of a packaged experiment"),
        ("my.json", [], "must end with .yaml"),
        ("내것.yaml", [], "the file's name becomes the experiment's"),
        ("no/folder.yaml", [], "does not exist; make it first"),
        ("my.yaml", ["--adapter", "qlora"], "--adapter qlora: there are dora, lora"),
        ("my.yaml", ["--projector", "mpl"], f"--projector mpl: there are {', '.join(sorted(PROJECTORS))}"),
        ("my.yaml", ["--clips", "0"], "--clips 0: must be at least 1"),
        ("my.yaml", ["--data", "nowhere"], "data.path: nowhere does not exist"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(name, options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.yaml").write_text("mine")
    assert main(["new", name, "--projector", "mlp", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there.yaml"]
    assert (tmp_path / "there.yaml").read_text() == "mine"
