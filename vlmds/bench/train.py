"""`vlmds bench train`: time and memory of a training step by part, against named baselines.

Each variant runs in a process of its own, on the same random weights and samples
(:mod:`vlmds.bench.workload`). Times are compared only if the losses are equal up to rounding. The
fastest of each variant's timed steps counts, over rounds in turns.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vlmds.bench.baselines import check_baseline
from vlmds.bench.measure import save, table
from vlmds.bench.workload import CAPTION_TOKENS, Workload, prepare
from vlmds.console.text import counted
from vlmds.distributed.ranks import cpu_environment, free_port
from vlmds.errors import InputError
from vlmds.experiments.reading import load_experiment
from vlmds.experiments.schema import Experiment
from vlmds.models.assemble import MetaModels, meta_models
from vlmds.models.trainable import freeze
from vlmds.planning.cards import device_card
from vlmds.planning.flops import sample_flops
from vlmds.planning.memory import quantised, stage_memories
from vlmds.planning.propose import LINEAR_SECONDS, host_seconds, passes

BASELINES = ("reference", "hf", "lora")
ROUNDS = 2
# Relative difference allowed for rounding: of the first loss, before any update, and of later ones.
TOLERANCE = {"float32": (1e-4, 1e-3), "bfloat16": (1e-2, 3e-2)}
STEP_PARTS = (
    "gradients",
    "gradient buckets",
    "activations",
    "logits",
    "CLIP forward",
    "features ahead",
    "one unpacked weight",
    "first DoRA norm",
)
"""Parts of :func:`vlmds.planning.memory.stage_memories` that are allocated within a step."""


@dataclass(frozen=True)
class Variant:
    """One row of the tables. name: "vlmds" or a baseline. code: the worker's argument."""

    name: str
    work: Workload
    code: str
    ranks: int = 1


def bench_train(
    output: Path,
    exps: list[str],
    *,
    tiny: bool = False,
    baselines: Sequence[str] = (),
    steps: int = 4,
    ranks: int = 1,
    overrides: Sequence[str] = (),
) -> dict:
    """Run it, print the tables, and write train.json to ``output``.

    Args:
        tiny: small models with the full vocabulary of 151,669, in fp32, for a CPU.
        baselines: of BASELINES: "reference", "hf", or "lora" (the same experiment with LoRA).
        steps: timed optimizer steps of each process; on a GPU at least 2.
        ranks: a number above 1 also compares that many ranks with one.

    Raises:
        InputError: an experiment that a baseline cannot train, a wrong override, no step, or fewer
            GPUs than ranks.
        RuntimeError: vlmds itself failed, or the losses of the variants differ.
    """
    gpus = torch.cuda.device_count()
    if not tiny and 0 < gpus < ranks:
        raise InputError(f"--ranks {ranks}: this machine has {counted(gpus, 'GPU')}; use at most as many")
    if steps < 1:
        raise InputError(f"--steps {steps}: must be at least 1")
    if gpus and steps == 1:
        steps = 2  # one timed whole, and one split into phases
    for exp in exps:
        for baseline in baselines:
            check_baseline(baseline, load_experiment(exp, list(overrides)))
    output.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="train-", dir=output.absolute()))
    try:
        found = {exp: _measure(folder, exp, tiny, list(baselines), steps, ranks, list(overrides)) for exp in exps}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows = [(row, results["rows"][0]) for results in found.values() for row in results["rows"]]
    print(_heading(rows[0][0], tiny))
    print(table([_time_row(row, own) for row, own in rows]))
    print(f"\n{table([_share_row(row) for row, _ in rows])}")
    print(f"\n{table([_memory_row(exp, results) for exp, results in found.items()])}")
    for exp, results in found.items():
        if (measured := results["linear_seconds"]) is not None:
            print(
                f"{exp}: the host takes at most {1e6 * measured:.0f} µs for each 4-bit Linear a pass "
                f"(assumed: {1e6 * LINEAR_SECONDS:.0f}); less if the GPU is the slower one"
            )
    if ranks > 1:
        print(f"\n{table([_ranks_row(row, own) for row, own in rows if row['ranks'] > 1])}")
    print(f"\nsaved: {save(output, 'train', {'tiny': tiny, **found})}")
    return found


