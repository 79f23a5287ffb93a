"""`vlmds new`: an experiment file of one's own, with comments on what to change and why.

Every value comes from the packaged experiment that the file extends; there is no second copy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from vlmds.errors import InputError
from vlmds.experiments.reading import load_experiment, packaged_experiments
from vlmds.experiments.schema import Experiment, Name

LOOKS = 4  # validations in a short stage

_PROJECTOR = {
    "linear": "One Linear for each patch: the fewest parameters, and a visual token for every patch.",
    "mlp": "Two Linears for each patch: a visual token for every patch.",
    "cabstractor": "num_queries is the number of visual tokens of a clip, whatever num_frames is.",
    "perceiver": "num_queries is the number of visual tokens of a clip, whatever num_frames is.",
}
_RATE = {
    "linear": "A linear projector stands a high rate; if the loss jumps or grows, halve it.",
    "mlp": "An MLP stands a high rate; if the loss jumps or grows, halve it.",
    "cabstractor": "A resampler wants a lower rate than an MLP, and more steps. If the loss of align\n"
    "# stops well above that of an mlp run, first try a third of the rate and twice the epochs.",
}
_RATE["perceiver"] = _RATE["cabstractor"]


def write_experiment(
    path: Path, projector: str, adapter: str, *, clips: int | None = None, data: str | None = None
) -> list[str]:
    """Write the file; returns what to tell the user.

    Args:
        clips: number of training clips, to count the steps. data: a packed dataset, to know it.

    Raises:
        InputError: no such projector or adapter, no such dataset, a name that cannot be an
            experiment's, or the file is there already.
    """
    base = _packaged(projector, adapter)
    _check_name(path)
    has_val = None
    if data is not None:
        from vlmds.data.dataset import open_dataset

        dataset = open_dataset(data)
        clips, has_val = dataset.count("train"), "val" in dataset.splits
    if clips is not None and clips < 1:
        raise InputError(f"--clips {clips}: must be at least 1")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(_text(path, base, data or "DIR", _steps(base, clips), clips, has_val))
    except FileExistsError:
        raise InputError(f"{path}: is there already; choose another name") from None
    except FileNotFoundError:
        raise InputError(f"{path}: the folder {path.parent} does not exist; make it first") from None
    load_experiment(path)
    return [f"written: {path}, which extends {base.name}", f"next: vlmds plan --exp {path} --data {data or 'DIR'}"]


def _packaged(projector: str, adapter: str) -> Experiment:
    """The experiment of this projector and adapter among e1, e2, …"""
    found = [load_experiment(name) for name in packaged_experiments() if name[1:].isdigit()]
    for option, value, known in (
        ("projector", projector, {e.projector.type for e in found}),
        ("adapter", adapter, {e.peft.type for e in found}),
    ):
        if value not in known:
            raise InputError(f"--{option} {value}: there are {', '.join(sorted(known))}")
    return next(e for e in found if (e.projector.type, e.peft.type) == (projector, adapter))


def _check_name(path: Path) -> None:
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"{path}: must end with .yaml")
    if path.stem in (*packaged_experiments(), "base"):
        raise InputError(f"{path}: {path.stem} is the name of a packaged experiment; choose another")
    try:
        TypeAdapter(Name).validate_python(path.stem)
    except ValidationError:
        raise InputError(
            f"{path}: the file's name becomes the experiment's: begin it with a letter "
            "or digit, and use only A-Z, a-z, 0-9, '_', '.' and '-'"
        ) from None


def _batch(base: Experiment) -> int:
    """Samples per optimizer step on one GPU."""
    training = base.training
    return training.global_batch or training.micro_batch * training.gradient_accumulation


def _steps(base: Experiment, clips: int | None) -> list[int] | None:
    """Optimizer steps of each stage on one GPU."""
    if clips is None:
        return None
    from vlmds.experiments.schedule import stage_steps

    return [stage_steps(stage, clips, _batch(base)) for stage in base.stages]


def _text(
    path: Path, base: Experiment, data: str, steps: list[int] | None, clips: int | None, has_val: bool | None
) -> str:
    return f"""\
# {path.stem}: {base.projector.type} projector, {base.peft.type}. Written by vlmds new.
#
#   vlmds plan --exp {path.name} --data {data}                  # checks it; memory, steps, a sample
#   deepspeed launch/train.py --exp {path.name} --data {data}   # trains it
#
# It extends the packaged experiment {base.name}: what is not written here is as there. A key behind
# a "#" is switched off.
extends: {base.name}
name: {path.stem}

# {_PROJECTOR[base.projector.type]}
# More visual tokens show more detail, and cost memory and time in the language model.
projector: {_flow({"type": base.projector.type, **base.projector.model_dump(exclude_unset=True)})}

# A larger r learns more and needs more clips; keep alpha / r, which scales the adapter. DoRA costs
# time in every step and is worth a comparison with LoRA on your data.
peft: {_flow({name: getattr(base.peft, name) for name in ("type", "r", "alpha", "dropout")})}

data:
  num_frames: {base.data.num_frames}  # spread evenly over the clip; long clips want more
  prompt: {_flow(base.data.prompt)}  # for clips that have none of their own

{_training(base, steps, has_val)}
{_stages(base, steps, clips)}"""


def _training(base: Experiment, steps: list[int] | None, has_val: bool | None) -> str:
    training = base.training
    looks = {name: getattr(training, name) for name in ("validate_every", "checkpoint_every")}
    if steps is not None:
        looks = {name: max(1, min(value, min(steps) // LOOKS)) for name, value in looks.items()}
    validation = {
        None: "needs split val: vlmds pack --val-fraction",
        True: "loss on split val",
        False: "your data has no split val, so nothing is validated: pack it with --val-fraction",
    }[has_val]
    return f"""\
training:
  # Samples at once on a GPU: the first to lower when memory is short (vlmds plan --gpu NAME).
  micro_batch: {training.micro_batch}
  gradient_accumulation: {training.gradient_accumulation}
  # Samples per optimizer step over all GPUs. Without this key it is micro_batch x
  # gradient_accumulation x GPUs: the same file then learns otherwise on 8 GPUs than on 1, with the
  # same learning rate. Set it before you compare runs; it must be a multiple of micro_batch x GPUs.
  # global_batch: {_batch(base)}
  validate_every: {looks["validate_every"]}  # optimizer steps; {validation}
  # keep: best  # the weights with the best validation, and not the last
  # early_stopping: 3  # end a stage after so many validations without a better one
  checkpoint_every: {looks["checkpoint_every"]}  # optimizer steps; a crash costs at most so many
"""


def _stages(base: Experiment, steps: list[int] | None, clips: int | None) -> str:
    lines = [
        "# Learning rates and lengths; this list replaces the packaged one. align teaches the",
        "# projector alone, finetune the adapter, too.",
        f"# {_RATE[base.projector.type]}",
    ]
    few = base.training.validate_every
    if steps is None:
        lines.append("# vlmds plan --data DIR says how many steps the epochs are.")
    else:
        lines.append(f"# Steps are those of {clips:,} clips at a global batch of {_batch(base)}.")
        if min(steps) < few:
            lines.append(f"# Fewer than {few} are few: give more epochs, and look at the validation for when to stop.")
    lines.append("stages:")
    for number, stage in enumerate(base.stages):
        count = f"  # {steps[number]:,} steps" if steps is not None else ""
        lines.append(f"  - {_flow(stage.model_dump(exclude_unset=True))}{count}")
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    """On one line, as YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=1000)
    return text.removesuffix("...\n").strip()
