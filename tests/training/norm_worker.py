"""Optimizer steps on a tiny captioner, some with a NaN gradient on the last rank alone; rank 0
writes the results of all ranks as JSON: `norm_worker.py OUTPUT DS_CONFIG [OVERRIDE …]`."""

import json
import sys
from pathlib import Path

import deepspeed.runtime.zero.stage_1_and_2 as zero
import torch
import torch.distributed as dist

from tests.training.engine_worker import GLOBAL_BATCH, TINY_PROJECTOR, batch, tiny_captioner
from vlmds.distributed.ranks import gather, init_distributed
from vlmds.experiments.reading import load_experiment
from vlmds.experiments.schedule import accumulation_steps
from vlmds.models.captioner import IGNORE
from vlmds.models.language import add_adapter
from vlmds.models.trainable import freeze
from vlmds.training.engine import build_engine, reduced_once

FAULTS = (None, "nan", "inf", "-inf", None)
"""What one element of one gradient becomes in each step."""


def state(engine):
    """All that a step changes: weights as the model has them and in fp32, and the moments."""
    optimizer = engine.optimizer.optimizer
    moments = [
        value
        for group in optimizer.param_groups
        for parameter in group["params"]
        for value in optimizer.state[parameter].values()
    ]
    return [
        t.detach().clone()
        for t in (
            *(p for p in engine.module.parameters() if p.requires_grad),
            *engine.optimizer.single_partition_of_fp32_groups,
            *moments,
        )
    ]


def first_moment(engine):
    """Norm over all ranks of Adam's first moment, as if decayed by nothing."""
    optimizer = engine.optimizer.optimizer
    squares = sum(
        optimizer.state[parameter]["exp_avg"].double().square().sum()
        for group in optimizer.param_groups
        for parameter in group["params"]
    )
    dist.all_reduce(squares)
    return float(squares.sqrt()) / (1 - optimizer.param_groups[0]["betas"][0])


def backward(engine, experiment):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    features, ids, labels = batch(engine.module.projector.num_tokens)
    features = features.to(getattr(torch, experiment.llm.dtype))
    micro = experiment.training.micro_batch
    for start in range(rank * micro, GLOBAL_BATCH, micro * world_size):
        rows = slice(start, start + micro)
        loss = engine(features[rows], ids[rows], labels[rows])
        tokens = int((labels != IGNORE).sum())
        engine.backward(loss * world_size / tokens, scale_wrt_gas=False)


def take_step(engine, experiment, fault, searches):
    """One optimizer step, and what came of it on this rank."""
    before = state(engine)
    searches.clear()
    with reduced_once(engine):
        backward(engine, experiment)
        if fault and dist.get_rank() == dist.get_world_size() - 1:
            *_, last = (p for p in engine.module.parameters() if p.grad is not None)
            last.grad.view(-1)[-1] = float(fault)
    theirs = None if fault else float(zero.DeepSpeedZeroOptimizer.scaled_global_norm(engine.optimizer))
    engine.step()
    after = state(engine)
    return {
        "skipped": engine.optimizer.overflow,
        "norm": float(engine.get_global_grad_norm()),
        "deepspeed_norm": theirs,
        "first_moment": first_moment(engine),
        "searches": len(searches),
        "unchanged": all(map(torch.equal, after, before)),
        "finite": all(bool(t.isfinite().all()) for t in after),
    }


def main(output, ds_config, *overrides):
    init_distributed(timeout_minutes=3)
    experiment = load_experiment(
        "e7", ["llm.load_in_4bit=false", "peft.dropout=0", *TINY_PROJECTOR, "training.micro_batch=2", *overrides]
    )
    model = tiny_captioner(experiment)
    model.llm = add_adapter(model.llm, experiment.peft)
    model.to(getattr(torch, experiment.llm.dtype))
    stage = experiment.stages[1]
    freeze(model, stage)
    engine = build_engine(
        model, experiment, stage, Path(ds_config), accumulation_steps(experiment, dist.get_world_size(), GLOBAL_BATCH)
    )
    searches, search = [], zero.has_inf_or_nan
    zero.has_inf_or_nan = lambda tensor: searches.append(1) or search(tensor)
    engine.optimizer.optimizer.param_groups[0]["lr"] = 1e-2
    seen = gather([take_step(engine, experiment, fault, searches) for fault in FAULTS])
    if dist.get_rank() == 0:
        Path(output).write_text(
            json.dumps({"ranks": seen, "steps": engine.global_steps, "skipped": engine.skipped_steps})
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
