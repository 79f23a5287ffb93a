"""The fixtures of a version's formats: `python -m tests.formats.make FOLDER`.

    models/               the tiny CLIP and Qwen3 that everything below was made with
    video/ frames/ features/   a packed dataset in each store: two training, two validation clips
    run/                  a finished run of e4 with checkpoints, artifacts and an evaluation
    captions.jsonl        a record of `vlmds caption`, and its settings
    values.json           what the version read of all that (tests.formats.values)

A folder that is there is never changed: make another one when a format changes.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, Qwen3Config, Qwen3ForCausalLM

from tests.clips import write_manifest, write_video
from tests.formats.values import MODELS, values
from tests.training.forked import environment
from tests.training.launch import command
from vlmds.captioning.job import caption_to_file
from vlmds.demo.pretrain import train_tokenizer
from vlmds.evaluation.evaluate import evaluate_run
from vlmds.experiments.reading import load_experiment
from vlmds.inference.generation import GenerationOptions
from vlmds.models.vision import load_vision_tower
from vlmds.packing.convert import convert
from vlmds.packing.pack import pack

SIDE, FRAMES = 32, 2
SETTINGS = [
    *MODELS,
    "llm.load_in_4bit=false",
    "llm.dtype=float32",
    "peft.dropout=0",
    "peft.r=2",
    f"data.num_frames={FRAMES}",
    "data.num_workers=0",
    "training.micro_batch=2",
    "training.global_batch=2",
    "training.validate_every=2",
    "training.checkpoint_every=2",
    "training.keep_checkpoints=2",
    "logging.every=1",
    "logging.tensorboard=false",
    *(f"stages.{number}.{key}" for number in (0, 1) for key in ("epochs=null", f"steps={2 + number}")),
]


def make_models() -> None:
    torch.manual_seed(0)
    vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    text = dict(hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    clip = CLIPModel(
        CLIPConfig(
            vision_config=dict(**vision, image_size=SIDE, patch_size=16),
            text_config=dict(**text, vocab_size=8, max_position_embeddings=8, bos_token_id=0, eos_token_id=1),
            projection_dim=4,
        )
    )
    clip.save_pretrained("models/clip")
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained("models/clip")
    tokenizer = train_tokenizer([], vocab_size=300)
    llm = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    llm.save_pretrained("models/qwen3")
    tokenizer.save_pretrained("models/qwen3")


def make_stores() -> None:
    Path("clips").mkdir()
    rows = [
        {"video": f"v{i}.mp4", "caption": f"{i}번 영상입니다.", "split": "val" if i > 1 else "train"} for i in range(4)
    ]
    rows[2] |= {"caption": ["하나", "둘"], "prompt": "무엇?"}
    for i, row in enumerate(rows):
        write_video(f"clips/{row['video']}", frames=6 + i, width=SIDE, height=SIDE)
    pack(write_manifest(Path("clips/manifest.jsonl"), rows), "video", store="video", progress=False)
    convert("video", "frames", store="frames", num_frames=FRAMES, image_size=SIDE, progress=False)
    vision = load_experiment("e4", SETTINGS).vision
    tower = load_vision_tower(vision, torch.bfloat16, torch.device("cpu"))
    convert("frames", "features", store="features", tower=tower, tower_name=vision.model, progress=False)


def make_run() -> None:
    """Started as a user does; the host's name, which is private, is replaced."""
    words = ["--exp", "e4", "--output", "run", "--data", "frames", "--set", *SETTINGS]
    subprocess.run(command(0, *words), env=environment(), check=True)
    record = json.loads(Path("run/run.json").read_text())
    for start in record["starts"]:
        start["host"] = "host"
    Path("run/run.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    generation = GenerationOptions(max_new_tokens=6)
    evaluate_run("run", generation=generation, device="cpu", progress=False)
    videos = ["clips/v0.mp4", "clips/v1.mp4"]
    caption_to_file("run", "captions.jsonl", videos=videos, generation=generation, device="cpu", progress=False)


def main(folder: Path) -> None:
    if folder.exists():
        sys.exit(f"{folder} is there: what a version wrote stays as it is")
    with TemporaryDirectory(prefix="vlmds-formats-") as work:
        os.chdir(work)
        make_models()
        make_stores()
        make_run()
        shutil.rmtree("clips")
        Path("values.json").write_text(json.dumps(values(Path(work)), indent=1, ensure_ascii=False) + "\n")
        shutil.copytree(work, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
