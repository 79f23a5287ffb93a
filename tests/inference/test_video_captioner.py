"""Artifacts and captions, with tiny random models."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests import tiny
from tests.clips import write_video
from vlmds.cli import main
from vlmds.errors import InputError, SampleError
from vlmds.experiments.reading import load_experiment
from vlmds.inference.generation import GenerationOptions
from vlmds.inference.video_captioner import VideoCaptioner
from vlmds.models.artifact import load_artifact, save_artifact
from vlmds.models.assemble import load_model
from vlmds.models.language import add_adapter

CPU = torch.device("cpu")


def made(models, folder, exp="e7", *overrides):
    """An artifact with random weights that are not those of a fresh model."""
    extra = tiny.RESAMPLER if exp in ("e5", "e6", "e7", "e8") else []
    experiment = load_experiment(exp, [*tiny.settings(models), *extra, *overrides])
    model = load_model(experiment, CPU)
    model.captioner.llm = add_adapter(model.captioner.llm, experiment.peft)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, p in model.captioner.named_parameters():
            if "lora_" in name or name.startswith("projector"):
                p.add_(torch.randn_like(p) * 0.1)
    save_artifact(folder, model.captioner, experiment, "finetune", {})
    return model.captioner


@pytest.mark.parametrize("exp", ["e1", "e4", "e5", "e8"])
def test_an_artifact_loads_back_bit_for_bit(models, tmp_path, exp):
    original = made(models, tmp_path / "artifact", exp).state_dict()
    loaded = VideoCaptioner.from_pretrained(tmp_path / "artifact").model.captioner.state_dict()
    assert loaded.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(loaded[name], tensor), name


def damage(folder, what):
    path = folder / "projector.safetensors"
    tensors = load_file(path)
    name = next(iter(sorted(tensors)))
    if what == "missing":
        del tensors[name]
    elif what == "extra":
        tensors["other.weight"] = torch.zeros(1)
    elif what == "shape":
        tensors[name] = torch.zeros(3, 3)
    if what == "cut":
        path.write_bytes(path.read_bytes()[:200])
    else:
        save_file(tensors, path)
    if what == "adapter":
        path = folder / "adapter" / "adapter_model.safetensors"
        tensors = load_file(path)
        tensors.pop(sorted(tensors)[0])
        save_file(tensors, path)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "projector.safetensors: missing tensor"),
        ("extra", "projector.safetensors: unexpected tensor other.weight"),
        ("shape", r"has shape \[3, 3\], but the model needs"),
        ("cut", "projector.safetensors: cannot be read"),
        ("adapter", "adapter_model.safetensors: missing tensor"),
    ],
)
def test_loading_is_strict(models, tmp_path, what, message):
    made(models, tmp_path / "artifact")
    damage(tmp_path / "artifact", what)
    with pytest.raises(InputError, match=message):
        VideoCaptioner.from_pretrained(tmp_path / "artifact")


def test_another_llm_width_is_refused_with_both_numbers(models, tmp_path):
    made(models, tmp_path / "artifact")
    other = tmp_path / "other"
    shutil.copytree(models / "qwen3", other)
    rows = Qwen3ForCausalLM.from_pretrained(other).config.vocab_size
    Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=rows,
            hidden_size=96,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
    ).save_pretrained(other)
    with pytest.raises(InputError, match="width 64, but .* hidden_size 96"):
        VideoCaptioner.from_pretrained(tmp_path / "artifact", overrides=[f"llm.model={other}"])


@pytest.mark.parametrize(("part", "key"), [("qwen3", "llm.model"), ("clip", "vision.model")])
def test_a_folder_whose_weights_have_another_width_is_refused_with_both(models, tmp_path, part, key):
    other = tmp_path / part
    shutil.copytree(models / part, other)
    config = json.loads((other / "config.json").read_text())
    inner = config.get("vision_config", config)
    old = inner["hidden_size"]
    inner["hidden_size"] = 2 * old
    (other / "config.json").write_text(json.dumps(config))
    experiment = load_experiment("e1", [*tiny.settings(models), f"{key}={other}"])
    with pytest.raises(InputError) as caught:
        load_model(experiment, CPU)
    message = str(caught.value)
    assert key in message and str(old) in message and str(2 * old) in message
    assert "\n" not in message


def test_captions_do_not_depend_on_the_batch(tmp_path):
    """Of a model that says something else to each video and prompt."""
    frames = np.random.RandomState(0).randint(0, 256, (5, tiny.FRAMES, 3, tiny.SIDE, tiny.SIDE))
    frames = frames.astype(np.uint8)
    frames[3:] = frames[2]
    prompts = [None, "무엇?", None, "이 영상에서 무엇이 보입니까? 자세히 말해주세요.", "누구?"]
    texts = [f"{colour} 원이 왼쪽으로 움직입니다" for colour in ("빨간", "파란", "노란", "하얀", "보라색")]
    tiny.make_speaker(
        tiny.make_models(tmp_path / "models", speaking=True),
        tmp_path / "artifact",
        "e7",
        list(zip(frames, prompts, texts, strict=True)),
    )
    captioner = VideoCaptioner.from_pretrained(tmp_path / "artifact")
    for beams in (1, 3):
        options = GenerationOptions(num_beams=beams, max_new_tokens=12)
        together = captioner.caption_frames(frames, prompts, options)
        alone = [captioner.caption_frames(f[None], [p], options)[0] for f, p in zip(frames, prompts)]
        assert together == alone
        assert all(map(str.startswith, together, texts))


def test_captions_of_files_and_of_what_is_no_video(models, tmp_path, capsys):
    made(models, tmp_path / "artifact")
    videos = [str(write_video(tmp_path / f"{i}.mp4", frames=10 + i)) for i in range(3)]
    (tmp_path / "bad.mp4").write_bytes(b"not a video")
    videos.insert(1, str(tmp_path / "bad.mp4"))
    captioner = VideoCaptioner.from_pretrained(tmp_path / "artifact")
    results = list(captioner.caption(videos, GenerationOptions(max_new_tokens=6), batch_size=2))
    assert [isinstance(r, SampleError) for r in results] == [False, True, False, False]
    code = main(["caption", "--run", str(tmp_path / "artifact"), "--json", "--max-new-tokens", "6", *videos])
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert code == 2 and f"{videos[1]}: " in printed.err
    assert [line["caption"] for line in lines] == [r for r in results if isinstance(r, str)]


def test_an_artifact_of_a_stage_without_adapter_makes_none(models, tmp_path):
    experiment = load_experiment("e3", tiny.settings(models))
    captioner = load_model(experiment, CPU).captioner
    save_artifact(tmp_path / "artifact", captioner, experiment, "align", {})
    fresh = load_model(experiment, CPU).captioner
    with torch.no_grad():
        fresh.projector.net[0].weight.zero_()
    load_artifact(tmp_path / "artifact", fresh)
    assert torch.equal(fresh.projector.net[0].weight, captioner.projector.net[0].weight)
    assert not any("lora_" in name for name, _ in fresh.named_parameters())


def test_an_artifact_needs_no_attention_that_it_was_trained_with(models, tmp_path):
    made(models, tmp_path / "artifact")
    path = tmp_path / "artifact" / "experiment.yaml"
    text = path.read_text()
    path.write_text(text.replace("attention: auto", "attention: flash_attention_3"))
    assert path.read_text() != text
    llm = VideoCaptioner.from_pretrained(tmp_path / "artifact", device="cpu").model.captioner.llm
    assert llm.config._attn_implementation == "sdpa"
    with pytest.raises(InputError, match="llm.attention: flash_attention_3 needs a GPU"):
        VideoCaptioner.from_pretrained(
            tmp_path / "artifact", device="cpu", overrides=["llm.attention=flash_attention_3"]
        )