def _measure(
    folder: Path, exp: str, tiny: bool, baselines: list[str], steps: int, ranks: int, overrides: list[str]
) -> dict:
    """{"rows": one result for each variant, "plan": predicted bytes by part, "linear_seconds": of
    :func:`linear_seconds`, on a GPU}"""
    place = folder / Path(exp).stem

    def made(name: str, *more: str) -> Workload:
        (place / name).mkdir(parents=True)
        return prepare(
            place / name, exp, tiny=tiny, steps=steps, models=folder / "models", overrides=[*overrides, *more]
        )

    work = made("own")
    variants = [Variant("vlmds", work, "vlmds")]
    for name in baselines:
        other = made(name, "peft.type=lora") if name == "lora" else work
        variants.append(Variant(name, other, "vlmds" if name == "lora" else name))
    if ranks > 1:
        variants.append(Variant(f"vlmds, {ranks} ranks", work, "vlmds", ranks))
    variants, results = _rounds(exp, variants)
    experiment = work.experiment
    differences = check_losses(
        experiment.llm.dtype, {v.name: results[v.name]["losses"] for v in variants if v.work is work and v.ranks == 1}
    )
    model = meta_models(experiment)
    freeze(model.captioner, experiment.stages[work.stage])
    own = results["vlmds"]
    every = own["recomputed_every"]
    plan = stage_memories(experiment, experiment.stages[work.stage], model.captioner, model.tower, 1, (every,))[every]
    batch = experiment.training.micro_batch * experiment.training.gradient_accumulation
    flops = sample_flops(model, own["positions"] / batch, CAPTION_TOKENS)
    trained = sum(p.numel() for p in model.captioner.parameters() if p.requires_grad)
    weights = sum(p.numel() for p in model.captioner.llm.parameters())
    rows = []
    for variant in variants:
        result = results[variant.name]
        rows.append(
            {
                **result,
                "experiment": experiment.name,
                "variant": variant.name,
                "ranks": variant.ranks,
                "loss_difference": differences.get(variant.name),
                "batch": batch,
                "flops": asdict(flops) | {"total": flops.total},
                "weights": weights,
                "trained_bytes": trained * (4 if experiment.llm.dtype == "float32" else 2),
            }
        )
    return {
        "rows": rows,
        "plan": plan,
        "linear_seconds": None if own["device"] == "CPU" else linear_seconds(own["host"], experiment, model, every),
    }


def _rounds(exp: str, variants: list[Variant]) -> tuple[list[Variant], dict[str, dict]]:
    """Run all variants in turns. Returns those that did not fail, and of each, by name, the result
    with the fastest step."""
    results: dict[str, dict] = {}
    for number in range(ROUNDS):
        for variant in variants:
            print(f"vlmds bench: {exp}: {variant.name}, round {number + 1} of {ROUNDS}", flush=True)
            try:
                result = _run(variant, number)
            except RuntimeError as error:
                if variant.name == "vlmds":
                    raise
                # It may be out of memory where vlmds is not; the other figures still count.
                print(f"vlmds bench: {exp}: {error}\nvlmds bench: {variant.name} is left out")
                results.pop(variant.name, None)
                variants = [v for v in variants if v is not variant]
                continue
            best = results.setdefault(variant.name, result)
            if result["step_seconds"] < best["step_seconds"]:
                results[variant.name] = result
    return variants, results


def linear_seconds(host: dict[str, float], experiment: Experiment, model: MetaModels, every: int) -> float | None:
    """The value of :data:`vlmds.planning.propose.LINEAR_SECONDS` measured here, or None without 4-bit
    weights. Too large if the GPU is the slower one, because the host then waits for it.

    Args:
        host: seconds of the host in "forward" and "backward" in a step. every: activation
            checkpointing of no layer (0) or every n-th.
    """
    if not experiment.llm.load_in_4bit:
        return None
    took = (host["forward"] + host["backward"]) / experiment.training.gradient_accumulation
    launching = host_seconds(experiment, model, passes(every), linear=0.0)
    return (took - launching) / (passes(every) * len(quantised(model.captioner.llm)))


