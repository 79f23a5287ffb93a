"""Refused exports, results in the model card, and special cases of the LLaVA form."""

import json
import shutil

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.activations import ACT2FN
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from tests import tiny
from tests.evaluation.conftest import make_run, models, shards  # noqa: F401, fixtures
from tests.inference.test_video_captioner import made
from vlmds.cli import main
from vlmds.errors import InputError
from vlmds.evaluation.evaluate import evaluate_run
from vlmds.export.folder import export_run
from vlmds.export.llava import linear_as_mlp
from vlmds.files import sha256_of
from vlmds.inference.generation import GenerationOptions
from vlmds.inference.video_captioner import VideoCaptioner
from vlmds.runs.lineage import base_files, tokenizer_sha256


def refused(capsys, run, out, *options) -> str:
    """The error line of a refused export, which leaves nothing behind."""
    there = set(out.parent.iterdir())
    capsys.readouterr()
    code = main(["export", "--run", str(run), "--output", str(out), "--device", "cpu", *options])
    *notes, error = capsys.readouterr().err.splitlines()
    assert code == 2 and error.startswith("vlmds: ")
    assert all(note.startswith("vlmds: the logits are compared on random frames") for note in notes)
    assert set(out.parent.iterdir()) == there
    return error


def test_a_run_s_card_has_results_on_real_clips(models, shards, tmp_path):  # noqa: F811
    run = make_run(models, shards, tmp_path / "run", "e2")
    evaluate_run(run, clips=4, generation=GenerationOptions(max_new_tokens=6), device="cpu")
    parity = export_run(run, tmp_path / "out", merge=True, device="cpu")
    assert parity.source == "split val of the run's data" and parity.clips == 8
    assert parity.tokens > 80 and parity.top1 == 1 and parity.kl < 1e-9
    card = (tmp_path / "out" / "README.md").read_text()
    value = json.loads((run / "evaluation/val/metrics.json").read_text())["metrics"]["chrf++@char"]
    shown = f"{value['value']:.2f} | {value['low']:.2f} to {value['high']:.2f}"
    assert f"| chrf++@char | {shown} |" in card
    assert "Split val, 4 clips" in card and str(parity) in card
    doubtful = json.loads((run / "evaluation/val/metrics.json").read_text())["looking"]["warnings"]
    assert (card.count("\nWarning: "), card.count("- 경고: ")) == (len(doubtful), len(doubtful))
    folder = VideoCaptioner.from_pretrained(tmp_path / "out", device="cpu")
    assert folder.experiment.data.path is None  # paths of the team's data are private
    assert str(shards) not in card
    # Results of other weights are not this model's.
    artifact = run / "artifacts" / "finetune"
    meta = json.loads((artifact / "artifact.json").read_text())
    meta["files"]["projector.safetensors"] = "0" * 64
    (artifact / "artifact.json").write_text(json.dumps(meta))
    export_run(run, tmp_path / "copy")
    assert "Not evaluated yet" in (tmp_path / "copy" / "README.md").read_text()


def test_a_refused_export_prints_one_line(models, shards, tmp_path, capsys):  # noqa: F811
    run = make_run(models, shards, tmp_path / "run", "e4")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    assert f"--output {out}: exists already" in refused(capsys, run, out)
    out = tmp_path / "new"
    assert "--merge: --format peft" in refused(capsys, run, out, "--format", "peft", "--merge")
    assert "neither a run folder" in refused(capsys, tmp_path / "nothing", out)
    align = run / "artifacts" / "align"
    meta = json.loads((align / "artifact.json").read_text())
    (align / "artifact.json").write_text(json.dumps(meta | {"adapter": False, "stage": "align"}))
    for options in (["--merge"], ["--format", "peft"]):
        assert "stage align has no adapter" in refused(capsys, align, out, *options)
    shutil.rmtree(run / "artifacts" / "finetune")
    error = refused(capsys, run, out)
    assert "its last stage, finetune, is not finished" in error and str(align) in error
    shutil.rmtree(align)
    assert "no stage of this run is finished" in refused(capsys, run, out)


