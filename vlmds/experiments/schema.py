"""The experiment: one YAML file, validated strictly before anything is loaded.

``load_experiment("e7.yaml", ["training.micro_batch=4"])`` follows ``extends``, applies the
overrides, and returns an :class:`Experiment`. Every mistake is one :class:`InputError` line that
names the file and the key.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from vlmds.errors import InputError

PACKAGED = Path(__file__).parent


def _number(value: Any) -> Any:
    """PyYAML follows YAML 1.1, where ``1e-3`` (no dot) is a string. Read it as the number it is."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    return value


Float = Annotated[float, BeforeValidator(_number)]
PositiveFloat = Annotated[float, Field(gt=0), BeforeValidator(_number)]
Fraction = Annotated[float, Field(ge=0, le=1), BeforeValidator(_number)]
PositiveInt = Annotated[int, Field(gt=0)]
NaturalInt = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Section(BaseModel):
    """A mapping of the experiment file: unknown keys and wrong types are errors."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class VisionConfig(Section):
    """The frozen vision tower."""

    model: str
    """A repository of the Hugging Face hub (``owner/name``), or a folder in its format."""
    revision: str | None = None
    """Commit, tag or branch of that repository; null takes what the hub's cache on this machine has,
    else the newest. A run records the commit that it used. Another ``model`` starts without one."""
    feature_layer: Literal[-1, -2] = -1
    """Layer of CLIP whose patch tokens are used: -1 the last, -2 the one below."""
    frames_per_call: PositiveInt = 64
    """Frames that go through CLIP at once; bounds its activation memory."""
    pool: PositiveInt = 1
    """Patch features are averaged over pool x pool squares; must divide the patches of a side."""


class LinearProjector(Section):
    """One Linear for each patch."""

    type: Literal["linear"]
    """Which projector."""


class MLPProjector(Section):
    """Linear, GELU, Linear for each patch."""

    type: Literal["mlp"]
    """Which projector."""


class _Resampler(Section):
    width: PositiveInt | None = None
    """Inner width; null means the LLM's width, and no output Linear."""
    num_queries: PositiveInt = 64
    """Learned queries: the visual tokens of a clip, whatever ``data.num_frames`` is."""
    num_heads: PositiveInt = 8
    """Attention heads; must divide ``width``."""
    temporal_embedding: bool = True
    """Add a learned embedding of its time to each frame's features."""

    @model_validator(mode="after")
    def _heads_divide_width(self):
        if self.width is not None and self.width % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide width {self.width}")
        return self


class CAbstractorProjector(_Resampler):
    """Learned queries, cross-attention and a feed-forward network."""

    type: Literal["cabstractor"]
    """Which projector."""


class PerceiverProjector(_Resampler):
    """Learned queries, ``depth`` blocks of cross-attention, self-attention and feed-forward."""

    type: Literal["perceiver"]
    """Which projector."""
    depth: PositiveInt = 2
    """Number of blocks."""


ProjectorConfig = Annotated[
    Union[LinearProjector, MLPProjector, CAbstractorProjector, PerceiverProjector],
    Field(discriminator="type"),
]
_PROJECTORS = {
    get_args(cls.model_fields["type"].annotation)[0]: cls
    for cls in get_args(get_args(ProjectorConfig)[0])
}


class LanguageConfig(Section):
    """The frozen language model."""

    model: str
    """A repository of the Hugging Face hub, or a folder, as in ``vision.model``."""
    revision: str | None = None
    """Commit, tag or branch, as in ``vision.revision``."""
    load_in_4bit: bool = True
    """NF4 with double quantisation; false loads the weights in ``dtype``."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the computation, and of the weights that are not in 4 bits."""
    attention: Literal["auto", "sdpa", "flash_attention_2", "flash_attention_3"] = "auto"
    """What computes attention; auto takes the newest FlashAttention that is installed, in bfloat16
    on a GPU that it is made for, else PyTorch's own (sdpa)."""


