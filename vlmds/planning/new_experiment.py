"""`vlmds new`: a new experiment file, with comments on what to change and why.

Every value comes from the packaged experiment that the file extends, and every comment on the
projector from its section in vlmds/experiments/schema.py.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from vlmds.errors import InputError
from vlmds.experiments.reading import load_experiment, packaged_experiments
from vlmds.experiments.schema import PROJECTORS, Experiment, Name, PeftSection

VALIDATIONS = 4  # at least, in the shortest stage


def write_experiment(
    path: Path, projector: str, adapter: str, *, clips: int | None = None, data: str | None = None
) -> list[str]:
    """Write the file. Returns lines for the user: the file, and the next command.

    Args:
        clips: number of training clips, to count the steps. data: a packed dataset, to count them.

    Raises:
        InputError: no such projector or adapter, no such dataset, a name that cannot be an
            experiment's, or the file exists.
    """
    base = _extended(projector, adapter)
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


def _extended(projector: str, adapter: str) -> Experiment:
    """The packaged experiment of this projector and adapter among e1, e2, …; base.yaml with them if
    there is none."""
    adapters = get_args(PeftSection.model_fields["type"].annotation)
    for option, value, known in (("projector", projector, PROJECTORS), ("adapter", adapter, adapters)):
        if value not in known:
            raise InputError(f"--{option} {value}: there are {', '.join(sorted(known))}")
    for name in packaged_experiments():
        found = load_experiment(name)
        if name[1:].isdigit() and (found.projector.type, found.peft.type) == (projector, adapter):
            return found
    return load_experiment("base", ["name=base", f"projector.type={projector}", f"peft.type={adapter}"])


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
# It extends the packaged {base.name}.yaml, which has the keys that are not written here. A key behind
# a "#" is off.
extends: {base.name}
name: {path.stem}

{_projector(base)}
projector: {_flow({"type": base.projector.type, **base.projector.model_dump(exclude_unset=True)})}

# A larger r learns more and needs more clips; keep alpha / r, which scales the adapter. DoRA makes
# every step slower; compare it with LoRA on your data.
peft: {_flow({name: getattr(base.peft, name) for name in ("type", "r", "alpha", "dropout")})}

data:
  num_frames: {base.data.num_frames}  # spread evenly over the clip; long clips need more
  prompt: {_flow(base.data.prompt)}  # for clips without a prompt of their own

{_training(base, steps, has_val)}
{_stages(base, steps, clips)}"""


def _projector(base: Experiment) -> str:
    """The comments on the projector and its keys, from the schema."""
    section, written = type(base.projector), base.projector.model_fields_set - {"type"}
    lines = [
        str(section.__doc__).partition("\n\n")[0],
        "More visual tokens show more detail, and cost memory and time in the language model.",
        *(f"{key}: {field.description}" for key, field in section.model_fields.items() if key in written),
    ]
    return "\n".join(map(_comment, lines))


def _comment(text: str) -> str:
    return textwrap.fill(" ".join(text.replace("``", "").split()), 100, initial_indent="# ", subsequent_indent="# ")


def _training(base: Experiment, steps: list[int] | None, has_val: bool | None) -> str:
    training = base.training
    every = {name: getattr(training, name) for name in ("validate_every", "checkpoint_every")}
    if steps is not None:
        every = {name: max(1, min(value, min(steps) // VALIDATIONS)) for name, value in every.items()}
    validation = {
        None: "needs split val: vlmds pack --val-fraction",
        True: "loss on split val",
        False: "your data has no split val, so there is no validation: pack it with --val-fraction",
    }[has_val]
    return f"""\
training:
  # Samples at once on one GPU. Lower this first when memory is short (vlmds plan --gpu NAME).
  micro_batch: {training.micro_batch}
  gradient_accumulation: {training.gradient_accumulation}
  # Samples per optimizer step over all GPUs. Without this key it is micro_batch x
  # gradient_accumulation x GPUs: at the same learning rate, the same file then trains differently on
  # 8 GPUs than on 1. Set it before you compare runs; it must be a multiple of micro_batch x GPUs.
  # global_batch: {_batch(base)}
  validate_every: {every["validate_every"]}  # optimizer steps; {validation}
  # keep: best  # the weights with the best validation instead of the last
  # early_stopping: 3  # end a stage after this many validations in a row without an improvement
  checkpoint_every: {every["checkpoint_every"]}  # optimizer steps; a crash loses at most this many
"""


def _stages(base: Experiment, steps: list[int] | None, clips: int | None) -> str:
    lines = [
        "# Learning rates and lengths; this list replaces the packaged one. align trains the projector",
        "# alone, finetune trains projector and adapter.",
        _comment(base.projector.rate_advice),
    ]
    few = base.training.validate_every
    if steps is None:
        lines.append("# vlmds plan --data DIR prints the steps of these epochs.")
    else:
        lines.append(f"# Steps are those of {clips:,} clips at a global batch of {_batch(base)}.")
        if min(steps) < few:
            lines.append(
                f"# Fewer than {few} are few: give more epochs, and let the validation loss decide when to stop."
            )
    lines.append("stages:")
    for number, stage in enumerate(base.stages):
        count = f"  # {steps[number]:,} steps" if steps is not None else ""
        lines.append(f"  - {_flow(stage.model_dump(exclude_unset=True))}{count}")
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    """The value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=1000)
    return text.removesuffix("...\n").strip()
