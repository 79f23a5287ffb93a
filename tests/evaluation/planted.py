"""Evaluated runs written by hand, without a model: everything in them is planted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmds.evaluation.outside_record import Outside, write_outside
from vlmds.experiments.reading import load_experiment, to_yaml
from vlmds.files import write

METRICS = ("cider_d@char", "bleu4@char", "rouge_l@char", "chrf++@char")
WIDTHS = {"bleu4@char": 10, "chrf++@char": 24}  # of the statistics
WORDS = "빨간 파란 노란 작은 큰 원이 별이 강아지가 고양이가 남자가 위로 아래로 왼쪽으로 오른쪽으로 천천히 빠르게 움직입니다".split()
GAP = {"own": 1.0, "blind": 2.0, "gap": 1.0, "low": 0.9, "high": 1.1}
WEIGHTS = {"vision/model.safetensors": "a" * 64, "llm/model.safetensors": "b" * 64, "llm/tokenizer": "c" * 64}
START = {"world_size": 8, "hardware": ["H100"], "versions": {"torch": "2.13.0"}, "git": "abc", "time": "2026-11-27"}


def plant(
    folder: Path,
    exp: str,
    seed: int = 0,
    *,
    clips: int = 60,
    value: float = 50.0,
    spread: float = 5.0,
    settings: dict[str, Any] | None = None,
    record: dict[str, Any] | None = None,
    overrides: Sequence[str] = (),
    references: Callable[[int], list[str]] = lambda clip: [f"{clip}번 영상입니다."],
) -> Path:
    """A run of a packaged experiment with an evaluation. Each stage took 100 s on 8 ranks.

    Args:
        value, spread: mean of the scores, and their standard deviation over the clips.
        settings: of the evaluation, besides the usual ones. record: run.json's, likewise.
    """
    experiment = load_experiment(exp, [f"training.seed={seed}", *overrides])
    last = experiment.stages[-1].name
    for stage in experiment.stages:
        artifact = {"format": "vlmds-artifact", "version": 2, "files": {"projector.safetensors": stage.name * 8}}
        write(folder / "artifacts" / stage.name / "artifact.json", json.dumps(artifact))
        write(folder / "artifacts" / stage.name / "experiment.yaml", to_yaml(experiment))
    write(folder / "experiment.yaml", to_yaml(experiment))
    usual = {"id": folder.name, "global_batch": 64, "data_fingerprint": "d" * 64, "weights": WEIGHTS, "starts": [START]}
    write(folder / "run.json", json.dumps(usual | {"sampling": {"sampler": 1}} | (record or {})))
    lines = [
        {"kind": "train", "stage": s.name, "step": 10, "samples": 640, "samples_per_s": 6.4, "ranks": 8, "loss": 1.0}
        for s in experiment.stages
    ]
    write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    metrics = {
        "format": "vlmds-evaluation",
        "version": 1,
        "settings": {
            "artifact": last,
            "weights_sha256": (last * 8)[:16],
            "data_fingerprint": "d" * 64,
            "split": "val",
            "clips": None,
            "prompt": experiment.data.prompt,
            "num_frames": experiment.data.num_frames,
            "generation": {"num_beams": 1},
            "vision": experiment.vision.model,
            "llm": experiment.llm.model,
            "llm_precision": "nf4",
            "tokenisation": ["characters"],
            **(settings or {}),
        },
        "clips": clips,
        "metrics": {name: {"value": value, "tokenisation": "characters"} for name in METRICS},
        "looking": {
            "loss": {"shuffled": GAP, "blank": GAP},
            "metrics": {blind: {METRICS[0]: GAP} for blind in ("shuffled", "blank")},
            "warnings": [],
        },
        "model": {"visual_tokens": 64 if exp > "e4" else 4608, "projector_parameters": 10, "adapter_parameters": 5},
        "timing": {"captioned": clips, "captioning_seconds": clips / 4, "batch_size": 8, "devices": ["H100"]},
    }
    write(folder / "evaluation" / "val" / "metrics.json", json.dumps(metrics, ensure_ascii=False))
    random = np.random.default_rng([seed, ord(exp[-1])])
    scores = (value + spread * random.standard_normal(clips)).round(6).tolist()
    counts = {name: random.integers(5, 20, (clips, width)).astype(float).tolist() for name, width in WIDTHS.items()}
    words = random.integers(0, len(WORDS), (clips, 8))
    with (folder / "evaluation" / "val" / "predictions.jsonl").open("w", encoding="utf-8") as file:
        for clip, score in enumerate(scores):
            line = {
                "key": f"clip{clip:05d}",
                "position": clip,
                "source": f"video{clip:05d}",
                "references": references(clip),
                "caption": " ".join(WORDS[word] for word in words[clip]) + ".",
                "duration": 4.0 + clip % 7,
                "scores": dict.fromkeys(METRICS, score),
                "statistics": {name: counts[name][clip] for name in WIDTHS},
                "caption_log_probability": -0.5,
                "reference_log_probability": {"real": -1.0, "shuffled": -2.0, "blank": -2.0},
                "blind_captions": {"shuffled": " ".join(WORDS[:6]), "blank": WORDS[0]},
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return folder


def planted_outside(folder: Path, made: Path, seed: int = 99, **how) -> Path:
    """An outside evaluation with planted scores; made: a folder for a run that is not kept."""
    plant(made, "e1", seed, **how)
    shutil.move(made / "evaluation", folder / "evaluation")
    path = folder / "evaluation" / "val" / "metrics.json"
    metrics = json.loads(path.read_text())
    del metrics["looking"], metrics["model"]
    metrics["settings"] = {key: metrics["settings"][key] for key in ("data_fingerprint", "split", "tokenisation")}
    path.write_text(json.dumps(metrics))
    write_outside(folder, Outside(folder.name, folder.name, "outside model", f"org/{folder.name}", "a" * 40, "mit"))
    return folder