class PeftSection(Section):
    """The adapter of the language model."""

    type: Literal["lora", "dora"]
    """LoRA (arXiv:2106.09685) or DoRA (arXiv:2402.09353)."""
    r: PositiveInt = 16
    """Rank."""
    alpha: PositiveFloat = 32
    """The adapter's output is scaled by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1), BeforeValidator(_number)] = 0.05
    """Dropout on the adapter's branch, in training."""
    target_modules: Annotated[list[str], Field(min_length=1)]
    """Names of the Linears that get an adapter, in every layer."""
    rslora: bool = False
    """Scale the adapter by alpha / sqrt(r) instead of alpha / r (arXiv:2312.03732)."""


class BlendPart(Section):
    """One dataset of a blend."""

    path: str
    """Folder or URL written by ``vlmds pack``."""
    weight: PositiveFloat = 1.0
    """Share of the training samples that come from here, relative to the other parts' weights."""


class DataConfig(Section):
    """The packed data, and how samples are read from it."""

    path: str | None = None
    """Folder or URL written by ``vlmds pack``; ``--data`` sets it."""
    blend: Annotated[list[BlendPart], Field(min_length=1)] | None = None
    """Several packed datasets, mixed by weight, instead of ``path``."""
    cache_dir: str | None = None
    """Where shards of a remote dataset are kept on this machine; null reads them remotely."""
    cache_gb: PositiveFloat = 100.0
    """Size limit of ``cache_dir`` in 10^9 bytes; the least recently used shards are deleted first.
    Below the size of ``shuffle_window`` shards it is slow: each shard is fetched many times."""
    decode_seconds: PositiveFloat = 60.0
    """How long the decoding of one video may take before the sample counts as unreadable."""
    num_frames: PositiveInt = 8
    """Frames of a clip, sampled at the centres of as many equal spans."""
    prompt: str = "이 영상을 설명해주세요."
    """The user's turn, for clips that have no prompt of their own."""
    max_caption_tokens: PositiveInt = 256
    """Longer captions are cut to this length in training."""
    shuffle_window: PositiveInt = 16
    """Shards whose samples are shuffled together."""
    num_workers: NaturalInt = 4
    """Reader processes per rank; 0 decodes in the training process."""
    max_bad_fraction: Fraction = 0.01
    """Share of unreadable samples above which all ranks stop."""
    verify: Literal["sha256", "size"] = "size"
    """How shards are checked at every start: by size, or by reading every byte (sha256, split over
    the ranks). What is read in training is checked against the index in any case."""

    @model_validator(mode="after")
    def _one_source(self):
        if self.path is not None and self.blend is not None:
            raise ValueError("give path or blend, not both")
        return self


def _checkpointing(value: Any) -> Any:
    if isinstance(value, bool) or value == "auto" or (isinstance(value, int) and value > 0):
        return value
    raise ValueError(f"must be auto, true, false, or n for every n-th layer, not {value!r}")


