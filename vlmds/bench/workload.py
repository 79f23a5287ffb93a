"""The workload of `vlmds bench train`: an experiment with random weights and generated clips, on disk.

All is in one folder, from which each measured process loads the same weights and samples as training
does: two model folders, a packed frames store, and a run folder whose first stage left an artifact
with a projector and an adapter of random numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import av
import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    PretrainedConfig,
    Qwen3Config,
)

from vlmds.data.alike import sampling_of
from vlmds.data.dataset import open_dataset
from vlmds.demo.pretrain import train_tokenizer
from vlmds.errors import InputError
from vlmds.experiments.reading import load_experiment, to_yaml
from vlmds.experiments.schema import Experiment
from vlmds.models.artifact import save_artifact
from vlmds.models.assemble import experiment_projector, meta_models
from vlmds.models.captioner import Captioner
from vlmds.models.pretrained import load_config, published_or_loaded_config
from vlmds.models.vision import vision_half
from vlmds.packing.pack import pack
from vlmds.runs.folder import RunFolder

CLIPS = 8
CAPTION = "한 남자가 공원에서 강아지와 산책하고 있습니다. 날씨는 맑고 나무 사이로 햇빛이 비칩니다."
CAPTION_TOKENS = 32
"""Tokens with loss in each sample, as in a Korean caption of two sentences. As all samples have the same
number, the mean over a micro-batch, which the baselines take, equals the mean over all."""

TINY_VISION = CLIPVisionConfig(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=112,
    patch_size=14,
    projection_dim=64,
)
TINY_LLM = Qwen3Config(
    vocab_size=151_669,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    tie_word_embeddings=False,
)
"""With the full vocabulary, whose logits take most of a straightforward implementation's memory."""
TINY_WIDTH = 128  # inside a projector


@dataclass(frozen=True)
class Workload:
    """A prepared folder. steps: timed optimizer steps of each process, after two steps of warm-up and
    before one whose memory is recorded."""

    folder: Path
    steps: int

    WARM_UP: ClassVar[int] = 2

    @property
    def total_steps(self) -> int:
        return self.WARM_UP + self.steps + 1

    def is_split(self, number: int) -> bool:
        """Whether a GPU's step `number` (from 0) is split into phases: the later half of the timed
        steps, rounded down."""
        return number >= self.WARM_UP + (self.steps + 1) // 2

    @property
    def experiment(self) -> Experiment:
        return load_experiment(self.folder / "experiment.yaml")

    @property
    def stage(self) -> int:
        """Number of the measured stage, the schedule's last."""
        return len(self.experiment.stages) - 1

    def run(self, world_size: int) -> RunFolder:
        """The run folder, with a global batch that gives each rank the experiment's micro-batches."""
        training = self.experiment.training
        batch = training.micro_batch * training.gradient_accumulation * world_size
        path = self.folder / "run"
        return RunFolder(path, {**RunFolder.read(path), "global_batch": batch})

    @property
    def artifact(self) -> Path:
        """The artifact that the stage starts from."""
        return self.folder / "run" / "artifacts" / self.experiment.stages[self.stage - 1].name


def settings(exp: str, tiny: bool, steps: int) -> list[str]:
    """Overrides of an experiment to measure its last stage: no dropout and a constant learning rate,
    because all variants must compute the same, and neither validation nor checkpoints."""
    last = len(load_experiment(exp).stages) - 1
    if last == 0:
        raise InputError(
            f"--exp {exp}: has one stage only; bench train starts the last stage from the artifact of the one before"
        )
    overrides = [
        "peft.dropout=0",
        f"data.max_caption_tokens={CAPTION_TOKENS}",
        "data.max_cut_fraction=null",  # long captions are cut on purpose: all have one length
        "training.validate_every=1000000",
        "training.checkpoint_every=1000000",
        "logging.every=1000000",
        "logging.tensorboard=false",
        f"stages.{last}.epochs=null",
        f"stages.{last}.steps={steps}",
        f"stages.{last}.warmup_ratio=0",
        f"stages.{last}.schedule=constant",
    ]
    if tiny:
        overrides += [*tiny_settings(exp), "data.num_workers=1", "training.gradient_accumulation=2"]
    return overrides


def tiny_settings(exp: str) -> list[str]:
    """Overrides that fit an experiment to the tiny models: whole weights in fp32, and a small inner
    width of a projector that has one."""
    width = [f"projector.width={TINY_WIDTH}"] if hasattr(load_experiment(exp).projector, "width") else []
    return ["llm.load_in_4bit=false", "llm.dtype=float32", *width]


