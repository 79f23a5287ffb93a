"""Fixtures: tiny models, packed clips and runs, made once."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.clips import write_manifest, write_video
from vlmds.data.dataset import Dataset
from vlmds.data.index import ShardIndex
from vlmds.data.loader import SampleReader
from vlmds.experiments.reading import load_experiment, to_yaml
from vlmds.models.artifact import save_artifact
from vlmds.models.assemble import load_model
from vlmds.models.language import add_adapter


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    return tiny.make_models(tmp_path_factory.mktemp("models"), speaking=True)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """4 training and 11 validation clips; some with several references or a prompt of their own."""
    folder = tmp_path_factory.mktemp("packed")
    rows = []
    for i in range(15):
        write_video(folder / f"v{i}.mp4", frames=8 + i)
        caption = f"{i}번 영상입니다." + " 네." * (i % 3)
        row = {
            "video": f"v{i}.mp4",
            "caption": [caption, f"{i}번째 것"] if i % 4 == 0 else caption,
            "split": "val" if i >= 4 else "train",
        }
        rows.append(row | ({"prompt": "무엇?"} if i in (5, 9) else {}))
    manifest = write_manifest(folder / "manifest.jsonl", rows)
    return tiny.pack_frames(manifest, folder / "out", shard_size=5)


SAYINGS = ("빨간 원이 왼쪽으로 움직입니다", "파란 별이 오른쪽으로 움직입니다")
"""What the fixture `run` says to the first two validation clips."""


def make_run(
    models: Path, shards: Path, folder: Path, exp: str, seed: int = 5, *overrides, lessons: Sequence[tiny.Lesson] = ()
) -> Path:
    """A run folder as training leaves it, with random weights whose captions depend on the video, or
    that were trained on the lessons."""
    extra = tiny.RESAMPLER if exp in ("e5", "e6", "e7", "e8") else []
    experiment = load_experiment(exp, [*tiny.settings(models, shards), *extra, *overrides])
    model = load_model(experiment, torch.device("cpu"))
    torch.manual_seed(seed)
    model.captioner.llm = add_adapter(model.captioner.llm, experiment.peft)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.captioner.named_parameters():
            if "lora_" in name or name.startswith("projector"):
                p.add_(torch.randn_like(p) * 0.1)
    if lessons:
        tiny.teach(model, experiment.data.prompt, lessons)
    for stage in experiment.stages:
        save_artifact(folder / "artifacts" / stage.name, model.captioner, experiment, stage.name, {})
    (folder / "experiment.yaml").write_text(to_yaml(experiment), encoding="utf-8")
    (folder / "run.json").write_text(
        json.dumps({"global_batch": 4, "data_fingerprint": ShardIndex.open(shards).fingerprint, "starts": []})
    )
    lines = []
    for number, stage in enumerate(experiment.stages):
        for step in range(1, 7):
            lines.append(
                {
                    "kind": "train",
                    "stage": stage.name,
                    "step": step,
                    "samples": 4,
                    "loss": 4 / step - number,
                    "lr": 1e-3,
                    "grad_norm": 1.0,
                    "samples_per_s": 2.0,
                    "tokens_per_s": 9.0,
                    "memory_gib": 1.5,
                }
            )
        lines.append({"kind": "val", "stage": stage.name, "step": 6, "loss": 1.0, "samples": 3})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    return folder


@pytest.fixture(scope="session")
def run(models, shards, tmp_path_factory) -> Path:
    reader = SampleReader(Dataset([ShardIndex.open(shards)]), "val", tiny.FRAMES, tiny.SIDE, shuffle=False)
    lessons = [
        (sample.frames, sample.prompt, text) for sample, text in zip(map(reader.load, range(2)), SAYINGS, strict=True)
    ]
    return make_run(models, shards, tmp_path_factory.mktemp("runs") / "e3", "e3", lessons=lessons)
