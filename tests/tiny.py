"""A tiny random CLIP and Qwen3 in Hugging Face format, and an experiment on them.

`python -m tests.tiny FOLDER --tokenizer DIR` makes them around a tokenizer of one's own; a large
vocabulary wants a larger --width.
"""

import argparse
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerBase, Qwen3Config,
    Qwen3ForCausalLM,
)  # fmt: skip

from vlmds.demo.pretrain import train_tokenizer

SIDE = 28  # pixels; patches of 14, so 4 a frame
FRAMES = 4


def make_models(folder: Path, tokenizer: PreTrainedTokenizerBase | None = None, width: int = 64
                ) -> Path:
    """Write folder/clip and folder/qwen3; returns folder."""
    tokenizer = tokenizer or train_tokenizer(["0번 영상입니다."], vocab_size=600)
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(
        vision_config=dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                           num_attention_heads=4, image_size=SIDE, patch_size=14),
        text_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, vocab_size=8, bos_token_id=0, eos_token_id=1),
    ))
    clip.save_pretrained(folder / "clip")
    CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE},
    ).save_pretrained(folder / "clip")
    llm = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    ))
    with torch.no_grad():  # as after training: frozen embeddings of 0.02 could not give a sharp word
        llm.get_input_embeddings().weight.mul_(20)
    llm.save_pretrained(folder / "qwen3")
    tokenizer.save_pretrained(folder / "qwen3")
    return folder


def settings(models: Path, data: Path | None = None) -> list[str]:
    """Overrides that put a packaged experiment on these models; fp32, no dropout, short stages."""
    overrides = [
        f"vision.model={models / 'clip'}", f"llm.model={models / 'qwen3'}",
        "llm.load_in_4bit=false", "llm.dtype=float32", "peft.dropout=0", "peft.r=4",
        f"data.num_frames={FRAMES}", "data.num_workers=0", "training.micro_batch=2",
        "training.global_batch=4", "training.validate_every=4", "training.checkpoint_every=2",
        "logging.every=1", "logging.tensorboard=false", "training.timeout_minutes=3",
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