def prepare(
    folder: Path,
    exp: str,
    *,
    tiny: bool,
    steps: int,
    models: Path | None = None,
    overrides: list[str] | tuple[str, ...] = (),
) -> Workload:
    """Make the folder.

    Args:
        models: folder of the two random models, made there if it is empty; default: in `folder`.
        overrides: of the experiment, applied last.

    Raises:
        InputError: the experiment or an override is wrong.
    """
    work = Workload(folder, steps)
    models = models or folder / "models"
    places = {"vision.model": models / "clip", "llm.model": models / "qwen3"}
    experiment = load_experiment(
        exp,
        [
            *settings(exp, tiny, work.total_steps),
            *(f"{k}={v}" for k, v in places.items()),
            f"data.path={folder / 'shards'}",
            *overrides,
        ],
    )
    base = load_experiment(exp)
    torch.manual_seed(experiment.training.seed)
    shapes_of = (
        (TINY_VISION, TINY_LLM)
        if tiny
        else (published_or_loaded_config(base.vision), published_or_loaded_config(base.llm))
    )
    make_models(models, *shapes_of, experiment.llm.dtype)
    vision: Any = vision_half(load_config(experiment.vision), "vision.model")
    make_data(folder, experiment.data.num_frames, vision.image_size)
    (folder / "experiment.yaml").write_text(to_yaml(experiment), encoding="utf-8")
    dataset = open_dataset(experiment.data)
    (folder / "run").mkdir(exist_ok=True)
    RunFolder(
        folder / "run",
        {
            "weights": {},
            "data_fingerprint": dataset.fingerprint,
            "starts": [],
            "sampling": sampling_of(dataset.meta, experiment.data.fit),
        },
    ).update()
    make_artifact(work, vision)
    return work


def make_models(folder: Path, vision: PretrainedConfig, llm: PretrainedConfig, dtype: str) -> None:
    """CLIP and Qwen3 with random weights, in folders for `from_pretrained`. The tokenizer is small: the
    cost of a step depends on the model's vocabulary size only."""
    if (folder / "qwen3" / "config.json").is_file():
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = train_tokenizer([CAPTION], vocab_size=600)
    half: Any = vision_half(vision, "vision.model")
    made: tuple[tuple[str, Callable[[Any], Any], PretrainedConfig], ...] = (
        ("clip", CLIPVisionModel, half),
        ("qwen3", AutoModelForCausalLM.from_config, llm),
    )
    for name, make, config in made:
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            with torch.device(device):
                model = make(config)
        finally:
            torch.set_default_dtype(before)
        model.save_pretrained(folder / name, max_shard_size="2GB")
        del model
        torch.cuda.empty_cache()  # for the measured processes; no error without a GPU
    side = half.image_size
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
        folder / "clip"
    )
    tokenizer.save_pretrained(folder / "qwen3")


def make_data(folder: Path, num_frames: int, side: int) -> None:
    """A frames store of clips with moving texture; every caption is longer than CAPTION_TOKENS."""
    videos = folder / "videos"
    videos.mkdir()
    lines = []
    for number in range(CLIPS):
        noise = np.random.default_rng(number).integers(0, 255, (side // 4, side // 4, 3), np.uint8)
        texture = noise.repeat(4, 0).repeat(4, 1)
        with av.open(str(videos / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=8, options={"crf": "18"})
            stream.width, stream.height, stream.pix_fmt = texture.shape[1], texture.shape[0], "yuv420p"
            for i in range(2 * num_frames):
                frame = np.ascontiguousarray(np.roll(texture, 3 * i, axis=1))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
        caption = f"{number}번 영상입니다. " + CAPTION * 4
        lines.append(json.dumps({"video": f"videos/{number}.mp4", "caption": caption}, ensure_ascii=False) + "\n")
    (folder / "manifest.jsonl").write_text("".join(lines), encoding="utf-8")
    pack(
        folder / "manifest.jsonl",
        folder / "shards",
        store="frames",
        num_frames=num_frames,
        image_size=side,
        shard_size=CLIPS // 2,
        progress=False,
    )


def make_artifact(work: Workload, vision: CLIPVisionConfig) -> None:
    """Write the artifact that the stage starts from. The adapter's B is random, not zero as in a fresh
    one: an error anywhere in the adapter then shows in the first loss."""
    experiment = work.experiment
    dtype = getattr(torch, experiment.llm.dtype)
    torch.manual_seed(experiment.training.seed)
    captioner = meta_models(experiment).captioner
    captioner.projector = experiment_projector(experiment, vision, captioner.llm.config).to(dtype)
    for name, module in captioner.llm.named_modules():
        if "lora_" not in name:
            continue
        for key, shape in [(k, p.shape) for k, p in module.named_parameters(recurse=False)]:
            if "magnitude" in name:  # about the norm of a row of random weights
                value = torch.full(shape, 0.02 * math.sqrt(inputs_of(captioner, name)))
            else:
                value = torch.randn(shape) * 0.02
            setattr(module, key, nn.Parameter(value.to(dtype)))
    save_artifact(work.artifact, captioner, experiment, work.artifact.name, {})


def inputs_of(captioner: Captioner, name: str) -> int:
    """The number of inputs of the Linear that has the adapter module of this name."""
    module: Any = captioner.llm.get_submodule(name.split(".lora_")[0])
    return module.in_features
