"""The memory of a stage on each GPU, and the size of a checkpoint, from shapes alone.

Weights, optimizer and gradients follow from DeepSpeed's ZeRO-2 as `ds_configs/zero2.json` sets it
and are exact. Activations are counted: one layer runs on the meta device, and the tensors that
autograd would keep are added up. CLIP runs in a CUDA stream of its own, and PyTorch's allocator
keeps a pool for each stream: CLIP and the language model never reuse each other's memory. Memory
outside of PyTorch (:func:`outside_bytes`) and fragmentation come on top.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import AttentionInterface

from vlmds.experiments.schema import Experiment, StageConfig
from vlmds.models.captioner import Captioner
from vlmds.models.loss import TOKENS
from vlmds.models.trainable import parameter_groups

TEXT_POSITIONS = 40
"""Positions that the chat template, a prompt and a short caption add to the visual tokens."""
PROMPT_POSITIONS, PROMPT_CHARACTERS = 32, 16
"""Positions that the chat template and a prompt of at most that many characters add to the visual
tokens and the caption. Each further character counts as a token, which rather overestimates."""
EVERY = (0, 8, 4, 3, 2, 1)
"""Settings of activation checkpointing: no layer (0), or every n-th; the fastest first."""
CONTEXT_BYTES, COMMUNICATOR_BYTES = 2.5e9, 1.0e9
"""CUDA's context with the libraries' kernels and workspaces; NCCL's communicators, with more than
one GPU. Assumed, not measured yet."""
LATER_BYTES = 1.0e9
"""The part of both that is allocated after :func:`vlmds.training.activations.free_bytes` is measured:
kernels that are loaded at their first call, workspaces, DeepSpeed's own communicators. Assumed."""
USABLE = 0.94
"""Share of the memory that is left after fragmentation. Assumed."""
_NF4_BLOCK, _NF4_BLOCKS_PER_SCALE = 64, 256


def stage_memory(
    experiment: Experiment, stage: StageConfig, captioner: Captioner, tower: nn.Module | None, world_size: int
) -> dict[str, int]:
    """Bytes on one GPU at the peak of a stage, by part, with the longest captions that
    ``data.max_caption_tokens`` allows. ``training.activation_checkpointing: auto`` counts as true.

    Args:
        captioner: on the meta device, with the adapter, frozen as in the stage.
        tower: the CLIP model on the meta device; None where the data has its features.
    """
    setting = experiment.training.activation_checkpointing
    every = 1 if setting == "auto" else int(setting)
    return stage_memories(experiment, stage, captioner, tower, world_size, (every,))[every]


def outside_bytes(world_size: int) -> float:
    """Bytes on a GPU beside PyTorch's tensors, where nothing was measured."""
    return CONTEXT_BYTES + (COMMUNICATOR_BYTES if world_size > 1 else 0.0)


def recompute_interval(memories: dict[int, dict[str, int]], free: float) -> int | None:
    """The first setting of :func:`stage_memories` that fits: 0 for no layer, n for every n-th; None
    if none fits.

    Args:
        free: bytes that PyTorch's allocator may take, those that it has taken already included.
    """
    room = free * USABLE
    return next((every for every, parts in memories.items() if sum(parts.values()) <= room), None)


