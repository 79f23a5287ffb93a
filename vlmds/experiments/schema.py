"""The keys of an experiment file: type, default and meaning of each. Reading is in
:mod:`vlmds.experiments.reading`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


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

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


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
    LinearProjector | MLPProjector | CAbstractorProjector | PerceiverProjector, Field(discriminator="type")
]
PROJECTORS = {get_args(cls.model_fields["type"].annotation)[0]: cls for cls in get_args(get_args(ProjectorConfig)[0])}


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
    """Longer captions are cut to this length in training. Cut ones end without an end-of-turn token;
    each stage logs how many there were, and the run's ledger.jsonl names the samples."""
    max_cut_fraction: Fraction | None = None
    """Share of cut captions above which all ranks stop; null sets no limit."""
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
    activation_checkpointing: Annotated[Literal["auto"] | bool | int, BeforeValidator(_checkpointing)] = "auto"
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