def _run(variant: Variant, number: int) -> dict:
    """Run one process, or one for each rank, to its end. Returns its result."""
    name = f"{variant.name.replace(', ', '-').replace(' ', '-')}-{number}"
    command = [sys.executable]
    if variant.ranks > 1:
        command += [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(variant.ranks),
            "--master-port",
            str(free_port()),
        ]
    command += ["-m", "vlmds.bench.train_worker", str(variant.work.folder), variant.code, name, str(variant.work.steps)]
    environment = {**os.environ, **cpu_environment(variant.ranks)}
    if variant.ranks == 1:  # Trainer would use all visible GPUs
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    path = variant.work.folder / f"{name}.json"
    if done.returncode or not path.is_file():
        raise RuntimeError(
            f"{variant.name} failed with exit code {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return json.loads(path.read_text())


def check_losses(dtype: str, losses: dict[str, list[float]]) -> dict[str, float]:
    """The largest relative difference of each variant's losses from the first variant's. Raises
    RuntimeError if one exceeds rounding."""
    first, later = TOLERANCE[dtype]
    (name, expected), *others = losses.items()
    largest = {}
    for other, found in others:
        differences = [abs(a - b) / abs(a) for a, b in zip(expected, found, strict=True)]
        for step, difference in enumerate(differences):
            if not difference <= (later if step else first):
                raise RuntimeError(
                    f"step {step + 1}: the loss of {other} is {found[step]:.6f}, that of {name} "
                    f"{expected[step]:.6f}: not the same training, so times are not compared"
                )
        largest[other] = max(differences)
    return largest


def _heading(row: dict, tiny: bool) -> str:
    size = "tiny models, vocabulary 151,669, fp32" if tiny else "full size"
    return (
        f"\n{size}, random weights, {row['device']}, {row['threads']} threads a process; "
        f"{row['batch']} samples of {row['positions'] / row['batch']:.0f} positions a step, captions "
        f"of {CAPTION_TOKENS} tokens"
    )


def _time_row(row: dict, own: dict) -> dict[str, str]:
    """Ratios to vlmds; absolute figures on a GPU only, as those of a CPU mean nothing elsewhere."""
    samples = row["batch"] * row["ranks"] / row["step_seconds"]
    positions = own["positions"] * row["ranks"]  # of all ranks; baselines do not report them
    reference = own["step_seconds"] * samples / row["batch"]
    cells = {
        "experiment": row["experiment"],
        "variant": row["variant"],
        "step": f"{row['step_seconds'] / own['step_seconds']:.2f} x",
        "samples/s": f"{reference:.2f} x",
        "peak memory": f"{row['peak_bytes'] / own['peak_bytes']:.2f} x",
        "without libraries": f"{_trained_bytes(row) / _trained_bytes(own):.2f} x",
        "of it a step's own": f"{row['step_bytes'] / own['step_bytes']:.2f} x",
        "loss, largest difference": ("" if row["loss_difference"] is None else f"{row['loss_difference']:.1e}"),
    }
    if row["device"] == "CPU":
        return cells
    rate = row["flops"]["total"] * samples / row["ranks"]
    card = device_card(row["device"])
    four_n = 4 * row["weights"] * own["positions"] / row["step_seconds"]
    cells |= {
        "step": f"{row['step_seconds']:.3f} s ({cells['step']})",
        "samples/s": f"{samples:.2f}",
        "tokens/s": f"{positions / row['step_seconds']:,.0f}",
        "peak memory": f"{row['peak_bytes'] / 1e9:.1f} GB ({cells['peak memory']})",
        "model TFLOP/s": f"{rate / 1e12:.0f}",
        "MFU": f"{rate / card.flops:.1%}" if card else "?",
        "MFU at 4N": f"{four_n / card.flops:.1%}" if card else "?",
    }
    return cells


def _trained_bytes(row: dict) -> int:
    """Peak memory above that after the imports, in bytes."""
    return row["peak_bytes"] - row["libraries_bytes"]


def _share_row(row: dict) -> dict[str, str]:
    whole, phases = row["split_step_seconds"], row["phases"]
    rest = max(0.0, whole - sum(phases.values()))
    return {
        "share of a step": f"{row['experiment']} {row['variant']}",
        **{name: f"{seconds / whole:.1%}" for name, seconds in phases.items()},
        "other": f"{rest / whole:.1%}",
    }


def _memory_row(exp: str, results: dict) -> dict[str, str]:
    """The plan's parts against the measured ones, in megabytes."""
    plan, own = results["plan"], results["rows"][0]
    cells, sums = {"MB, plan / measured": exp}, [0.0, 0.0]
    parts = [(part, plan[part], found) for part, found in own["resident"].items()]
    # On a CPU no features are made ahead.
    step = [part for part in STEP_PARTS if own["device"] != "CPU" or part != "features ahead"]
    parts.append(("a step's own", sum(plan.get(part, 0) for part in step), own["step_bytes"]))
    for part, planned, found in parts:
        cells[part] = f"{planned / 1e6:,.1f} / {found / 1e6:,.1f}"
        sums = [sums[0] + planned, sums[1] + found]
    cells["plan / measured"] = f"{sums[0] / sums[1]:.2f}"
    return cells


def _ranks_row(row: dict, own: dict) -> dict[str, str]:
    ranks = row["ranks"]
    bound = 2 * row["trained_bytes"] * (ranks - 1) / ranks
    return {
        "experiment": row["experiment"],
        "ranks": str(ranks),
        "efficiency": f"{own['step_seconds'] / row['step_seconds']:.1%}",
        "sent a step, MB": f"{row['sent'] / 1e6:,.2f}",
        "2·trainable bytes·(W−1)/W, MB": f"{bound / 1e6:,.2f}",
        "sent / bound": f"{row['sent'] / bound:.2f}",
    }
