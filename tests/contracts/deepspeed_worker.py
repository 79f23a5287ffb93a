"""One optimizer step on a tiny captioner, one rank; facts about the engine go to a JSON file:
`deepspeed_worker.py OUTPUT`."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.comm.torch import build_shm_op

from tests.training.engine_worker import ROOT, batch, tiny_captioner
from vlmds.distributed.ranks import init_distributed
from vlmds.experiments.reading import load_experiment
from vlmds.models.trainable import freeze
from vlmds.training.engine import NormChecked, build_engine, reduced_once, release

EXPERIMENT = load_experiment(
    "e1", ["llm.load_in_4bit=false", "llm.dtype=float32", "data.num_frames=2", "training.micro_batch=2"]
)


def attributes(model) -> dict[str, list[str]]:
    """What is set on each parameter, numbers and None excepted, and how many hooks each module has."""
    found = {
        name: sorted(key for key, value in vars(parameter).items() if not isinstance(value, int | None))
        for name, parameter in model.named_parameters()
    }
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        found[f"hooks of {name}"] = [str(len(each)) for each in hooks]
    return found


def fragments(engine) -> list:
    """Whether each trained parameter is where DeepSpeed's mapping says, in the flat fp32 partition."""
    zero, found = engine.optimizer, []
    for flat, parameters in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True):
        for parameter in parameters:
            mapping = parameter._hp_mapping
            place, start = mapping.hp_fragment_address, mapping.lp_fragment_address.start
            piece = parameter.detach().reshape(-1)[start : start + place.numel]
            found.append(torch.equal(flat.detach()[place.start : place.start + place.numel], piece.float()))
    return found


def main(output: str) -> None:
    init_distributed(timeout_minutes=3)
    store = dist.PrefixStore("contract", dist.distributed_c10d._get_default_store())
    seen: dict = {"store": store.add("n", 1) == 1, "shared-memory op": str(build_shm_op())}
    model = tiny_captioner(EXPERIMENT)
    freeze(model, EXPERIMENT.stages[0])
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32  # build_engine sets it; it is PyTorch's
    before = attributes(model)
    engine = build_engine(model, EXPERIMENT, EXPERIMENT.stages[0], ROOT / "ds_configs" / "zero2_cpu.json", 4)
    zero = engine.optimizer
    seen["class"] = [each.__name__ for each in type(zero).__mro__[:2]]
    seen["fragments"] = fragments(engine)

    calls: list[str] = []
    for name in ("check_overflow", "scaled_global_norm"):
        method = getattr(NormChecked, name)
        setattr(NormChecked, name, lambda *a, name=name, method=method, **k: calls.append(name) or method(*a, **k))
    features, ids, labels = batch(model.projector.num_tokens)
    with reduced_once(engine):
        for row in range(0, 8, 2):
            engine.backward(engine(*(t[row : row + 2] for t in (features, ids, labels))) / 100, scale_wrt_gas=False)
    flat = [zero._get_preflattened_grad_partition(number) for number in zero.averaged_gradients]
    seen["gradients"] = {
        "groups": sorted(zero.averaged_gradients),
        "flat": [None if whole is None else whole.dim() for whole in flat],
        "offload": zero.cpu_offload,
        "ranks": dist.get_world_size(group=zero.dp_process_group),
    }
    weight = zero.single_partition_of_fp32_groups[0].detach().clone()
    engine.step()
    seen["calls"] = calls
    seen["norm"] = float(engine.get_global_grad_norm())
    seen["overflow"] = zero.overflow
    seen["moved"] = not torch.equal(weight, zero.single_partition_of_fp32_groups[0])
    seen["state"] = sorted(zero.optimizer.state[zero.single_partition_of_fp32_groups[0]])

    zero.single_partition_of_fp32_groups[0].data.fill_(0.5)
    zero.update_lp_params()
    seen["written back"] = all(bool((p == 0.5).all()) for p in zero.bit16_groups[0])
    seen["timer"] = engine.tput_timer.config.enabled
    release(engine)
    after = attributes(model)
    seen["left behind"] = {name: [before[name], after[name]] for name in before if before[name] != after[name]}
    Path(output).write_text(json.dumps(seen))
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