class TrainingConfig(Section):
    """Batches, optimizer, validation, checkpoints and limits."""

    seed: NaturalInt = 0
    """Of the order of the data, the fresh projector and adapter, and dropout."""
    micro_batch: PositiveInt = 2
    """Samples at once on one GPU."""
    gradient_accumulation: PositiveInt = 4
    """Micro-batches of one GPU per optimizer step."""
    global_batch: PositiveInt | None = None
    """Samples per optimizer step over all ranks. null: micro_batch x gradient_accumulation x
    ranks, at the run's first start. A number takes precedence over gradient_accumulation, which is
    then derived for any number of ranks."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    weight_decay: Annotated[float, Field(ge=0), BeforeValidator(_number)] = 0.0
    """Of AdamW; see ``weight_decay_factors`` of a stage."""
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """Of AdamW."""
    activation_checkpointing: Annotated[
        Literal["auto"] | bool | int, BeforeValidator(_checkpointing)] = "auto"
    """Which layers of the LLM recompute their activations in the backward pass instead of keeping
    them: all (true), none (false), every n-th (n); auto takes the fewest with which the stage fits
    the GPU's memory, and none on a CPU. Results are the same."""
    validate_every: PositiveInt = 200
    """Optimizer steps between validation passes; one also runs at the end of each stage."""
    evaluate_every: PositiveInt | None = None
    """Optimizer steps between evaluations (captions and metrics) of a part of split val; one also
    runs at the end of each stage. null: no evaluation in training."""
    evaluate_clips: PositiveInt = 64
    """Clips of such an evaluation."""
    evaluate_tokens: PositiveInt = 64
    """Maximum length of its captions, in tokens."""
    best_metric: str = "loss"
    """What decides which checkpoint is the best: loss (on split val), or a metric of evaluate_every
    such as cider_d@morpheme or chrf++@char."""
    keep: Literal["last", "best"] = "last"
    """Which weights a stage leaves as its artifact."""
    early_stopping: PositiveInt | None = None
    """A stage ends after this many evaluations of best_metric in a row without an improvement; null
    never ends it early."""
    checkpoint_every: PositiveInt = 200
    """Optimizer steps between checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that are kept; the best one is kept as well."""
    timeout_minutes: PositiveFloat = 30
    """How long a collective may wait before the job is ended."""
    heartbeat_seconds: Annotated[float, Field(ge=4), BeforeValidator(_number)] | None = 120
    """How long a node may be unreachable while the job waits, before the job is ended; null leaves
    it to timeout_minutes."""
    ema_decay: Annotated[float, Field(gt=0, lt=1), BeforeValidator(_number)] | None = None
    """Keep an exponential moving average of the trainables, which validation and the artifact then
    use; null keeps none."""
    max_skipped_steps: NaturalInt = 10
    """Optimizer steps that may be skipped for a loss or gradient that is not finite before the run
    ends."""

    @model_validator(mode="after")
    def _best_metric_is_made(self):
        if self.best_metric != "loss" and self.evaluate_every is None:
            raise ValueError(f"best_metric {self.best_metric} is made by evaluate_every; set it, too")
        return self


class LoggingConfig(Section):
    """What is logged, and where."""

    every: PositiveInt = 10
    """Optimizer steps between lines on the screen and writes of metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard files to the run folder."""
    wandb_project: str | None = None
    """Also log to this project of Weights & Biases; null does not."""
    stall_seconds: PositiveFloat = 60.0
    """A rank that has waited this long for data logs which samples it waits for."""


class KindFactors(Section):
    """A factor for each kind of trainable parameter."""

    projector: Annotated[float, Field(ge=0), BeforeValidator(_number)] = 1.0
    """The projector."""
    lora_a: Annotated[float, Field(ge=0), BeforeValidator(_number)] = 1.0
    """LoRA's matrices A."""
    lora_b: Annotated[float, Field(ge=0), BeforeValidator(_number)] = 1.0
    """LoRA's matrices B; LoRA+ proposes 16 for the learning rate (arXiv:2402.12354)."""
    magnitude: Annotated[float, Field(ge=0), BeforeValidator(_number)] = 1.0
    """DoRA's magnitude vectors."""


class StageConfig(Section):
    """One stage of the schedule; stages run one after the other."""

    name: Name
    """Names its checkpoints and its artifact."""
    train: list[Literal["projector", "peft"]]
    """What is trained: the projector, the adapter (peft), or both."""
    lr: PositiveFloat
    """Peak learning rate."""
    epochs: PositiveFloat | None = None
    """Length in passes over split train. Give either epochs or steps."""
    steps: PositiveInt | None = None
    """Length in optimizer steps. Give either epochs or steps."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps in which the learning rate rises linearly from 0."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Learning rate after the warm-up. wsd: constant, then a linear decay (arXiv:2404.06395)."""
    min_lr_ratio: Fraction = 0.0
    """Where the decay ends, as a share of lr."""
    decay_ratio: Fraction = 0.1
    """Share of the steps that the decay of wsd takes."""
    lr_factors: KindFactors = KindFactors()
    """Multiply ``lr`` for each kind of parameter."""
    weight_decay_factors: KindFactors = KindFactors()
    """Multiply ``training.weight_decay`` for each kind of parameter."""

    @model_validator(mode="after")
    def _trains_something_for_some_time(self):
        if not self.train:
            raise ValueError("train is empty: this stage trains nothing; list projector, peft or both")
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        return self


