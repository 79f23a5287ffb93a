"""`projector.init`: what it takes and refuses, and `vlmds export --format projector`, without training."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import hub as hubs
from tests import tiny
from tests.inference.test_video_captioner import made
from vlmds.cli import main
from vlmds.doctor.cluster import findings_within
from vlmds.doctor.node import FAILED, OK, CheckContext, check_start
from vlmds.errors import InputError
from vlmds.experiments.reading import load_experiment
from vlmds.export.folder import export_run
from vlmds.files import sha256_of
from vlmds.inference.video_captioner import VideoCaptioner
from vlmds.models.artifact import read_artifact, save_artifact
from vlmds.models.assemble import load_model
from vlmds.models.vision import load_vision_tower
from vlmds.planning.plan import plan_experiment
from vlmds.runs.folder import RunFolder
from vlmds.runs.initial import COPY, initial_projector, keep_initial
from vlmds.runs.lineage import inheritance

CPU = torch.device("cpu")


def edit(folder, **lineage):
    """Add to the lineage of an artifact."""
    path = folder / "artifact.json"
    meta = json.loads(path.read_text())
    meta["lineage"] |= lineage
    path.write_text(json.dumps(meta))


def change(file, part=""):
    """Change a tensor of the file, one of this part."""
    tensors = load_file(file)
    tensors[min(name for name in tensors if part in name)] += 1
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture(scope="module")
def sources(models, tmp_path_factory):
    """Artifacts of e3 and e7 with an adapter, and models: wide, and with another LLM or another tower of the
    same sizes. "plain" is e3 without the hashes of its models."""
    folder = tmp_path_factory.mktemp("sources")
    tower = load_vision_tower(load_experiment("e3", tiny.settings(models)).vision, torch.float32, CPU)
    weights = {"llm/model.safetensors": sha256_of(models / "qwen3" / "model.safetensors"), "llm/tokenizer": "any"}
    for exp in ("e3", "e7"):
        made(models, folder / exp, exp)
    shutil.copytree(folder / "e3", folder / "plain")
    for exp in ("e3", "e7"):
        edit(folder / exp, tower=tower.fingerprint(), weights=weights)
    tiny.make_models(folder / "wide", width=128)
    for name, file, part in (("llm", "qwen3", "model"), ("tower", "clip", "vision_model")):
        shutil.copytree(models, folder / name)
        change(folder / name / file / "model.safetensors", part)
    shutil.copytree(models / "qwen3", folder / "renamed")
    return folder


def settings(models, *more, exp="e3"):
    return [*tiny.settings(models), *(tiny.RESAMPLER if exp == "e7" else []), *more]


REFUSED = [  # source, our experiment, our settings (S: the folder of sources), message
    ("e3", "e1", [], 'was trained with projector.type "mlp", not "linear"; set projector.type=mlp, or name'),
    ("e7", "e7", ["projector.num_heads=2"], "projector.num_heads 4, not 2; set projector.num_heads=4, or"),
    ("e7", "e7", ["projector.num_queries=8", "projector.depth=1"], "set projector.num_queries=4 projector.depth=2, or"),
    ("e3", "e3", ["vision.pool=2"], "trained with vision.pool 1, not 2; set vision.pool=1, or"),
    ("e3", "e3", ["vision.feature_layer=-2"], "vision.feature_layer -1, not -2"),
    ("e7", "e7", ["data.num_frames=8"], "times of 4 frames, but data.num_frames is 8; set data.num_frames=4, or"),
    ("e3", "e3", ["llm.model=S/wide/qwen3"], "of width 64, but S/wide/qwen3 has 128; set llm.model to that model"),
    ("e3", "e3", ["llm.model=S/llm/qwen3"], "but S/llm/qwen3 has other weights; set llm.model to that model, or"),
    ("plain", "e3", ["llm.model=S/renamed"], "but S/renamed has another name; set llm.model to that model, or"),
    ("e3", "e3", ["vision.model=S/tower/clip"], "but S/tower/clip has other weights; set vision.model to that"),
    ("nowhere", "e3", [], "projector.init: S/nowhere: no such folder; give an artifact, or owner/name of the hub"),
]


@pytest.mark.parametrize(("source", "exp", "more", "message"), REFUSED)
def test_the_plan_and_the_doctor_name_what_does_not_fit(models, sources, source, exp, more, message, capsys, tmp_path):
    more = [text.replace("S/", f"{sources}/") for text in [f"projector.init=S/{source}", *more]]
    words = settings(models, *more, exp=exp)
    assert main(["plan", "--exp", exp, "--set", *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("vlmds: projector.init: ") and message.replace("S/", f"{sources}/") in error
    context = CheckContext(load_experiment(exp, words), tmp_path, 30, 1, None, CPU)
    (found,) = findings_within(30, lambda: check_start(context))
    assert found.level == FAILED and found.text == error.removeprefix("vlmds: ")


@pytest.mark.parametrize(
    ("source", "exp", "more"),
    [
        ("e3", "e3", ["data.num_frames=8"]),
        ("e7", "e7", []),
        ("e3", "e3", ["llm.model=S/renamed"]),
        ("plain", "e4", ["llm.model=S/llm/qwen3"]),
    ],
)
def test_what_fits_is_named(models, sources, source, exp, more, tmp_path):
    """Patch by patch, a projector does not depend on the number of frames; neither do folders of the same weights
    differ, nor, without recorded hashes, models of the same name."""
    words = settings(models, f"projector.init={sources / source}", *more, exp=exp)
    experiment = load_experiment(exp, [text.replace("S/", f"{sources}/") for text in words])
    line = f"projector.init: stage finetune of {sources / source}, sha256 "
    assert line in plan_experiment(experiment)
    (found,) = check_start(CheckContext(experiment, tmp_path, 30, 1, None, CPU))
    assert found.level == OK and found.text.startswith(line)
    assert "adapter, which is not taken" in found.text


def test_a_damaged_projector_is_refused(models, sources, tmp_path):
    folder = shutil.copytree(sources / "e3", tmp_path / "damaged")
    change(folder / "projector.safetensors")
    with pytest.raises(InputError, match="its sha256 is not the one in artifact.json"):
        plan_experiment(load_experiment("e3", settings(models, f"projector.init={folder}")))


def test_the_start_is_null_by_default_and_set_after_the_type(models):
    assert load_experiment("e3").projector.init is None and initial_projector(load_experiment("e3")) is None
    assert load_experiment("e3", ["projector.init=a", "projector.type=linear"]).projector.init == "a"


def started(run, experiment, initial):
    """A run folder as after its first start."""
    (run / "artifacts").mkdir(parents=True)
    keep_initial(initial, run)
    folder = RunFolder(run, {"id": "r", "init": initial.record, "starts": []})
    folder.begin(experiment)
    return folder


def test_a_later_start_needs_the_copy_only_and_a_changed_source_is_refused(models, sources, tmp_path):
    source = shutil.copytree(sources / "e3", tmp_path / "source")
    experiment = load_experiment("e3", settings(models, f"projector.init={source}"))
    first = initial_projector(experiment, tmp_path / "run")
    assert first.artifact.folder == source
    run = started(tmp_path / "run", experiment, first).path
    again = initial_projector(experiment, run)
    assert again.artifact.folder == run / COPY and again.record == first.record
    change(source / "projector.safetensors")
    meta = json.loads((source / "artifact.json").read_text())
    meta["files"]["projector.safetensors"] = sha256_of(source / "projector.safetensors")
    (source / "artifact.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="has other weights .* than .*run started from .*; restore them, or"):
        initial_projector(experiment, run)
    assert initial_projector(experiment, tmp_path / "new").record != first.record
    (source / "artifact.json").unlink()
    assert initial_projector(experiment, run).record == first.record
    shutil.rmtree(source)
    assert initial_projector(experiment, run).record == first.record
    with pytest.raises(InputError, match="no such folder"):
        initial_projector(experiment, tmp_path / "new")


def test_a_run_folder_stands_for_the_stage_that_was_the_last_finished_one(models, sources, tmp_path):
    """Also when a later stage has finished meanwhile."""
    source = tmp_path / "source"
    experiment = load_experiment("e3", settings(models))
    RunFolder(source, {"id": "abcd", "starts": []}).begin(experiment)
    save_artifact(source / "artifacts" / "align", load_model(experiment, CPU).captioner, experiment, "align", {})
    experiment = load_experiment("e3", settings(models, f"projector.init={source}"))
    first = initial_projector(experiment)
    assert first.record["id"] == "abcd" and first.record["path"] == str(source / "artifacts" / "align")
    assert str(first).startswith(f"projector.init: stage align of {source / 'artifacts' / 'align'} (abcd), sha256 ")
    assert "adapter" not in str(first)
    run = started(tmp_path / "run", experiment, first).path
    shutil.copytree(sources / "e3", source / "artifacts" / "finetune")
    assert initial_projector(experiment, run).record == first.record
    assert initial_projector(experiment).record["stage"] == "finetune"


def test_from_another_run_that_began_elsewhere_is_refused(two_ranks, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(two_ranks, other, ignore=shutil.ignore_patterns("checkpoints"))
    record = RunFolder.read(other)
    experiment = load_experiment(other / "experiment.yaml", ["projector.init=a"])
    run = RunFolder(tmp_path / "run", record | {"init": {"projector_sha256": "1"}})
    with pytest.raises(InputError, match="did not start from projector.init a; leave one of the two out"):
        inheritance(other, experiment, run)
    RunFolder(other, record | {"init": {"projector_sha256": "1"}}).update()
    assert list(inheritance(other, experiment, run)) == ["align"]
    # A run without projector.init still takes such a stage, as --from does not compare how it was trained.
    plain = load_experiment(other / "experiment.yaml")
    assert list(inheritance(other, plain, RunFolder(tmp_path / "run", record))) == ["align"]


def test_the_projector_alone_is_for_other_trainings_only(models, sources, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", "--run", str(sources / "e3"), "--output", str(out), "--format", "projector"]) == 0
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "artifact.json",
        "experiment.yaml",
        "projector.safetensors",
    }
    card = (out / "README.md").read_text()
    assert "Only the projector is in this folder." in card and "  init: this folder, or owner/name\n" in card
    assert "이 폴더에는 프로젝터만 있으며" in card
    meta = read_artifact(out).meta
    assert meta["version"] == 3 and meta["left_out"] == "adapter" and meta["adapter"] is False
    assert (out / "projector.safetensors").read_bytes() == (sources / "e3" / "projector.safetensors").read_bytes()
    assert plan_experiment(load_experiment("e3", settings(models, f"projector.init={out}")))
    with pytest.raises(InputError, match="the projector alone of a model with an adapter; start a training from it"):
        VideoCaptioner.from_pretrained(out, device="cpu")
    for words, message in (
        (["--format", "hf-llava"], "the projector alone of a model with an adapter"),
        (["--format", "peft"], "has no adapter"),
        (["--format", "projector", "--merge"], "--merge: --format projector has no language model"),
    ):
        assert main(["export", "--run", str(out), "--output", str(tmp_path / "no"), *words]) == 2
        assert message in capsys.readouterr().err


def test_a_projector_that_never_had_an_adapter_captions_too(models, tmp_path):
    experiment = load_experiment("e3", settings(models, f"projector.init={tmp_path / 'private'}"))
    model = load_model(experiment, CPU)
    save_artifact(tmp_path / "align", model.captioner, experiment, "align", {})
    export_run(tmp_path / "align", tmp_path / "out", format="projector")
    assert read_artifact(tmp_path / "out").meta["version"] == 2
    assert "private" not in (tmp_path / "out" / "experiment.yaml").read_text()
    loaded = VideoCaptioner.from_pretrained(tmp_path / "out", device="cpu").model.captioner.projector.state_dict()
    for name, tensor in model.captioner.projector.state_dict().items():
        assert torch.equal(loaded[name], tensor)


def test_of_an_artifact_on_the_hub_only_the_projector_is_downloaded(models, sources, tmp_path, monkeypatch, capsys):
    with hubs.running() as hub:
        hubs.use(monkeypatch, hub.url, tmp_path)
        words = ["--output", str(tmp_path / "out"), "--push-to-hub", "team/aligned"]
        assert main(["export", "--run", str(sources / "e3"), *words]) == 0
        experiment = load_experiment("e3", settings(models, "projector.init=team/aligned"))
        initial = initial_projector(experiment)
        commit = hub.find("team/aligned", "main")[0]
        assert initial.record["commit"] == commit and f"({commit})" in plan_experiment(experiment)
        assert {path.name for path in initial.artifact.folder.iterdir()} == {
            "artifact.json",
            "experiment.yaml",
            "projector.safetensors",
        }
        assert "adapter, which is not taken" in str(initial)
        with pytest.raises(InputError, match=r"^projector.init: artifact: http.* has no repository team/none"):
            initial_projector(load_experiment("e3", ["projector.init=team/none"]))
        capsys.readouterr()
        assert main(["fetch", "--exp", "e3", "--set", *settings(models, "projector.init=team/aligned")]) == 0
        assert capsys.readouterr().out.startswith("projector.init: stage finetune of ")
    assert initial_projector(experiment).record == initial.record  # without a hub, the one that is here
