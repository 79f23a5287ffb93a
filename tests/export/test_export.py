"""Contents of exported folders, loaded without vlmds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny
from tests.clips import picture, write_video
from tests.inference.test_video_captioner import made
from vlmds.cli import main
from vlmds.errors import InputError
from vlmds.export.folder import export_run
from vlmds.inference.generation import GenerationOptions
from vlmds.inference.video_captioner import VideoCaptioner

ALL = [f"e{n}" for n in range(1, 9)]
BARE = Path(__file__).with_name("bare.py")
TOKENS = 12
GREEDY = GenerationOptions(max_new_tokens=TOKENS)
PROMPT = "이 영상을 설명해주세요."


@pytest.fixture(scope="module")
def artifacts(models, tmp_path_factory):
    root = tmp_path_factory.mktemp("artifacts")
    for exp in ALL:
        made(models, root / exp, exp)
    return root


@pytest.fixture(scope="module")
def captioners(artifacts):
    return {exp: VideoCaptioner.from_pretrained(artifacts / exp, device="cpu") for exp in ALL}


@pytest.fixture(scope="module")
def frames():
    shape = (3, tiny.FRAMES, 3, tiny.SIDE, tiny.SIDE)
    return np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)


@torch.no_grad()
def prompt_logits(captioner, frames):
    """Logits at every position of one clip's prompt: [L, vocabulary]."""
    batch = captioner.builder.collate_generation([None])
    features = captioner.model.features({"frames": torch.from_numpy(frames[None])})
    model = captioner.model.captioner
    return model.llm(inputs_embeds=model.embed(features, batch["input_ids"])).logits[0].numpy()


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(ours).max()


def run_bare(tmp_path, folders, frames):
    np.savez(tmp_path / "job.npz", frames=frames)
    (tmp_path / "job.json").write_text(
        json.dumps({"folders": [str(f) for f in folders], "prompt": PROMPT, "max_new_tokens": TOKENS})
    )
    subprocess.run(
        [sys.executable, "-I", str(BARE), str(tmp_path / "job.npz"), str(tmp_path / "out.npz")],
        check=True,
        capture_output=True,
        text=True,
        env=bare_environment(tmp_path),
    )
    return np.load(tmp_path / "out.npz")


def bare_environment(tmp_path):
    return {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}


def test_all_eight_give_the_same_captions_without_vlmds(artifacts, captioners, frames, tmp_path):
    folders = [tmp_path / exp for exp in ALL]
    for exp, folder in zip(ALL, folders):
        parity = export_run(artifacts / exp, folder, format="hf-llava", device="cpu")
        assert parity.top1 == 1 and parity.kl < 1e-8
    found = run_bare(tmp_path, folders, frames)
    for exp in ALL:
        captioner = captioners[exp]
        expected = captioner.caption_frames(frames, None, GREEDY)
        assert found[f"{exp}/captions"].tolist() == expected, exp
        theirs = found[f"{exp}/logits"]
        assert_close(prompt_logits(captioner, frames[0]), theirs)
        assert np.abs(prompt_logits(captioner, frames[1]) - theirs).max() > 1e-2  # the video matters
    for exp in ("e1", "e4"):
        config = json.loads((tmp_path / exp / "config.json").read_text())
        assert config["architectures"] == ["LlavaForConditionalGeneration"]
        assert "auto_map" not in config and not list((tmp_path / exp).glob("*_vlmds.py"))
    for path in (tmp_path / "e8").glob("*.py"):
        assert "import vlmds" not in path.read_text() and "from vlmds" not in path.read_text()
    card = (tmp_path / "e8" / "README.md").read_text()
    assert "trust_remote_code=True` lets transformers run" in card


@pytest.mark.parametrize("exp", ["e1", "e4", "e5", "e8"])
def test_a_merged_folder_contains_its_own_llm(artifacts, captioners, frames, tmp_path, exp):
    parity = export_run(artifacts / exp, tmp_path / "out", merge=True, device="cpu")
    assert parity.top1 == 1 and parity.clips == 8 and parity.source.startswith("random frames")
    loaded = VideoCaptioner.from_pretrained(tmp_path / "out", device="cpu")
    assert not isinstance(loaded.model.captioner.llm, PeftModel)
    assert_close(prompt_logits(captioners[exp], frames[0]), prompt_logits(loaded, frames[0]))
    assert loaded.caption_frames(frames, None, GREEDY) == captioners[exp].caption_frames(frames, None, GREEDY)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "llm")
    ours = loaded.model.captioner.llm.state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, ours[name]), name
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "llm").chat_template
    with pytest.raises(InputError, match="has its own language model"):
        VideoCaptioner.from_pretrained(tmp_path / "out", overrides=["llm.model=elsewhere"])


