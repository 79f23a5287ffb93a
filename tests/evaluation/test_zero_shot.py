"""Captions of a packed dataset by models of other families, with random weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import hub as hubs
from tests import outside_models, tiny
from tests.evaluation.planted import plant
from tests.training.launch import forked
from vlmds.cli import main
from vlmds.evaluation.outside_record import read_outside
from vlmds.evaluation.saved import read_evaluation
from vlmds.evaluation.zero_shot import evaluate_model
from vlmds.inference.options import GenerationOptions
from vlmds.inference.zero_shot import ZeroShotCaptioner, without_bars

OPTIONS = dict(dtype="float32", batch_size=1, generation=GenerationOptions(max_new_tokens=4), device="cpu")
WORDS = ("--dtype", "float32", "--batch-size", "1", "--max-new-tokens", "4", "--device", "cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("outside")
    return {family: outside_models.make(family, folder / family) for family in outside_models.FAMILIES}


def captions(folder: Path) -> dict[str, str]:
    return {line["key"]: line["caption"] for line in read_evaluation(folder / "evaluation" / "val")[1]}


@pytest.fixture(scope="module")
def llava(made, shards, tmp_path_factory) -> Path:
    return evaluate_model(
        str(made["llava"]), data=str(shards), output=tmp_path_factory.mktemp("runs") / "llava", **OPTIONS
    )


@pytest.mark.parametrize("family", ["llava-onevision", "qwen3-vl"])
def test_other_families_caption_all_clips(made, shards, tmp_path, family):
    folder = evaluate_model(str(made[family]), data=str(shards), output=tmp_path / family, **OPTIONS)
    metrics, lines = read_evaluation(folder / "evaluation" / "val")
    assert len(lines) == metrics["clips"] == 11 and metrics["unreadable"] == 0
    timing = metrics["timing"]
    assert timing["captioned"] == 11 and timing["captioning_seconds"] > 0 and timing["memory_gib"] > 0
    recorded = read_outside(folder)
    assert (recorded.name, recorded.kind, recorded.licence) == (family, "outside model", "apache-2.0")
    assert metrics["settings"]["num_frames"] == tiny.FRAMES and metrics["settings"]["prompt"]


@pytest.mark.parametrize("family", outside_models.FAMILIES)
def test_the_model_gets_every_frame_in_order(made, family):
    captioner = ZeroShotCaptioner(made[family], family, torch.device("cpu"), "float32", GenerationOptions())
    frames = np.stack([np.full((3, 36, 64), shade, np.uint8) for shade in (0, 80, 160, 240)])
    inputs = captioner._inputs([frames, frames[::-1]], ["무엇?", "무엇?"], [2.0, None])
    pixels = inputs["pixel_values"].flatten(1)
    shades = pixels.reshape(8, -1).mean(dim=1).tolist()  # pictures of one size: as many rows each
    assert shades[:4] == sorted(shades[:4]) and len(set(shades[:4])) == 4
    assert shades[4:] == pytest.approx(shades[:4][::-1])
    image = captioner.processor.tokenizer.convert_tokens_to_ids(captioner.processor.image_token)
    count = (inputs["input_ids"] == image).sum(dim=1).tolist()
    assert count[0] == count[1] > 0 and count[0] % 4 == 0


@pytest.mark.distributed
def test_two_ranks_go_on_with_what_is_there(made, llava, shards, tmp_path):
    own = captions(llava)
    words = ["--model", str(made["llava"]), "--data", str(shards), "--output", str(tmp_path / "llava"), *WORDS]
    half = tmp_path / "llava" / "evaluation" / "val"
    shutil.copytree(llava, tmp_path / "llava")
    (half / "metrics.json").unlink()
    kept = [json.loads(line) for line in (half / "predictions.jsonl").read_text("utf-8").splitlines()][:4]
    (half / "predictions.jsonl").unlink()
    records = [{"position": line["position"], "key": line["key"], "caption": "이미 있는 캡션"} for line in kept]
    (half / "parts").mkdir()
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (half / "parts" / "00000.jsonl").write_text(text + '{"position": 4, "cap', encoding="utf-8")  # cut by a kill
    printed = forked(2, "-m", "vlmds.cli", "evaluate", *words, log=tmp_path / "log")
    assert printed.count("saved: ") == 1
    found = captions(tmp_path / "llava")
    done = {record["key"] for record in records}
    assert {key for key, caption in found.items() if caption == "이미 있는 캡션"} == done
    assert {k: c for k, c in found.items() if k not in done} == {k: c for k, c in own.items() if k not in done}
    timing = read_evaluation(half)[0]["timing"]
    assert timing["ranks"] == 2 and timing["captioned"] == 7 and timing["resumed"]


def test_a_finished_evaluation_is_not_repeated_and_not_replaced(made, llava, shards, tmp_path):
    shutil.copytree(llava, tmp_path / "llava")
    path = tmp_path / "llava" / "evaluation" / "val" / "metrics.json"
    before = path.stat().st_mtime_ns
    words = ["evaluate", "--model", str(made["llava"]), "--data", str(shards), "--output", str(tmp_path / "llava")]
    assert main([*words, *WORDS]) == 0 and path.stat().st_mtime_ns == before
    assert main([*words, *WORDS, "--prompt", "무엇이 보입니까?"]) == 2 and path.stat().st_mtime_ns == before
    assert main([*words, *WORDS, "--prompt", "무엇이 보입니까?", "--again"]) == 0
    assert read_evaluation(path.parent)[0]["settings"]["prompt"] == "무엇이 보입니까?"


def test_a_model_of_the_hub_is_downloaded_once_at_a_recorded_commit(made, llava, shards, tmp_path, monkeypatch):
    with hubs.running() as hub:
        commit = hub.add("org/llava", made["llava"])
        hubs.use(monkeypatch, hub.url, tmp_path)
        for name in ("first", "again"):
            folder = evaluate_model("org/llava", data=str(shards), output=tmp_path / name, clips=3, **OPTIONS)
            assert hub.downloads["org/llava/model.safetensors"] == 1
    recorded = read_outside(folder)
    assert (recorded.source, recorded.revision, recorded.licence) == ("org/llava", commit, "apache-2.0")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: shutil.rmtree(model), "no config.json in it"),
        (lambda model: (model / "preprocessor_config.json").unlink(missing_ok=True), None),
        (lambda model: (model / "chat_template.jinja").unlink(missing_ok=True), "has no chat template"),
    ],
    ids=["no folder", "no image processor", "no template"],
)
def test_what_cannot_caption_is_one_line(made, shards, tmp_path, capsys, change, said):
    shutil.copytree(made["llava"], tmp_path / "model")
    change(tmp_path / "model")
    if said is None:  # a language model has no image processor
        tiny.make_models(tmp_path / "tiny")
        model, said = tmp_path / "tiny" / "qwen3", "takes no pictures"
    else:
        model = tmp_path / "model"
        model.mkdir(exist_ok=True)
    words = ["evaluate", "--model", str(model), "--data", str(shards), "--output", str(tmp_path / "out"), *WORDS]
    assert main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error and str(model) in error and "Traceback" not in error


def test_a_control_token_in_the_prompt_is_refused(made, shards, tmp_path, capsys):
    words = ["evaluate", "--model", str(made["llava"]), "--data", str(shards), "--output", str(tmp_path / "out")]
    assert main([*words, *WORDS, "--prompt", "무엇? <|im_end|>"]) == 2
    assert "'<|im_end|>', a control token" in capsys.readouterr().err


def test_bars_of_padding_are_cut_off():
    frames = np.zeros((2, 3, 64, 64), np.uint8)
    frames[:, :, 14:50] = 1  # 16:9 in a square of 64
    assert without_bars(frames, 1920, 1080).shape == (2, 3, 36, 64)
    assert without_bars(frames, 1920, 1080).all()
    assert without_bars(frames, 500, 500).shape == (2, 3, 64, 64)


def test_an_outside_model_is_compared_with_runs(llava, shards, tmp_path, capsys):
    """From one command each; the planted run gets the outside model's clips and references."""
    lines = read_evaluation(llava / "evaluation" / "val")[1]
    run = plant(tmp_path / "e3", "e3", clips=11, references=lambda clip: lines[clip]["references"])
    path = run / "evaluation" / "val" / "predictions.jsonl"
    planted = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for line, other in zip(planted, lines, strict=True):
        line["key"] = other["key"]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in planted), encoding="utf-8")
    assert main(["compare", str(run), str(llava), "-o", str(tmp_path / "report.html")]) == 0
    printed = capsys.readouterr().out
    assert "Build or adopt: 11 videos are too few to decide" in printed
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "apache-2.0" in page and "외부 모델" in page
