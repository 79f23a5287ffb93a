"""The DeepSpeed JSON: where it is found, what the experiment sets in it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

from vlmds.errors import InputError
from vlmds.experiments.schema import Experiment

REPOSITORY = Path(__file__).resolve().parents[2]
# An installed package has its copies; in a checkout the files are where users of DeepSpeed expect them.
DS_CONFIGS = (REPOSITORY / "vlmds" / "ds_configs", REPOSITORY / "ds_configs")
OWNER_REDUCTIONS = 64
"""Ranks up to which each part of the gradients is reduced to the rank that owns it, one after
another: half the bytes of an all-reduce, but as many rings as ranks, each with its own latency."""


def find_ds_config(given: str | None) -> Path:
    """The DeepSpeed JSON of ``--ds-config``: a path, or the name of one that comes with vlmds; the
    default if it is not given. Raises InputError: an unknown name."""
    if given is None:
        return default_ds_config()
    if Path(given).is_file() or Path(given).name != given:
        return Path(given)
    return _packaged_ds_config(given.removesuffix(".json"))


def default_ds_config() -> Path:
    """zero2.json of ds_configs/, or on a CPU zero2_cpu.json.

    The two are alike today. Both stay: commands name each (``--ds-config zero2_cpu``), and settings for
    a GPU, such as overlapping communication, must not change results on a CPU.
    """
    on_cpu = get_accelerator().device_name() == "cpu"
    return _packaged_ds_config("zero2_cpu" if on_cpu else "zero2")


def _packaged_ds_config(name: str) -> Path:
    """Raises InputError if there is none of this name."""
    known = {path.stem: path for folder in reversed(DS_CONFIGS) for path in folder.glob("*.json")}
    if name not in known:
        raise InputError(
            f"--ds-config: {name} is neither a file nor one of those that come with "
            f"vlmds: {', '.join(sorted(known)) or 'none is installed'}"
        )
    return known[name]


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
    for name, setting in (
        ("optimizer", "stages.*.lr and training.betas"),
        ("scheduler", "stages.*.schedule"),
        ("fp16", "llm.dtype"),
        ("amp", "llm.dtype"),
    ):
        block = config.get(name)
        if block and not (isinstance(block, dict) and block.get("enabled") is False):
            raise InputError(
                f"{path.name}: {name} is {json.dumps(block)}, but the experiment sets it by {setting}; delete it there"
            )
    for dotted, value in values.items():
        *parents, leaf = dotted.split(".")
        node = config
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise InputError(
                    f"{path.name}: {part} is {json.dumps(node)}, not an object; write {{}} there or leave it out"
                )
        if node.get(leaf, "auto") not in ("auto", value):
            raise InputError(
                f"{path.name}: {dotted} is {node[leaf]!r}, but the experiment needs {value!r}; "
                'write "auto" there or change the experiment'
            )
        node[leaf] = value
    return config


def experiment_ds_config(path: Path, experiment: Experiment, accumulation: int, trainables: int) -> dict:
    """The DeepSpeed JSON with all that the experiment sets; see :func:`resolve_ds_config`.
    trainables: number of parameters that the stage trains."""
    training = experiment.training
    config = resolve_ds_config(
        path,
        {
            "train_batch_size": training.micro_batch * accumulation * dist.get_world_size(),
            "train_micro_batch_size_per_gpu": training.micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": training.max_grad_norm,
            "bf16.enabled": experiment.llm.dtype == "bfloat16",
            "zero_optimization.stage": 2,
            "zero_optimization.compute_grad_norm": True,  # which also finds steps to skip
        },
    )
    zero = config["zero_optimization"]
    for bucket in ("reduce_bucket_size", "allgather_bucket_size"):
        if zero.get(bucket) == "auto":  # one bucket, large enough for everything; the default is 1 GB
            zero[bucket] = trainables
    if zero.get("use_multi_rank_bucket_allreduce") == "auto":
        zero["use_multi_rank_bucket_allreduce"] = not reduces_to_owners(dist.get_world_size())
    config.setdefault("steps_per_print", 10**9)  # our own monitor prints
    # And measures: DeepSpeed's timer would wait for the GPU before every forward pass.
    config.setdefault("timers", {"throughput": {"enabled": False}})
    return config


def check_ds_config(path: Path, experiment: Experiment, accumulation: int) -> None:
    """Raise InputError if :func:`build_engine` would refuse the DeepSpeed JSON, or DeepSpeed."""
    config = experiment_ds_config(path, experiment, accumulation, trainables=1)
    try:
        DeepSpeedConfig(config)
    except (AssertionError, KeyError, TypeError, ValueError, DeepSpeedConfigError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"--ds-config {path}: DeepSpeed refuses it: {reason[:300]}") from error


def reduces_to_owners(world_size: int) -> bool:
    """Whether ``"auto"`` reduces gradients to the ranks that own them, instead of to all."""
    return world_size <= OWNER_REDUCTIONS