def stage_memories(
    experiment: Experiment,
    stage: StageConfig,
    captioner: Captioner,
    tower: nn.Module | None,
    world_size: int,
    choices: Iterable[int] = EVERY,
) -> dict[int, dict[str, int]]:
    """As :func:`stage_memory`, for several settings of activation checkpointing: no layer (0), or
    every n-th."""
    training = experiment.training
    size = getattr(torch, experiment.llm.dtype).itemsize
    partitions = partition_sizes(experiment, stage, captioner, world_size)
    trained = sum(p.numel() for p in captioner.parameters() if p.requires_grad)
    # `captioner` has the adapter here; in training, a stage that does not train it has none.
    frozen_projector = sum(p.numel() for p in captioner.projector.parameters() if not p.requires_grad)
    layer, layers = layer_activations(experiment, stage, captioner), _layers(captioner)
    positions = training.micro_batch * longest(experiment, captioner)
    hidden = positions * captioner.projector.llm_dim * size
    parts = {
        "LLM weights": llm_bytes(experiment, captioner.llm),
        "CLIP weights": 0 if tower is None else size * _count(tower.parameters()),
        # In the model's dtype, whole on every GPU.
        "trainables": size * (trained + frozen_projector),
        # In fp32, partitioned over the ranks by ZeRO-2.
        "fp32 copies": 4 * sum(partitions),
        "Adam moments": 8 * sum(partitions),
        # In fp32, whole until they are reduced after the last micro-batch.
        "gradients": 4 * trained,
        "gradient buckets": 0,
        "activations": _projector_activations(experiment, captioner),
        "logits": _logits(experiment, captioner),
        "CLIP forward": 0 if tower is None else _tower_activations(experiment, tower),
        "features ahead": _features(experiment, captioner).nbytes,  # of the next micro-batch
    }
    if training.ema_decay is not None:
        parts["weight average"] = 4 * sum(partitions)
    if experiment.llm.load_in_4bit:  # bitsandbytes unpacks one weight at a time
        parts["one unpacked weight"] = size * max(m.weight.numel() for m in quantised(captioner.llm))
    if experiment.peft.type == "dora" and "peft" in stage.train:
        # In a step's first forward pass, when there are no logits and no other unpacked weight.
        norm = dora_norm_bytes(experiment, captioner.llm)
        parts["first DoRA norm"] = max(0, norm - parts["logits"] - parts.get("one unpacked weight", 0))
    # The reduction comes after the backward pass and reuses its memory: first a bucket with all
    # gradients in the model's dtype; then, in place of those in fp32, a copy of what is sent at once
    # and this rank's part in fp32.
    reduction = size * trained + max(0, size * trained // world_size + 4 * sum(partitions) - parts["gradients"])
    passing = sum(parts.get(part, 0) for part in ("activations", "logits", "one unpacked weight", "first DoRA norm"))
    memories = {}
    for every in choices:
        recomputed = math.ceil(layers / every) if every else 0
        # A checkpointed layer keeps its input; the layer that is being recomputed keeps everything.
        kept = (layers - recomputed) * layer + recomputed * hidden + (layer if recomputed else 0)
        memories[every] = {
            **parts,
            "activations": parts["activations"] + kept,
            "gradient buckets": max(0, reduction - passing - kept),
        }
    return memories


def longest(experiment: Experiment, captioner: Captioner) -> int:
    """Positions of a sample with the longest caption, in the stage with the longest prompt."""
    prompts = {experiment.for_stage(stage.name).data.prompt for stage in experiment.stages}
    text = PROMPT_POSITIONS + max(0, max(map(len, prompts)) - PROMPT_CHARACTERS)
    return captioner.projector.num_tokens + text + experiment.data.max_caption_tokens


def partition_sizes(experiment: Experiment, stage: StageConfig, captioner: Captioner, world_size: int) -> list[int]:
    """One rank's elements of each parameter group: ZeRO-2 pads a group to the same, even number on
    every rank."""
    groups = parameter_groups(captioner, stage, experiment.training)
    counts = [_count(group["params"]) for group in groups]
    return [math.ceil(count / (2 * world_size)) * 2 for count in counts]


def checkpoint_bytes(experiment: Experiment, captioner: Captioner) -> int:
    """Bytes of a checkpoint: the trainables and both moments in fp32, and their average if the
    experiment has one. Neither padding nor frozen weights are saved."""
    trained = sum(p.numel() for p in captioner.parameters() if p.requires_grad)
    return trained * (12 if experiment.training.ema_decay is None else 16)


def llm_bytes(experiment: Experiment, llm: nn.Module) -> int:
    """Bytes of the language model's frozen weights, without its adapter. In NF4 every Linear but the
    output layer takes half a byte a weight, one byte for each block of 64, four bytes for each 256
    blocks (double quantisation, arXiv:2305.14314), and its look-up tables."""
    size = getattr(torch, experiment.llm.dtype).itemsize
    total = size * _count(p for name, p in llm.named_parameters() if "lora_" not in name)
    if experiment.llm.load_in_4bit:
        for module in quantised(llm):
            count = module.weight.numel()
            blocks = math.ceil(count / _NF4_BLOCK)
            scales = math.ceil(blocks / _NF4_BLOCKS_PER_SCALE)
            tables = 4 * (16 + 256 + 1)  # both levels' values and the mean of the first's scales
            total += math.ceil(count / 2) + blocks + 4 * scales + tables - size * count
    return total


def saved_bytes(forward: Callable[[], object], own: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of `forward`, without the tensors `own` and
    counting storage that several saved tensors share once. Works on the meta device."""
    skip = {tensor.untyped_storage()._cdata for tensor in own}
    saved: dict[int, Tensor] = {}  # keeps the tensors: a freed storage's address could be reused

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in skip)


class _FlashAttention(torch.autograd.Function):
    """An attention that saves what a fused kernel saves and computes nothing. On the meta device
    PyTorch would take its unfused path, which saves length x length scores."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1]).float())
        return out


def _attention(module, query, key, value, attention_mask, **options):
    """The attention function that transformers calls: [B, heads, L, D] -> [B, L, heads, D]."""
    return _FlashAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register("vlmds_shapes", _attention)


def layer_activations(experiment: Experiment, stage: StageConfig, captioner: Captioner) -> int:
    """Bytes that one layer of the language model keeps for one micro-batch."""
    llm: Any = captioner.llm  # a PeftModel
    decoder = llm.get_decoder()
    dtype = getattr(torch, experiment.llm.dtype)
    shape = (experiment.training.micro_batch, longest(experiment, captioner), captioner.projector.llm_dim)
    hidden = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
    positions = torch.arange(shape[1], device="meta")[None]
    rotation = tuple(t.to(dtype) for t in decoder.rotary_emb(hidden, positions))
    config = decoder.config
    before, config._attn_implementation = config._attn_implementation, "vlmds_shapes"
    adapter = nullcontext() if "peft" in stage.train else llm.disable_adapter()
    trained = [(p, p.requires_grad) for p in captioner.parameters()]
    try:
        with adapter:
            return saved_bytes(
                lambda: decoder.layers[0](hidden, attention_mask=None, position_embeddings=rotation),
                own=[*decoder.layers[0].parameters(), *rotation],
            )
    finally:
        config._attn_implementation = before
        for parameter, flag in trained:  # PEFT makes an adapter that it enables trainable
            parameter.requires_grad_(flag)


def dora_norm_bytes(experiment: Experiment, llm: nn.Module) -> int:
    """The most bytes that :func:`vlmds.models.dora._compute_norm` takes at once for one Linear of [out,
    in]: B·A, made from a unit matrix of [in, in] and A; then B·A, s·B·A, W + s·B·A, and W itself if
    it is unpacked for this."""
    size, rank = getattr(torch, experiment.llm.dtype).itemsize, experiment.peft.r
    copies = 4 if experiment.llm.load_in_4bit else 3
    shapes: list[Any] = [
        module.get_base_layer().weight.shape for module in llm.modules() if isinstance(module, LoraLayer)
    ]
    return size * max(max(inputs * (inputs + rank + outputs), copies * outputs * inputs) for outputs, inputs in shapes)


def _features(experiment: Experiment, captioner: Captioner) -> Tensor:
    """CLIP's features of a micro-batch: [B, F·P, vision width] on the meta device."""
    projector = captioner.projector
    return torch.empty(
        (experiment.training.micro_batch, projector.num_frames * projector.patches, projector.vision_dim),
        dtype=next(projector.parameters()).dtype,
        device="meta",
    )


def _projector_activations(experiment: Experiment, captioner: Captioner) -> int:
    projector, features = captioner.projector, _features(experiment, captioner)
    return features.nbytes + saved_bytes(lambda: projector(features), own=[*projector.parameters(), features])


def _logits(experiment: Experiment, captioner: Captioner) -> int:
    """Bytes of logits, of the longest allowed caption and at most as many at once as `token_losses`
    takes: in fp32, also in the model's dtype if that differs, and the gradient of their input."""
    tokens = experiment.training.micro_batch * (experiment.data.max_caption_tokens + 1)
    config: Any = captioner.llm.config
    size = getattr(torch, experiment.llm.dtype).itemsize
    return (
        min(tokens, TOKENS) * config.vocab_size * (4 + (size if size < 4 else 0))
        + tokens * captioner.projector.llm_dim * size
    )


def _tower_activations(experiment: Experiment, tower: nn.Module) -> int:
    """Bytes at the peak of CLIP's forward pass, which keeps nothing: for each position of a chunk of
    frames the residual, queries, keys, values and their product, or the residual and the two wide
    tensors around the activation; and the pixels in fp32, twice."""
    config: Any = tower.config
    frames = min(experiment.vision.frames_per_call, experiment.training.micro_batch * experiment.data.num_frames)
    size = getattr(torch, experiment.llm.dtype).itemsize
    positions = frames * ((config.image_size // config.patch_size) ** 2 + 1)
    widest = max(5 * config.hidden_size, config.hidden_size + 2 * config.intermediate_size)
    return positions * widest * size + 2 * 4 * frames * 3 * config.image_size**2


def quantised(llm: nn.Module) -> list[nn.Linear]:
    """The Linears that bitsandbytes replaces: all but the output layer and the adapter's own."""
    return [
        module
        for name, module in llm.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name and "lm_head" not in name
    ]


def _layers(captioner: Captioner) -> int:
    return len(captioner.llm.get_decoder().layers)


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)