class Experiment(Section):
    """One experiment, fully resolved. ``model_dump()`` is what a run folder records."""

    name: Name
    """Names the run folder (runs/NAME) and the experiment in reports."""
    owner: str | None = None
    """Who runs it; ``vlmds sweep --owner`` selects by it."""
    priority: int | None = None
    """``vlmds sweep`` runs low numbers first."""
    vision: VisionConfig
    """The frozen vision tower."""
    projector: ProjectorConfig
    """What turns patch features into visual tokens; ``type`` decides which other keys there are."""
    llm: LanguageConfig
    """The frozen language model."""
    peft: PeftSection
    """The adapter of the language model."""
    data: DataConfig = DataConfig()
    """The packed data, and how samples are read from it."""
    training: TrainingConfig = TrainingConfig()
    """Batches, optimizer, validation, checkpoints and limits."""
    logging: LoggingConfig = LoggingConfig()
    """What is logged, and where."""
    stages: Annotated[list[StageConfig], Field(min_length=1)]
    """The schedule: one or more stages, in order. A list replaces the extended file's list."""

    @model_validator(mode="after")
    def _stage_names_differ(self):
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"two stages have the same name: {', '.join(names)}")
        return self


def packaged_experiments() -> list[str]:
    """Names of the experiments that come with vlmds: demo, e1 ... e8."""
    return sorted(path.stem for path in PACKAGED.glob("*.yaml") if path.stem != "base")


