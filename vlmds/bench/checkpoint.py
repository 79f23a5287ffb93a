"""`vlmds bench checkpoint`: the cost of saving in the background, against no saving and in place.

One process, the MLP projector and LoRA on a tiny language model with the full vocabulary, the real
engine and the real saver. A checkpoint starts every few steps. The step time is the mean over all
steps, those that start a checkpoint included; the least of several rounds counts.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from vlmds.bench.measure import save, table
from vlmds.distributed.ranks import init_distributed
from vlmds.experiments.reading import load_experiment
from vlmds.models.captioner import IGNORE, VISUAL, Captioner
from vlmds.models.language import add_adapter
from vlmds.models.projectors import build_projector
from vlmds.models.trainable import freeze
from vlmds.training.ds_config import default_ds_config
from vlmds.training.engine import build_engine
from vlmds.training.saver import Saver

ROUNDS = 4
WIDTH, VOCABULARY, PATCHES, FRAMES = 512, 151_936, 16, 4


def bench_checkpoint(output: Path, steps: int = 30, every: int = 15, rounds: int = ROUNDS) -> dict[str, float]:
    """Run it, print the table, and write checkpoint.json to `output`."""
    device = init_distributed(timeout_minutes=10)
    experiment = load_experiment(
        "e3",
        [
            "llm.load_in_4bit=false",
            "llm.dtype=float32",
            f"data.num_frames={FRAMES}",
            "training.gradient_accumulation=1",
            "training.activation_checkpointing=false",
        ],
    )
    torch.manual_seed(0)
    llm: Any = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            tie_word_embeddings=True,
        )
    )
    llm = add_adapter(llm.requires_grad_(False), experiment.peft)
    captioner = Captioner(build_projector(experiment.projector, 256, WIDTH, FRAMES, PATCHES), llm).to(device)
    stage = experiment.stages[1]
    freeze(captioner, stage)
    engine = build_engine(captioner, experiment, stage, default_ds_config(), 1)
    batch = _batch(captioner.projector.num_tokens, device)
    output.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=output))
    try:
        savers = {
            "no checkpoints": None,
            "in the background": Saver(folder / "a", "bench", 1, print),
            "in place": Saver(folder / "b", "bench", 1, print),
        }
        _run(engine, batch, None, 5, every, wait=False)
        means = dict.fromkeys(savers, float("inf"))
        for _ in range(rounds):  # in turns, to share slow spells of the machine
            for name, saver in savers.items():
                mean = _run(engine, batch, saver, steps, every, wait=name == "in place")
                means[name] = min(means[name], mean)
        size = sum(p.stat().st_size for p in folder.rglob("*.safetensors")) / 2
    finally:
        shutil.rmtree(folder)
    base = means["no checkpoints"]
    print(f"a checkpoint of {size / 1e6:.1f} MB every {every} steps, {steps} steps")
    print(table([{"checkpoints": name, "mean step": f"{mean / base:.3f} x"} for name, mean in means.items()]))
    result = {name: mean / base for name, mean in means.items()}
    print(save(output, "checkpoint", {"steps": steps, "every": every, "bytes": size, "relative_step": result}))
    return result


def _run(engine, batch: tuple, saver: Saver | None, steps: int, every: int, wait: bool) -> float:
    """Mean seconds of a step, without the wait for the last checkpoint."""
    begin = time.perf_counter()
    for step in range(1, steps + 1):
        engine.backward(engine(*batch) / 100, scale_wrt_gas=False)
        engine.step()
        if saver is not None:
            if saver.finished:
                saver.publish()
            if step % every == 0:
                saver.begin(engine, None, step, {"score": None})
                if wait:
                    saver.drain()
    seconds = time.perf_counter() - begin
    if saver is not None:
        saver.drain()
    return seconds / steps


def _batch(visual_tokens: int, device: torch.device) -> tuple:
    """features, input_ids, labels of two clips."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, FRAMES * PATCHES, 256, generator=generator)
    ids = torch.randint(0, VOCABULARY, (2, visual_tokens + 40), generator=generator)
    ids[:, 4 : 4 + visual_tokens] = VISUAL
    labels = ids.clone()
    labels[:, : visual_tokens + 20] = IGNORE
    return features.to(device), ids, labels