@pytest.mark.parametrize("exp", ["e3", "e8"])
def test_a_peft_folder_is_plain_peft(models, artifacts, captioners, frames, tmp_path, exp):
    export_run(artifacts / exp, tmp_path / "out", format="peft")
    base = AutoModelForCausalLM.from_pretrained(models / "qwen3")
    llm = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        ours = captioners[exp].model.captioner.llm(ids).logits
        # Not bit for bit: vlmds computes DoRA in another order than PEFT.
        assert_close(llm(ids).logits.numpy(), ours.numpy())
        with llm.disable_adapter():
            assert (llm(ids).logits - ours).abs().max() > 1
    projector = load_file(tmp_path / "out" / "projector.safetensors")
    for name, tensor in captioners[exp].model.captioner.projector.state_dict().items():
        assert torch.equal(projector[name], tensor)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(models / "qwen3")
    refused = "vLLM refuses DoRA" in (tmp_path / "out" / "README.md").read_text()
    assert refused == (exp == "e8")


def test_a_copy_is_the_artifact_and_has_a_card(artifacts, captioners, frames, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", "--run", str(artifacts / "e7"), "--output", str(out)]) == 0
    assert f"saved: {out}" in capsys.readouterr().out
    loaded = VideoCaptioner.from_pretrained(str(out), device="cpu")
    ours = prompt_logits(captioners["e7"], frames[0])
    assert np.array_equal(prompt_logits(loaded, frames[0]), ours)
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["language"] == "ko" and front["library_name"] == "vlmds"
    assert front["pipeline_tag"] == "video-text-to-text" and "perceiver" in front["tags"]
    assert "base_model" not in front  # a path of this machine
    assert PROMPT in text and "VideoCaptioner.from_pretrained" in text
    assert "Not evaluated yet" in text


def test_the_example_captions_files_as_vlmds_does(artifacts, captioners, tmp_path):
    """One process without vlmds runs the examples of two folders, one after the other."""
    videos = [str(write_video(tmp_path / f"{i}.mp4", frames=10 + 7 * i)) for i in range(3)]
    Image.fromarray(picture(3, 64, 48)).save(tmp_path / "still.png")
    videos.insert(1, str(tmp_path / "still.png"))
    examples = []
    for exp in ("e3", "e6"):
        export_run(artifacts / exp, tmp_path / exp, format="hf-llava", device="cpu")
        config = tmp_path / exp / "generation_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "max_new_tokens": TOKENS}))
        examples.append(str(tmp_path / exp / "example.py"))
    script = (
        "import runpy, sys; sys.modules['vlmds'] = None\n"
        f"for example in {examples}:\n"
        "    sys.argv[0] = example\n"
        "    runpy.run_path(example, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, *videos], check=True, capture_output=True, env=bare_environment(tmp_path)
    )
    expected = ""
    for exp in ("e3", "e6"):
        ours = captioners[exp].caption(videos, GREEDY, workers=1)
        expected += "".join(f"{video}\t{caption}\n" for video, caption in zip(videos, ours))
    assert done.stdout.decode() == expected


def test_an_nf4_experiment_is_folded_into_whole_weights(models, tmp_path):
    made(models, tmp_path / "run", "e4", "llm.load_in_4bit=true", "llm.dtype=bfloat16")
    parity = export_run(tmp_path / "run", tmp_path / "out", merge=True, device="cpu")
    weights = load_file(next((tmp_path / "out" / "llm").glob("*.safetensors")))
    base = load_file(models / "qwen3" / "model.safetensors")
    assert weights.keys() == base.keys()  # no quantisation state
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    assert parity.top1 > 0.9 and parity.kl < 0.05
    loaded = VideoCaptioner.from_pretrained(tmp_path / "out", device="cpu")
    assert not loaded.experiment.llm.load_in_4bit
    assert "trained with NF4" in (tmp_path / "out" / "README.md").read_text()