def test_changed_base_weights_are_refused(models, tmp_path, capsys):  # noqa: F811
    made(models, tmp_path / "run", "e1")
    experiment = VideoCaptioner.from_pretrained(tmp_path / "run", device="cpu").experiment
    path = tmp_path / "run" / "artifact.json"
    meta = json.loads(path.read_text())
    meta["lineage"]["weights"] = {
        **{name: sha256_of(file) for name, file in base_files(experiment).items()},
        "llm/tokenizer": tokenizer_sha256(experiment.llm),
    }
    path.write_text(json.dumps(meta))
    export_run(tmp_path / "run", tmp_path / "good", merge=True, device="cpu")
    other = tmp_path / "other"
    shutil.copytree(models / "qwen3", other)
    weights = next(other.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    error = refused(capsys, tmp_path / "run", tmp_path / "out", "--merge", "--set", f"llm.model={other}")
    assert f"llm.model: model.safetensors of {other} is not the one" in error
    # A folded folder cannot be exported again.
    error = refused(capsys, tmp_path / "good", tmp_path / "out", "--format", "hf-llava")
    assert "folded in already" in error


def test_a_failed_export_leaves_nothing(models, tmp_path, monkeypatch):  # noqa: F811
    made(models, tmp_path / "run", "e5")
    monkeypatch.setattr("vlmds.export.folder.model_card", lambda facts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_run(tmp_path / "run", tmp_path / "out", format="hf-llava", device="cpu")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("options", [["vision.feature_layer=-2"], ["vision.pool=2"]])
def test_layer_and_pooling_are_exported(models, tmp_path, options):  # noqa: F811
    made(models, tmp_path / "run", "e3", *options)
    parity = export_run(tmp_path / "run", tmp_path / "out", format="hf-llava", device="cpu")
    assert parity.top1 == 1 and parity.kl < 1e-8
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    pooled = options == ["vision.pool=2"]  # which LLaVA cannot do
    assert config["model_type"] == ("vlmds" if pooled else "llava")
    assert config.get("vision_feature_layer", -2) == -2


@pytest.mark.parametrize(
    ("dtype", "widths", "expected"),
    [(torch.float32, (48, 128), "relu"), (torch.float32, (48, 64), "linear"), (torch.bfloat16, (1024, 4096), "relu")],
)
def test_a_linear_projector_is_exactly_an_mlp(dtype, widths, expected):
    torch.manual_seed(0)
    linear = nn.Linear(*widths, dtype=dtype).requires_grad_(False)
    act, first, second = linear_as_mlp(linear)
    assert act == expected
    x = torch.randn(7, widths[0], dtype=dtype)
    ours, theirs = linear(x), second(ACT2FN[act](first(x)))
    # Only the order of the sums differs; in bfloat16 that can move the one rounding at the end.
    tolerance = 1e-6 if dtype is torch.float32 else 2**-8
    assert (ours - theirs).abs().max() <= tolerance * ours.abs().max()
    exact = linear.double()(x.double())
    assert (theirs.double() - exact).abs().max() <= 1.1 * (ours.double() - exact).abs().max() + 1e-6


def test_a_wide_linear_projector_is_a_relu_llava(tmp_path):
    wide = tiny.make_models(tmp_path / "wide", width=128)  # more than twice CLIP's 48
    made(wide, tmp_path / "run", "e1")
    parity = export_run(tmp_path / "run", tmp_path / "out", format="hf-llava", device="cpu")
    assert parity.top1 == 1 and parity.kl < 1e-8
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    projector = model.model.multi_modal_projector
    assert isinstance(projector, LlavaMultiModalProjector) and isinstance(projector.act, nn.ReLU)
    assert "--limit-mm-per-prompt" in (tmp_path / "out" / "README.md").read_text()


def test_the_real_qwen_template_is_exported(qwen_tokenizer_folder, tmp_path):
    qwen = tiny.make_models(tmp_path / "models", AutoTokenizer.from_pretrained(qwen_tokenizer_folder))
    made(qwen, tmp_path / "run", "e3")
    parity = export_run(tmp_path / "run", tmp_path / "out", format="hf-llava", device="cpu")
    assert parity.top1 == 1 and parity.kl < 1e-8
    assert json.loads((tmp_path / "out" / "config.json").read_text())["image_token_index"] == 151655


def test_a_vocabulary_without_room_for_an_image_is_refused(models, tmp_path, capsys):  # noqa: F811
    renamed = tmp_path / "models"
    shutil.copytree(models, renamed)
    for path in (renamed / "qwen3").glob("*.json"):
        path.write_text(path.read_text(encoding="utf-8").replace("<|image_pad|>", "<|other_pad|>"))
    made(renamed, tmp_path / "run", "e3")
    error = refused(capsys, tmp_path / "run", tmp_path / "out", "--format", "hf-llava")
    assert "no row to spare" in error
    with pytest.raises(InputError, match="--format gguf"):
        export_run(tmp_path / "run", tmp_path / "out", format="gguf")
