"""`vlmds demo`: clips, tiny models, packing, training and captions of held-out clips, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmds.console.text import counted
from vlmds.demo.clips import COLOURS, DIRECTIONS, SHAPES, make_clips, parse_caption
from vlmds.demo.picture import draw_results
from vlmds.demo.pretrain import make_tiny_models
from vlmds.distributed.ranks import cpu_environment, free_port
from vlmds.errors import InputError
from vlmds.experiments.reading import load_experiment
from vlmds.inference.generation import GenerationOptions
from vlmds.inference.video_captioner import VideoCaptioner
from vlmds.packing.pack import pack
from vlmds.runs.folder import final_artifact
from vlmds.training.ds_config import REPOSITORY

ATTRIBUTES = ("colour", "shape", "direction")
IMAGE_SIZE = 64
RANKS = 2


@dataclass(frozen=True)
class Size:
    """Numbers of clips and of pre-training steps; the tests run a smaller demo."""

    train_clips: int = 960
    val_clips: int = 96
    clip_steps: int = 700
    llm_steps: int = 400


def run_demo(output: Path, exp: str = "demo", size: Size = Size(), overrides: tuple = ()) -> dict:
    """Make clips and tiny models, pack, train both stages, caption held-out clips, score.

    Existing files are used again, and a stopped training resumes.

    Args:
        output: folder for everything.
        exp: a packaged experiment; e1 … e8 run in tiny form: with their types of projector and
            adapter, and all else from demo.yaml.
        overrides: of the experiment.

    Returns:
        The results, as results/{exp}.json has them.

    Raises:
        InputError: an unknown experiment, or training refused its input.
    """
    started = time.perf_counter()
    output = output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    settings = tiny_form(exp, output)
    seconds: dict[str, float] = {}
    manifest = prepare_demo(output, size, seconds)
    run = output / "runs" / load_experiment(settings).name
    with _timed("training", seconds):
        train_demo(settings, output / "shards", run, overrides)
    with _timed("captions of held-out clips", seconds):
        clips, captions = caption_held_out(run, manifest)
    results = score(captions, [clip["caption"] for clip in clips])
    results["seconds"] = seconds | {"total": round(time.perf_counter() - started, 1)}
    _save(output / "results", run.name, results, clips, captions, output / "data")
    return results


def caption_held_out(run: Path, manifest: Path) -> tuple[list[dict], list[str]]:
    """The manifest's rows of split val, and the run's captions of them."""
    clips = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    clips = [clip for clip in clips if clip["split"] == "val"]
    captioner = VideoCaptioner.from_pretrained(final_artifact(run), device="cpu")
    videos = (str(manifest.parent / clip["video"]) for clip in clips)
    options = GenerationOptions(max_new_tokens=32)
    return clips, [str(caption) for caption in captioner.caption(videos, options, batch_size=32)]


def prepare_demo(output: Path, size: Size, seconds: dict[str, float]) -> Path:
    """Clips, tiny models and output/shards; returns the clips' manifest. Adds the seconds taken."""
    with _timed("clips", seconds):
        manifest = make_clips(output / "data", train=size.train_clips, val=size.val_clips)
    with _timed("pre-training of the tiny CLIP and Qwen3", seconds):
        make_tiny_models(output / "models", image_size=IMAGE_SIZE, clip_steps=size.clip_steps, llm_steps=size.llm_steps)
    with _timed("packing", seconds):
        summary = pack(manifest, output / "shards", store="frames", image_size=IMAGE_SIZE, progress=False)
        print(f"  {counted(summary.packed, 'sample')} in {counted(summary.shards, 'shard')}", flush=True)
    return manifest


def tiny_form(exp: str, output: Path, *, temporal_embedding: bool = True) -> Path:
    """Write output/tiny-{name}.yaml: the experiment with the demo's models. Returns the file.

    temporal_embedding: False makes the ablation {name}-no-time, for a resampler.
    """
    experiment = load_experiment(exp)
    name = experiment.name if temporal_embedding else f"{experiment.name}-no-time"
    lines = [
        f"# {name} in tiny form, written by vlmds demo",
        "extends: demo.yaml",
        f"name: {name}",
        f"priority: {json.dumps(experiment.priority)}",
        f"vision: {{model: {output / 'models' / 'clip'}}}",
        f"llm: {{model: {output / 'models' / 'qwen3'}}}",
        f"peft: {{type: {experiment.peft.type}}}",
    ]
    projector = f"type: {experiment.projector.type}"
    if hasattr(experiment.projector, "num_queries"):
        projector += ", width: 192, num_queries: 32, num_heads: 4"
        lines += [
            "stages:  # a resampler needs a lower rate than an MLP, and more steps",
            "  - {name: align, train: [projector], lr: 3.0e-4, epochs: 8}",
            "  - {name: finetune, train: [projector, peft], lr: 2.0e-4, epochs: 2}",
        ]
    if not temporal_embedding:
        projector += ", temporal_embedding: false"
    lines.append(f"projector: {{{projector}}}")
    path = output / f"tiny-{name}.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def prepare_sweep(output: Path, exps: list[str], size: Size) -> list[str]:
    """Prepare the data of the demo's sweep in ``output``. Returns the tiny forms of the experiments;
    with all eight, also resamplers without frame-time embeddings, which cannot learn directions."""
    output.mkdir(parents=True, exist_ok=True)
    prepare_demo(output, size, {})
    forms = [tiny_form(exp.lower(), output) for exp in exps]
    if len(exps) == 8:
        forms += [tiny_form(exp, output, temporal_embedding=False) for exp in ("e5", "e7")]
    return [str(path) for path in forms]


