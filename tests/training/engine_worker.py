"""Two stages of three optimizer steps on a tiny captioner; rank 0 writes its results as JSON.

With "plain" among the overrides DeepSpeed reduces the gradients of every micro-batch, as it does by
itself.
"""

import gc
import json
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM

from vlmds.distributed.ranks import init_distributed
from vlmds.experiments.reading import load_experiment
from vlmds.experiments.schedule import accumulation_steps, learning_rate
from vlmds.models.captioner import IGNORE, VISUAL, Captioner
from vlmds.models.language import add_adapter
from vlmds.models.projectors import build_projector
from vlmds.training.engine import build_engine, reduced_once, release, set_learning_rate

ROOT = Path(__file__).resolve().parents[2]
GLOBAL_BATCH, STEPS = 8, 3

TINY_PROJECTOR = ["projector.width=32", "projector.num_queries=4", "projector.num_heads=2", "data.num_frames=2"]
"""Overrides of a packaged experiment with a resampler that fit it to `tiny_captioner`."""


def tiny_captioner(exp):
    torch.manual_seed(0)
    llm = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
    ).requires_grad_(False)
    return Captioner(build_projector(exp.projector, 16, 32, num_frames=2, patches=4), llm)


def batch(visual_tokens):
    """Rows with unequal numbers of supervised tokens, so that a mean of means would differ."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(GLOBAL_BATCH, 8, 16, generator=generator)
    ids = torch.randint(0, 300, (GLOBAL_BATCH, 24), generator=generator)
    ids[:, 2 : 2 + visual_tokens] = VISUAL
    labels = ids.clone()
    labels[:, :12] = IGNORE
    for row in range(GLOBAL_BATCH):
        labels[row, 13 + row :] = IGNORE
    return features, ids, labels


def accumulate(engine, inputs, scale, plain):
    """An optimizer step over these micro-batches: the sum of their losses, and the dtypes in which
    gradients stood before they were reduced."""
    total = torch.zeros(())
    with nullcontext() if plain else reduced_once(engine):
        for batch in inputs:
            loss = engine(*batch)
            engine.backward(loss * scale, scale_wrt_gas=False)
            if plain:
                engine.step()
            total += loss.detach()
        found = {str(p.grad.dtype) for p in engine.module.parameters() if p.grad is not None}
    if not plain:
        engine.step()
    return total, found


def run_stage(model, exp, stage, plain):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    accumulation = accumulation_steps(exp, world_size, GLOBAL_BATCH)
    engine = build_engine(model, exp, stage, ROOT / "ds_configs" / "zero2_cpu.json", accumulation)
    features, ids, labels = batch(model.projector.num_tokens)
    features = features.to(getattr(torch, exp.llm.dtype))
    tokens = int((labels != IGNORE).sum())
    micro = exp.training.micro_batch
    seen = []
    for step in range(STEPS):
        set_learning_rate(engine, learning_rate(step, STEPS, stage))
        rows = [slice(start, start + micro) for start in range(rank * micro, GLOBAL_BATCH, micro * world_size)]
        total, dtypes = accumulate(engine, [(features[r], ids[r], labels[r]) for r in rows], world_size / tokens, plain)
        dist.all_reduce(total)
        seen.append([stage.name, total.item() / tokens, float(engine.get_global_grad_norm())])
    assert not engine.tput_timer.config.enabled  # it would wait for the GPU before every forward pass
    alive = weakref.ref(engine), weakref.ref(engine.optimizer)
    release(engine)
    del engine
    gc.collect()
    return seen, any(ref() is not None for ref in alive), sorted(dtypes)


def main(output, *overrides):
    init_distributed(timeout_minutes=3)
    plain = "plain" in overrides
    overrides = [override for override in overrides if override != "plain"]
    exp = load_experiment(
        "e7", ["llm.dtype=float32", "llm.load_in_4bit=false", "peft.dropout=0", *TINY_PROJECTOR, *overrides]
    )
    model = tiny_captioner(exp)
    model.to(getattr(torch, exp.llm.dtype))
    steps, leaks = [], []
    for stage in exp.stages:
        if "peft" in stage.train:
            model.llm = add_adapter(model.llm, exp.peft)
        seen, leaked, dtypes = run_stage(model, exp, stage, plain)
        steps += seen
        leaks.append(leaked)
    weights = {name: p.double().sum().item() for name, p in model.named_parameters() if p.requires_grad}
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps({"steps": steps, "leaks": leaks, "weights": weights, "gradients": dtypes}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