def load_experiment(exp: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Experiment:
    """Read, resolve and validate an experiment.

    Args:
        exp: path of a YAML file, or the name of a packaged experiment (``e7`` or ``e7.yaml``).
        overrides: ``key=value`` pairs; keys are dotted, list items by number
            (``stages.0.lr=5e-4``), values are YAML.

    Raises:
        InputError: one line that names the file or override, the key, and the fix.
    """
    path = find_experiment(exp)
    origins: dict[str, str] = {}
    tree = _read_layers(path, origins, seen=())
    for override in sorted(overrides, key=lambda text: ".model=" not in text):  # before .revision=
        _apply_override(tree, override, origins)
    return parse_experiment(tree, path.name, origins)


def parse_experiment(tree: dict, source: str, origins: dict[str, str] | None = None) -> Experiment:
    """Validate a resolved tree, such as one that a run folder recorded.

    Raises:
        InputError: as :func:`load_experiment`.
    """
    origins = origins or {}

    def fail(key: str, problem: str):
        raise InputError(f"{_origin(origins, key) or source}: {key}: {problem}")

    _check_keys(tree, Experiment, "", fail)
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # The discriminator's tag is part of pydantic's location but not of the file's keys.
        loc = [str(part) for part in first["loc"]]
        if loc[:1] == ["projector"] and loc[1:2] and loc[1] in _PROJECTORS:
            del loc[1]
        problem = first["msg"].removeprefix("Value error, ")
        if first["type"] == "missing":
            problem = "required key is missing"
        elif first["type"] != "value_error":
            problem = f"{problem[0].lower()}{problem[1:]}, not {first['input']!r}"
        more = error.error_count() - 1
        fail(".".join(loc) or "experiment", problem + (f" (and {more} more)" if more else ""))


def find_experiment(exp: str | Path, relative_to: Path | None = None) -> Path:
    """The file that ``exp`` means: a path, or else the name of a packaged experiment."""
    for candidate in [(relative_to or Path()) / exp, Path(exp).expanduser()]:
        if candidate.is_file():
            return candidate
    if Path(exp).name == str(exp):
        packaged = PACKAGED / f"{Path(exp).stem}.yaml"
        if packaged.is_file():
            return packaged
    known = packaged_experiments()
    near = difflib.get_close_matches(Path(exp).stem, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"packaged experiments: {', '.join(known)}"
    raise InputError(f"{exp}: no such experiment file; {hint}")


def to_yaml(experiment: Experiment) -> str:
    """The resolved experiment as YAML that :func:`load_experiment` reads back."""
    return yaml.safe_dump(experiment.model_dump(), allow_unicode=True, sort_keys=False)


def _read_layers(path: Path, origins: dict[str, str], seen: tuple[Path, ...]) -> dict:
    if path.resolve() in seen:
        raise InputError(f"{path.name}: extends: the file extends itself")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: an experiment is a mapping of keys, not {type(tree).__name__}")
    parent = tree.pop("extends", None)
    merged: dict = {}
    if parent is not None:
        if not isinstance(parent, str):
            raise InputError(f"{path.name}: extends: must be one file name, not {parent!r}")
        parent_path = find_experiment(parent, relative_to=path.parent)
        merged = _read_layers(parent_path, origins, (*seen, path.resolve()))
    return _merge(merged, tree, path.name, origins, "")


def _merge(base: dict, over: dict, source: str, origins: dict[str, str], prefix: str) -> dict:
    """Deep merge; lists replace. A projector whose ``type`` changes starts afresh, because the old
    type's keys mean nothing to the new one; neither does a model's ``revision`` to another model."""
    if prefix == "projector." and over.get("type", base.get("type")) != base.get("type"):
        base = {}
    merged = dict(base)
    if prefix in _PRETRAINED and over.get("model", base.get("model")) != base.get("model"):
        merged.pop("revision", None)
    for key, value in over.items():
        dotted = f"{prefix}{key}"
        origins[dotted] = source
        if isinstance(value, dict) and isinstance(base.get(key, {}), dict):
            value = _merge(base.get(key) or {}, value, source, origins, f"{dotted}.")
        merged[key] = value
    return merged


def _apply_override(tree: dict, override: str, origins: dict[str, str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override}: write key=value, such as training.micro_batch=4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--set {override}: the value is not valid YAML") from None
    *parents, leaf = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        if isinstance(node, list):
            node = node[_list_index(node, part, where, override)]
        else:
            node = node.setdefault(part, {})
        if not isinstance(node, (dict, list)):
            raise InputError(f"--set {override}: {where} is a value, it has no keys")
    if isinstance(node, list):
        node[_list_index(node, leaf, key, override)] = value
    else:
        if key == "projector.type" and node.get("type") != value:
            node.clear()  # as _merge does: the old type's keys mean nothing to the new one
        if leaf == "model" and f"{'.'.join(parents)}." in _PRETRAINED and node.get("model") != value:
            node.pop("revision", None)
        other = _DATA.get(key)
        if other and value is not None and not origins.get(f"data.{other}", "").startswith("--set"):
            node.pop(other, None)  # other data than the file's; two overrides are a mistake
        node[leaf] = value
    for depth in range(1, len(parents) + 1):
        origins.setdefault(".".join(parents[:depth]), f"--set {override}")
    origins[key] = f"--set {override}"


def _list_index(items: list, part: str, where: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise InputError(f"--set {override}: {where}: give a number from 0 to {len(items) - 1}")
    return int(part)


_PRETRAINED = ("vision.", "llm.")
_DATA = {"data.path": "blend", "data.blend": "path"}  # each replaces the other
_LISTS = {"stages": StageConfig, "blend": BlendPart}  # keys that hold lists of mappings


def _check_keys(tree: Any, model: type[BaseModel], prefix: str, fail) -> None:
    """Refuse unknown keys with the nearest valid one. Values are left to pydantic."""
    if not isinstance(tree, dict):
        return
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        field = model.model_fields.get(key)
        if field is None:
            near = difflib.get_close_matches(str(key), list(model.model_fields), n=1)
            hint = f"did you mean '{near[0]}'?" if near else "valid: " + ", ".join(model.model_fields)
            fail(dotted, f"unknown key; {hint}")
        if key == "projector" and isinstance(value, dict):
            kind = value.get("type")
            if kind not in _PROJECTORS:
                near = difflib.get_close_matches(str(kind), list(_PROJECTORS), n=1)
                hint = f"did you mean '{near[0]}'? " if near else ""
                fail(f"{dotted}.type", f"unknown projector {kind!r}; {hint}valid: "
                     + ", ".join(_PROJECTORS))
            _check_keys(value, _PROJECTORS[kind], f"{dotted}.", fail)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            _check_keys(value, field.annotation, f"{dotted}.", fail)
        elif key in _LISTS and isinstance(value, list):
            for number, item in enumerate(value):
                _check_keys(item, _LISTS[key], f"{dotted}.{number}.", fail)


def _origin(origins: dict[str, str], key: str) -> str | None:
    """The file or override that set ``key`` or, failing that, its nearest parent."""
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
    return None
