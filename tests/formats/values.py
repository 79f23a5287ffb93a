"""The content of a folder of tests.formats.make, as JSON values."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file

from vlmds.captioning.outputs import write_from
from vlmds.data.dataset import open_dataset
from vlmds.data.loader import SampleReader
from vlmds.evaluation.evaluated_runs import load_run
from vlmds.inference.video_captioner import VideoCaptioner
from vlmds.runs.folder import RunFolder, final_artifact
from vlmds.training import checkpoint

MODELS = ["vision.model=models/clip", "llm.model=models/qwen3"]


def models(folder: Path) -> list[str]:
    """Overrides that put a run on the folder's models."""
    return [setting.replace("=", f"={folder}/") for setting in MODELS]


def store(folder: Path) -> dict[str, Any]:
    """Every sample of a packed dataset, in its order; the shards' hashes are checked."""
    dataset = open_dataset(str(folder))
    (index,) = dataset.parts
    index.verify_index()
    found: dict[str, Any] = {"fingerprint": dataset.fingerprint}
    for split in index.splits:
        index.verify(index.shards(split), "sha256")
        reader = SampleReader(dataset, split, 2, 32, shuffle=False, fit="crop")
        found[split] = []
        for sample in map(reader.load, range(len(reader))):
            shown = sample.features if sample.frames is None else torch.from_numpy(sample.frames)
            about = {"key": sample.key, "captions": sample.captions, "prompt": sample.prompt}
            found[split].append(
                about | {"shape": list(shown.shape), "mean": shown.double().flatten(1).mean(1).tolist()}
            )
    return found


def artifact(folder: Path) -> dict[str, Any]:
    """The loss of each validation caption."""
    captioner = VideoCaptioner.from_pretrained(final_artifact(folder / "run"), device="cpu", overrides=models(folder))
    reader = SampleReader(open_dataset(str(folder / "frames")), "val", 2, 32, shuffle=False, fit="crop")
    losses = []
    for sample in map(reader.load, range(len(reader))):
        batch = captioner.builder.collate_training([captioner.builder.training(sample.caption, sample.prompt)])
        with torch.no_grad():
            features = captioner.model.features({"frames": torch.from_numpy(sample.frames[None])})
            losses.append(float(captioner.model.captioner(features, **batch)))
    return {"losses": losses}


def checkpoints(folder: Path) -> dict[str, Any]:
    """The newest one of the last stage: its state, and the norm of each tensor."""
    root = folder / "run" / "checkpoints"
    path, state = checkpoint.latest_checkpoint(root, "finetune")
    tensors = {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}
    return {
        "names": [each.name for each in checkpoint.checkpoints(root, "finetune")],
        "progress": state["progress"],
        "optimizer_steps": state["optimizer_steps"],
        "norms": {name: float(tensor.norm()) for name, tensor in sorted(tensors.items())},
    }


def run(folder: Path) -> dict[str, Any]:
    """The record, and what `vlmds compare` takes of it."""
    found = load_run(folder / "run")
    record = RunFolder(folder / "run", RunFolder.read(folder / "run"))
    return {
        "global_batch": record.global_batch,
        "finished": found.finished,
        "experiment": [found.experiment.name, found.experiment.peft.r, found.experiment.stages[1].steps],
        "curves": found.curves,
        "cost": {name: found.cost[name] for name in ("visual_tokens", "trainable")},
        "metrics": {name: value["value"] for name, value in found.metrics["metrics"].items()},
        "predictions": {
            key: [line["caption"], line["references"], line["reference_log_probability"]]
            for key, line in found.predictions.items()
        },
    }


def captions(folder: Path) -> dict[str, Any]:
    """The record in the other formats."""
    with TemporaryDirectory() as written:
        for out in ("captions.csv", "captions.json"):
            write_from(folder / "captions.jsonl", Path(written) / out)
        subtitles = write_from(folder / "captions.jsonl", Path(written) / "srt", "srt")
        return {
            "csv": (Path(written) / "captions.csv").read_text(encoding="utf-8"),
            "json": json.loads((Path(written) / "captions.json").read_text(encoding="utf-8")),
            "srt": {path.name: path.read_text(encoding="utf-8") for path in subtitles},
        }


def values(folder: Path) -> dict[str, Any]:
    stores = {name: store(folder / name) for name in ("video", "frames", "features")}
    return stores | {read.__name__: read(folder) for read in (artifact, checkpoints, run, captions)}
