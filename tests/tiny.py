"""A tiny random CLIP and Qwen3 in Hugging Face format, and an experiment on them.

`python -m tests.tiny FOLDER --tokenizer DIR` makes them around a tokenizer of one's own; a large
vocabulary wants a larger --width.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vlmds.demo.pretrain import train_tokenizer
from vlmds.experiments.reading import load_experiment
from vlmds.models.artifact import save_artifact
from vlmds.models.assemble import Model, load_model
from vlmds.models.captioner import IGNORE
from vlmds.models.language import add_adapter
from vlmds.models.sequences import SequenceBuilder, TokenSequence
from vlmds.packing.pack import pack

SIDE = 28  # pixels; patches of 14, so 4 a frame
FRAMES = 4


def make_models(
    folder: Path, tokenizer: PreTrainedTokenizerBase | None = None, width: int = 64, *, speaking: bool = False
) -> Path:
    """Write folder/clip and folder/qwen3; returns folder.

    speaking: for any input the language model generates one word after the other and never ends by
    itself: see :func:`_speak`. :func:`teach` decides which words.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _make_models(folder, tokenizer, width, speaking)


def _make_models(folder: Path, tokenizer: PreTrainedTokenizerBase | None, width: int, speaking: bool) -> Path:
    tokenizer = tokenizer or train_tokenizer(["0번 영상입니다."], vocab_size=600)
    clip = CLIPModel(
        CLIPConfig(
            vision_config=dict(
                hidden_size=48,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=SIDE,
                patch_size=14,
            ),
            text_config=dict(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                vocab_size=8,
                bos_token_id=0,
                eos_token_id=1,
            ),
        )
    )
    clip.save_pretrained(folder / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        folder / "clip"
    )
    llm = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            tie_word_embeddings=not speaking,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    with torch.no_grad():  # as after training: frozen embeddings of 0.02 could not give a sharp word
        llm.get_input_embeddings().weight.mul_(20)
        if speaking:
            _speak(llm.get_output_embeddings().weight, words(tokenizer))
    llm.save_pretrained(folder / "qwen3")
    tokenizer.save_pretrained(folder / "qwen3")
    return folder


def words(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that are a space and a Korean word, an even number of them."""
    found = [i for i in range(len(tokenizer)) if re.fullmatch(" [가-힣]+", tokenizer.decode([i]))]
    return found[: len(found) // 2 * 2]


def _speak(output: torch.Tensor, ids: list[int]) -> None:
    """Plant an output layer, [vocabulary, width], under which a word is always the likeliest token:
    all others have a logit of 0, and of two words that are each other's opposite one has more."""
    rows = torch.randn(len(ids) // 2, output.shape[1]) / 2  # sampled, too, it is nearly always one
    output.zero_()
    output[ids[::2]], output[ids[1::2]] = rows, -rows


Lesson = tuple[np.ndarray, str | None, str]
"""Frames uint8 [FRAMES, 3, SIDE, SIDE], a prompt (None: the experiment's own), and what to say to
them: words of :func:`words`, as in "빨간 원이 왼쪽으로 움직입니다"."""


def make_speaker(models: Path, folder: Path, exp: str, lessons: Sequence[Lesson] = ()) -> None:
    """An artifact on speaking models whose captions begin as the lessons say; without any, the words
    are arbitrary."""
    extra = RESAMPLER if exp in ("e5", "e6", "e7", "e8") else []
    experiment = load_experiment(exp, [*settings(models), *extra])
    with torch.random.fork_rng(devices=[]):
        model = load_model(experiment, torch.device("cpu"))
        model.captioner.llm = add_adapter(model.captioner.llm, experiment.peft)
        if lessons:
            teach(model, experiment.data.prompt, lessons)
    save_artifact(folder, model.captioner, experiment, "finetune", {})


def teach(model: Model, prompt: str, lessons: Sequence[Lesson]) -> None:
    """Train the projector and the adapter of a speaking model until it says what the lessons say: a
    second or two. prompt: the experiment's own."""
    builder = SequenceBuilder(model.tokenizer, prompt, model.captioner.projector.num_tokens)
    frames, prompts, texts = zip(*lessons, strict=True)
    spoken = [model.tokenizer.encode(f" {text}", add_special_tokens=False) for text in texts]
    assert {i for ids in spoken for i in ids} <= set(words(model.tokenizer)), texts
    asked = [builder.prompt_ids(prompt) for prompt in prompts]
    batch = builder.collate_training(
        [TokenSequence(ids + said, [IGNORE] * len(ids) + said) for ids, said in zip(asked, spoken, strict=True)]
    )
    features = model.features({"frames": torch.from_numpy(np.stack(frames))})
    trained = [
        parameter
        for name, parameter in model.captioner.named_parameters()
        if "lora_" in name or name.startswith("projector")
    ]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    model.captioner.eval()
    for _ in range(400):
        optimizer.zero_grad()
        loss = model.captioner(features, **batch) / sum(map(len, spoken))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if loss < 0.01:  # in the mean over the words, so that none is in doubt
            return
    raise AssertionError(f"{loss:.3f} after 400 steps: the model does not learn to speak")


def pack_frames(manifest: Path, out: Path, **options) -> Path:
    """Pack the manifest as a frames store that fits these models; returns ``out``."""
    pack(manifest, out, store="frames", num_frames=FRAMES, image_size=SIDE, progress=False, **options)
    return out


def settings(models: Path, data: Path | None = None) -> list[str]:
    """Overrides that put a packaged experiment on these models; fp32, no dropout, short stages."""
    overrides = [
        f"vision.model={models / 'clip'}",
        f"llm.model={models / 'qwen3'}",
        "llm.load_in_4bit=false",
        "llm.dtype=float32",
        "peft.dropout=0",
        "peft.r=4",
        f"data.num_frames={FRAMES}",
        "data.num_workers=0",
        "training.micro_batch=2",
        "training.global_batch=4",
        "training.validate_every=4",
        "training.checkpoint_every=2",
        "logging.every=1",
        "logging.tensorboard=false",
        "training.timeout_minutes=3",
    ]
    for number in (0, 1):
        overrides += [f"stages.{number}.epochs=null", f"stages.{number}.steps=6"]
    if data is not None:
        overrides.append(f"data.path={data}")
    return overrides


RESAMPLER = ["projector.width=32", "projector.num_queries=4", "projector.num_heads=4"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--width", type=int, default=64)
    args = parser.parse_args()
    make_models(args.folder, AutoTokenizer.from_pretrained(args.tokenizer), args.width)
