"""The DeepSpeed engine: how it is built, reduces gradients once a step, and is taken down completely."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from vlmds.console.progress import phase
from vlmds.errors import InputError
from vlmds.experiments.schema import Experiment, StageConfig
from vlmds.models.captioner import Features
from vlmds.models.dora import weights_changed
from vlmds.models.trainable import parameter_groups, trainable
from vlmds.training.ds_config import experiment_ds_config

NORM_ELEMENTS = 1 << 22
"""Gradients whose norm is computed at once; a copy of so many in float64 takes 34 MB."""


class ZeroOptimizer(Protocol):
    """What vlmds uses of DeepSpeed's ZeRO-2 optimizer; the partitions and groups are private there.

    optimizer: the wrapped AdamW. overflow: the last step was skipped. single_partition_of_fp32_groups:
    this rank's fp32 partition of each parameter group. bit16_groups: each group's parameters, in the
    model's dtype.
    """

    optimizer: torch.optim.Optimizer
    overflow: bool
    param_groups: list[dict[str, Any]]
    single_partition_of_fp32_groups: list[nn.Parameter]
    bit16_groups: list[list[nn.Parameter]]

    def update_lp_params(self) -> None: ...

    def zero_grad(self) -> None: ...


class Engine(Protocol):
    """What vlmds uses of DeepSpeed's engine."""

    module: nn.Module
    optimizer: ZeroOptimizer
    forward: Callable[..., Tensor]
    backward: Callable[..., object]
    step: Callable[[], object]

    def __call__(self, *inputs: Features) -> Tensor: ...

    def train(self) -> object: ...

    def get_global_grad_norm(self) -> Tensor | float: ...

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None: ...

    def coalesce_grad_reduction(self) -> AbstractContextManager[None]: ...

    def destroy(self) -> None: ...


@phase("building the engine")
def build_engine(
    model: nn.Module, experiment: Experiment, stage: StageConfig, ds_config: Path, accumulation: int
) -> Engine:
    """A ZeRO-2 engine around ``model``, whose trainable parameters are those with
    ``requires_grad``, in the groups of :func:`parameter_groups`.

    Raises:
        InputError: the DeepSpeed JSON contradicts the experiment, or nothing is trainable.
    """
    training = experiment.training
    groups = parameter_groups(model, stage, training)
    if not groups:
        raise InputError(f"stages: {stage.name}: nothing is trainable")
    config = experiment_ds_config(ds_config, experiment, accumulation, trainable(model))
    optimizer = torch.optim.AdamW(
        groups,
        lr=stage.lr,
        betas=(training.betas[0], training.betas[1]),
        fused=get_accelerator().device_name() == "cuda" or None,
    )
    optimizer.register_step_post_hook(lambda *_: weights_changed())
    for param in (p for group in groups for p in group["params"]):
        param.grad_dtype = torch.float32  # micro-batches add up in it, whatever the model's dtype
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.optimizer.__class__ = NormChecked
    engine.optimizer.check_grad_overflow = True  # in every dtype
    return engine


class NormChecked(DeepSpeedZeroOptimizer):
    """DeepSpeed's ZeRO-2 optimizer, which skips a step, on all ranks, whose gradients are not all
    finite. Here their norm decides it, and the host waits for the GPU once a step, to read it.

    DeepSpeed first searches every parameter's gradient for values that are not finite, and then
    computes norms, which are not finite either if a gradient is not: thousands of small operations, and
    a wait for each group of parameters, twice (with the optimizer on the host, for each parameter).

    It overrides what ``step()`` of DeepSpeed 0.19 calls and reads private state;
    tests/contracts/test_deepspeed.py fails when that changes.
    """

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """No search: right after it ``step()`` checks the norm."""

    def update_offload_overflow_tracker(self, grad: Tensor | None) -> None:
        """No search while gradients go to the host, either."""

    def reset_cpu_buffers(self) -> None:
        """With the optimizer on the host, discard also the gradients of a skipped step: DeepSpeed
        would add the next steps' gradients to them, which then are not finite either."""
        super().reset_cpu_buffers()
        self.averaged_gradients.clear()

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        """The norm of the gradients of all parameters, over all ranks: fp32 scalar on the host,
        where ``step()`` and the clipping read it several times."""
        norms = self._own_norms()
        squares = torch.zeros((), dtype=torch.float64, device=get_accelerator().current_device_name())
        if norms:  # of a small model on many ranks, some own nothing
            squares += torch.stack(norms).square().sum()
        dist.all_reduce(squares, group=self.dp_process_group)
        return squares.sqrt().float().cpu()

    def _own_norms(self) -> list[Tensor]:
        """Norms of this rank's share of the gradients, in parts, float64 scalars."""
        if self.cpu_offload:  # computed on the GPU before they left it
            return list(self.norm_for_param_grads.values())
        parts: list[Tensor] = []
        for number, group in self.averaged_gradients.items():
            whole = self._get_preflattened_grad_partition(number)
            parts += group if whole is None else [whole]  # what pads them is zero
        return [
            torch.linalg.vector_norm(piece, dtype=torch.float64)  # which copies it
            for part in parts
            for piece in part.reshape(-1).split(NORM_ELEMENTS)
        ]


@contextmanager
def reduced_once(engine: Engine) -> Iterator[None]:
    """Context of the backward passes of one optimizer step; one ``engine.step()`` follows it.

    ZeRO-2 by itself reduces the gradients of every micro-batch over the ranks. Here they add up on
    their rank in fp32, and are rounded to the model's dtype and reduced at the end.
    """
    engine.set_gradient_accumulation_boundary(True)  # every step() updates
    with engine.coalesce_grad_reduction():
        try:
            yield
        except BaseException:
            # With nothing to reduce, this rank can end at once instead of waiting for others.
            engine.optimizer.zero_grad()
            raise


def release(engine: Engine) -> None:
    """Destroy the engine and all that it attached to the model.

    ``destroy()`` leaves forward hooks, gradient hooks and buffers behind, and with them the whole
    engine and its optimizer states. The caller must drop its own reference too.
    """
    module = engine.module
    engine.destroy()
    for part in module.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            hooks.clear()
    for param in module.parameters():
        param.grad = None
        for name in (
            "_hp_mapping",
            "_hp_grad",
            "_zero_optimizer",
            "get_full_hp_param",
            "set_full_hp_param",
            "get_full_hp_grad",
            "set_full_hp_grad",
            "load_hp_checkpoint_state",
            "_dp_group",
            "_index_in_param_group",
        ):
            if hasattr(param, name):
                delattr(param, name)
    gc.collect()
    get_accelerator().empty_cache()


def set_learning_rate(engine: Engine, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["factor"]


def seed_micro_batch(seed: int, stage: int, step: int, micro: int, rank: int) -> None:
    """Seed dropout as a function of the position in the run: a resumed run needs no saved RNG state."""
    generator = torch.Generator().manual_seed(
        hash((seed, stage, step, micro, rank)) % 2**63  # hash of ints is the same in any process
    )
    torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
