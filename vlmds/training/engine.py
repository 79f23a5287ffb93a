"""The DeepSpeed engine: build it, step it, take it down without a trace."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from vlmds.config import Experiment, StageConfig
from vlmds.errors import InputError
from vlmds.messages import counted
from vlmds.models.dora import weights_changed
from vlmds.training.optimizer import parameter_groups, trainable

OWNER_REDUCTIONS = 64
"""Ranks up to which each part of the gradients is reduced to the rank that owns it, one after
another: half the bytes of an all-reduce, but as many rings as ranks, each with its own latency."""


def accumulation_steps(experiment: Experiment, world_size: int, global_batch: int | None) -> int:
    """Micro-batches per optimizer step and rank. ``global_batch`` is the run's recorded one.

    Raises:
        InputError: the global batch cannot be cut into equal micro-batches.
    """
    training = experiment.training
    wanted = global_batch or training.global_batch
    if wanted is None:
        return training.gradient_accumulation
    per_pass = training.micro_batch * world_size
    if wanted % per_pass:
        raise InputError(
            f"training.global_batch: {wanted} is not a multiple of micro_batch "
            f"{training.micro_batch} x {counted(world_size, 'rank')}; choose another training.micro_batch"
        )
    return wanted // per_pass


def resolve_ds_config(path: Path, values: dict[str, object]) -> dict:
    """Read a DeepSpeed JSON and fill in what the experiment sets.

    Args:
        path: the JSON file.
        values: dotted key -> the experiment's value. The file may say ``"auto"``, the same value,
            or leave the key out.

    Raises:
        InputError: unreadable file, or another value than the experiment's (both are named).
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"--ds-config {path}: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"--ds-config {path}: not a JSON object of DeepSpeed's settings")
    for name, setting in (("optimizer", "stages.*.lr and training.betas"),
                          ("scheduler", "stages.*.schedule"), ("fp16", "llm.dtype"),
                          ("amp", "llm.dtype")):
        block = config.get(name)
        if block and not (isinstance(block, dict) and block.get("enabled") is False):
            raise InputError(f"{path.name}: {name} is {json.dumps(block)}, but the experiment sets "
                             f"it by {setting}; delete it there")
    for dotted, value in values.items():
        *parents, leaf = dotted.split(".")
        node = config
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise InputError(f"{path.name}: {part} is {json.dumps(node)}, not an object; write "
                                 f"{{}} there or leave it out")
        if node.get(leaf, "auto") not in ("auto", value):
            raise InputError(
                f"{path.name}: {dotted} is {node[leaf]!r}, but the experiment needs {value!r}; "
                'write "auto" there or change the experiment'
            )
        node[leaf] = value
    return config


def experiment_ds_config(path: Path, experiment: Experiment, accumulation: int) -> dict:
    """The DeepSpeed JSON with all that the experiment sets; see :func:`resolve_ds_config`."""
    training = experiment.training
    return resolve_ds_config(path, {
        "train_batch_size": training.micro_batch * accumulation * dist.get_world_size(),
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": training.max_grad_norm,
        "bf16.enabled": experiment.llm.dtype == "bfloat16",
        "zero_optimization.stage": 2,
    })


def build_engine(
    model: nn.Module, experiment: Experiment, stage: StageConfig, ds_config: Path,
    accumulation: int,
):
    """A ZeRO-2 engine around ``model``, whose trainable parameters are those with
    ``requires_grad``, in the groups of :func:`parameter_groups`.

    Raises:
        InputError: the DeepSpeed JSON contradicts the experiment, or nothing is trainable.
    """
    training = experiment.training
    groups = parameter_groups(model, stage, training)
    if not groups:
        raise InputError(f"stages: {stage.name}: nothing is trainable")
    config = experiment_ds_config(ds_config, experiment, accumulation)
    zero = config["zero_optimization"]
    for bucket in ("reduce_bucket_size", "allgather_bucket_size"):
        if zero.get(bucket) == "auto":  # one bucket that just holds everything; the default is 1 GB
            zero[bucket] = trainable(model)
    if zero.get("use_multi_rank_bucket_allreduce") == "auto":
        zero["use_multi_rank_bucket_allreduce"] = not reduces_to_owners(dist.get_world_size())
    config.setdefault("steps_per_print", 10**9)  # our own monitor prints
    # And measures: DeepSpeed's timer would wait for the GPU before every forward pass.
    config.setdefault("timers", {"throughput": {"enabled": False}})
    optimizer = torch.optim.AdamW(
        groups, lr=stage.lr, betas=tuple(training.betas),
        fused=get_accelerator().device_name() == "cuda" or None,
    )
    optimizer.register_step_post_hook(lambda *_: weights_changed())
    for param in (p for group in groups for p in group["params"]):
        param.grad_dtype = torch.float32  # micro-batches add up in it, whatever the model's dtype
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    # In fp32 DeepSpeed does not look for gradients that are no numbers; here every dtype does, and
    # such a step is skipped on all ranks.
    engine.optimizer.check_grad_overflow = True
    return engine


def reduces_to_owners(world_size: int) -> bool:
    """Whether ``"auto"`` reduces gradients to the ranks that own them, and not to all."""
    return world_size <= OWNER_REDUCTIONS


@contextmanager
def reduced_once(engine) -> Iterator[None]:
    """The backward passes of one optimizer step go inside; ``engine.step()`` follows, once.

    ZeRO-2 by itself reduces the gradients of every micro-batch over the ranks. Here they add up on
    their rank in fp32, and are rounded to the model's dtype and reduced at the end.
    """
    engine.set_gradient_accumulation_boundary(True)  # every step() updates
    with engine.coalesce_grad_reduction():
        try:
            yield
        except BaseException:
            # With nothing to reduce this rank can go down at once, instead of waiting for others.
            engine.optimizer.zero_grad()
            raise


def release(engine) -> None:
    """Destroy the engine and everything that it hung onto the model.

    ``destroy()`` leaves forward hooks, gradient hooks and buffers behind, and with them the whole
    engine and its optimizer states. The caller must drop its own reference too.
    """
    module = engine.module
    engine.destroy()
    for part in module.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks,
                      part._backward_pre_hooks):
            hooks.clear()
    for param in module.parameters():
        param.grad = None
        for name in ("_hp_mapping", "_hp_grad", "_zero_optimizer", "get_full_hp_param",
                     "set_full_hp_param", "get_full_hp_grad", "set_full_hp_grad",
                     "load_hp_checkpoint_state", "_dp_group", "_index_in_param_group"):
            if hasattr(param, name):
                delattr(param, name)
    gc.collect()
    get_accelerator().empty_cache()