def direction_words() -> str:
    """The directions in Korean, for ``vlmds compare --words``."""
    return " ".join(korean for korean, _ in DIRECTIONS.values())


def score(captions: list[str], references: list[str]) -> dict:
    """Shares of exact captions and right attributes; the same for captions compared with another
    clip's reference (blind); and the expected shares of guessing."""
    order = np.random.RandomState(0).permutation(len(captions))
    return {
        "clips": len(captions),
        "held_out": _shares(captions, references),
        "blind": _shares([captions[i] for i in order], references),
        "chance": {
            "exact": 1 / (len(COLOURS) * len(SHAPES) * len(DIRECTIONS)),
            "colour": 1 / len(COLOURS),
            "shape": 1 / len(SHAPES),
            "direction": 1 / len(DIRECTIONS),
        },
    }


def _shares(captions: list[str], references: list[str]) -> dict[str, float]:
    pairs = [(parse_caption(a), parse_caption(b)) for a, b in zip(captions, references, strict=True)]
    shares = {"exact": np.mean([a == b for a, b in zip(captions, references)])}
    for name in ATTRIBUTES:
        shares[name] = np.mean([getattr(a, name) == getattr(b, name) for a, b in pairs])
    return {name: round(float(share), 4) for name, share in shares.items()}


def train_demo(settings: Path, shards: Path, run: Path, overrides: tuple) -> None:
    """`deepspeed --num_gpus 2 launch/train.py …`, its output passed through."""
    script = REPOSITORY / "launch" / "train.py"
    if not script.is_file():
        raise InputError(f"{script}: missing; the demo needs a checkout of the repository")
    command = [
        "--num_gpus",
        str(RANKS),
        "--master_port",
        str(free_port()),
        str(script),
        "--exp",
        str(settings),
        "--data",
        str(shards),
        "--output",
        str(run),
    ]
    if overrides:
        command += ["--set", *overrides]
    print(f"  deepspeed {' '.join(command)}", flush=True)
    environment = dict(os.environ)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    environment |= cpu_environment(RANKS)
    launcher = Path(sys.executable).with_name("deepspeed")
    done = subprocess.run([str(launcher), *command], env=environment)
    if done.returncode == 2:
        raise InputError("training refused its input, see above")
    if done.returncode:
        raise RuntimeError(f"training failed with exit code {done.returncode}")


def _save(folder: Path, name: str, results: dict, clips: list[dict], captions: list[str], data: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2)
    (folder / f"{name}.json").write_text(text + "\n")
    table = results_table(results)
    (folder / f"{name}.md").write_text(table + "\n", encoding="utf-8")
    picture = folder / f"{name}.png"
    shown = range(0, len(clips), max(1, len(clips) // 8))[:8]  # of many combinations
    draw_results(
        picture,
        [data / clips[i]["video"] for i in shown],
        [clips[i]["caption"] for i in shown],
        [captions[i] for i in shown],
    )
    print(
        f"\n{table}\n\nsaved: {folder / name}.json, .md and .png ({results['seconds']['total']:.0f} s in all)",
        flush=True,
    )


def results_table(results: dict) -> str:
    """Markdown: one row each for held-out clips, the blind score and chance."""
    columns = ("exact", *ATTRIBUTES)
    lines = [f"| {results['clips']} held-out clips | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    names = {"held_out": "captions", "blind": "videos shuffled (blind)", "chance": "chance"}
    for key, name in names.items():
        lines.append(f"| {name} | " + " | ".join(f"{results[key][c]:.1%}" for c in columns) + " |")
    return "\n".join(lines)


@contextmanager
def _timed(what: str, seconds: dict[str, float]):
    print(f"demo: {what}", flush=True)
    started = time.perf_counter()
    yield
    seconds[what] = round(time.perf_counter() - started, 1)
    print(f"demo: {what}: {seconds[what]} s", flush=True)
