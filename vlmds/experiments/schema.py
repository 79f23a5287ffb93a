"""The keys of an experiment file: type, default and meaning of each. :mod:`vlmds.experiments.reading` reads
the files."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from vlmds.experiments.defaults import DECODE_SECONDS


def _number(value: Any) -> Any:
    """Convert a string such as ``1e-3``, which YAML 1.1 (and so PyYAML) does not read as a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    return value


PositiveFloat = Annotated[float, Field(gt=0), BeforeValidator(_number)]
NonNegativeFloat = Annotated[float, Field(ge=0), BeforeValidator(_number)]
Fraction = Annotated[float, Field(ge=0, le=1), BeforeValidator(_number)]
PositiveInt = Annotated[int, Field(gt=0)]
NaturalInt = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Section(BaseModel):
    """A mapping in an experiment file. Unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class VisionConfig(Section):
    """The frozen vision tower."""

    model: str
    """A repository on the Hugging Face hub (``owner/name``), or a folder in that format."""
    revision: str | None = None
    """Commit, tag or branch of that repository; null takes the version in this machine's hub cache, else the
    newest. A run records the commit it used. Changing ``model`` resets this key."""
    feature_layer: Literal[-1, -2] = -1
    """CLIP layer whose patch tokens are used: -1 is the last, -2 the one before it."""
    frames_per_call: PositiveInt = 64
    """Frames per forward pass of CLIP; limits its activation memory."""
    pool: PositiveInt = 1
    """Patch features are averaged over squares of pool x pool patches; must divide the number of patches per
    side."""


class ProjectorSection(Section):
    """Base class of all projector sections."""

    rate_advice: ClassVar[str] = "If the loss jumps or grows, halve the rate."
    """On the learning rate of stage align; `vlmds new` writes it above the stages."""
    init: str | None = None
    """Trained weights that the projector starts from: a run folder (its last finished stage), an artifact, or
    ``owner/name`` of one on the hub. Projector, vision tower, feature layer, pooling and language model must be the
    same. null: random weights."""


class LinearProjector(ProjectorSection):
    """One Linear, applied to each patch."""

    type: Literal["linear"]
    """Type of the projector."""


class MLPProjector(ProjectorSection):
    """Linear, GELU, Linear, applied to each patch."""

    type: Literal["mlp"]
    """Type of the projector."""


class _Resampler(ProjectorSection):
    rate_advice = (
        "A resampler needs a lower rate than an MLP, and more steps. If the loss of align stays well "
        "above that of an mlp run, first try a third of the rate and twice the epochs."
    )
    width: PositiveInt | None = None
    """Inner width; null means the LLM's width, without an output Linear."""
    num_queries: PositiveInt = 64
    """Number of learned queries: the visual tokens per clip, independent of ``data.num_frames``."""
    num_heads: PositiveInt = 8
    """Number of attention heads; must divide ``width``."""
    temporal_embedding: bool = True
    """Add to each frame's features a learned embedding of its time."""

    @model_validator(mode="after")
    def _heads_divide_width(self):
        if self.width is not None and self.width % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide width {self.width}")
        return self


class CAbstractorProjector(_Resampler):
    """Learned queries, cross-attention and a feed-forward network."""

    type: Literal["cabstractor"]
    """Type of the projector."""


class PerceiverProjector(_Resampler):
    """Learned queries, ``depth`` blocks of cross-attention, self-attention and feed-forward."""

    type: Literal["perceiver"]
    """Type of the projector."""
    depth: PositiveInt = 2
    """Number of blocks."""


ProjectorConfig = Annotated[
    LinearProjector | MLPProjector | CAbstractorProjector | PerceiverProjector, Field(discriminator="type")
]
PROJECTORS: dict[str, type[Section]] = {
    get_args(cls.model_fields["type"].annotation)[0]: cls for cls in get_args(get_args(ProjectorConfig)[0])
}


class LanguageConfig(Section):
    """The frozen language model."""

    model: str
    """A repository on the Hugging Face hub, or a folder, as for ``vision.model``."""
    revision: str | None = None
    """Commit, tag or branch, as for ``vision.revision``."""
    load_in_4bit: bool = True
    """NF4 with double quantisation; false loads the weights in ``dtype``."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the computation, and of weights that are not in 4 bits."""
    attention: Literal["auto", "sdpa", "flash_attention_2", "flash_attention_3"] = "auto"
    """Implementation of attention; auto takes the newest installed FlashAttention that supports the GPU, in
    bfloat16, else PyTorch's own (sdpa)."""


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
    """Names of the Linear modules that get an adapter, in every layer."""
    rslora: bool = False
    """Scale the adapter by alpha / sqrt(r) instead of alpha / r (arXiv:2312.03732)."""


class BlendPart(Section):
    """One dataset of a blend."""

    path: str
    """Folder or URL written by ``vlmds pack``."""
    weight: PositiveFloat = 1.0
    """Share of the training samples from this dataset, relative to the weights of the others."""


class _Source(Section):
    path: str | None = None
    """Folder or URL written by ``vlmds pack``."""
    blend: Annotated[list[BlendPart], Field(min_length=1)] | None = None
    """Several packed datasets, mixed by weight, instead of ``path``."""

    @model_validator(mode="after")
    def _one_source(self):
        if self.path is not None and self.blend is not None:
            raise ValueError("give path or blend, not both")
        return self

    @property
    def given(self) -> bool:
        """Whether a path or a blend is given."""
        return self.path is not None or self.blend is not None


class StageData(_Source):
    """A stage's own data. What is null is taken from the experiment's ``data``."""

    prompt: str | None = None
    """Text of the user's turn in this stage, for clips without a prompt of their own."""


class DataConfig(_Source):
    """The packed data, and how samples are read from it."""

    path: str | None = None
    """Folder or URL written by ``vlmds pack``; ``--data`` sets it."""
    cache_dir: str | None = None
    """Folder on this machine in which shards of a remote dataset are cached; null reads them remotely."""
    cache_gb: PositiveFloat = 100.0
    """Size limit of ``cache_dir`` in 10^9 bytes; the least recently used shards are deleted first. If it is
    less than ``shuffle_window`` shards, reading is slow, as each shard is fetched many times."""
    decode_seconds: PositiveFloat = DECODE_SECONDS
    """Seconds that decoding one video may take before the sample counts as unreadable."""
    num_frames: PositiveInt = 8
    """Frames per clip, sampled at the centres of this many equal spans."""
    fit: Literal["crop", "pad", "stretch"] = "pad"
    """How a frame becomes the vision tower's square. pad: bars of CLIP's mean colour on the short sides, as
    LLaVA-1.5 does; crop: only the centre, which loses 44% of a 16:9 frame; stretch: both sides resized."""
    prompt: str = "이 영상을 설명해주세요."
    """Text of the user's turn, for clips without a prompt of their own."""
    max_caption_tokens: PositiveInt = 256
    """Longer captions are cut to this length in training. Cut ones end without an end-of-turn token;
    each stage logs how many there were, and the run's ledger.jsonl names the samples."""
    max_cut_fraction: Fraction | None = 0.05
    """Share of cut captions above which all ranks stop, for a model that sees few ends does not learn to stop;
    null sets no limit."""
    shuffle_window: PositiveInt = 16
    """Number of shards whose samples are shuffled together."""
    num_workers: NaturalInt = 4
    """Reader processes per rank; 0 decodes in the training process."""
    max_bad_fraction: Fraction = 0.01
    """Share of unreadable samples above which all ranks stop."""
    verify: Literal["sha256", "size"] = "size"
    """How shards are checked at every start: by size, or by reading every byte (sha256, divided among the
    ranks). Samples read in training are always checked against the index."""


def _checkpointing(value: Any) -> Any:
    if isinstance(value, bool) or value == "auto" or (isinstance(value, int) and value > 0):
        return value
    raise ValueError(f"must be auto, true, false, or n for every n-th layer, not {value!r}")


class TrainingConfig(Section):
    """Batches, optimizer, validation, checkpoints and limits."""

    seed: NaturalInt = 0
    """Random seed of the data order, the initial projector and adapter, and dropout."""
    micro_batch: PositiveInt = 2
    """Samples per forward pass on each GPU."""
    gradient_accumulation: PositiveInt = 4
    """Micro-batches per optimizer step on each GPU."""
    global_batch: PositiveInt | None = None
    """Samples per optimizer step over all ranks. null: micro_batch x gradient_accumulation x ranks at the
    run's first start. If set, gradient_accumulation is ignored, and derived from it for any number of
    ranks."""
    max_grad_norm: PositiveFloat = 1.0
    """Maximum norm of the gradients; larger ones are clipped."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW; see also ``weight_decay_factors`` of a stage."""
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """Betas of AdamW."""
    activation_checkpointing: Annotated[Literal["auto"] | bool | int, BeforeValidator(_checkpointing)] = "auto"
    """Layers of the LLM that recompute their activations in the backward pass instead of storing them: all
    (true), none (false), every n-th (n); auto takes the fewest with which the stage fits in GPU memory,
    and none on a CPU. Results do not change."""
    validate_every: PositiveInt = 200
    """Optimizer steps between validations; one also runs at the end of each stage."""
    evaluate_every: PositiveInt | None = None
    """Optimizer steps between evaluations (captions and metrics) on a part of split val; one also runs at
    the end of each stage. null: no evaluation during training."""
    evaluate_clips: PositiveInt = 64
    """Clips per evaluation during training."""
    evaluate_tokens: PositiveInt = 64
    """Maximum length of the captions in evaluations during training, in tokens."""
    best_metric: str = "loss"
    """Metric that selects the best checkpoint: loss (on split val), or a metric of evaluate_every such as
    cider_d@morpheme or chrf++@char."""
    keep: Literal["last", "best"] = "last"
    """Weights that become the artifact of a stage."""
    blind_check: Fraction | None = 0.5
    """Share of a stage's steps after which a warning is logged if the model does not use the video or the
    training loss does not fall; null: never, and validation does not measure what the video is worth."""
    early_stopping: PositiveInt | None = None
    """A stage ends after this many consecutive evaluations of best_metric without improvement; null: never
    early."""
    checkpoint_every: PositiveInt = 200
    """Optimizer steps between checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Number of newest checkpoints to keep; the best one is also kept."""
    timeout_minutes: PositiveFloat = 30
    """Minutes that a collective may wait before the job is ended."""
    heartbeat_seconds: Annotated[float, Field(ge=4), BeforeValidator(_number)] | None = 120
    """Seconds that a node may be unreachable while other ranks wait for it, before the job is ended; null:
    only timeout_minutes applies."""
    ema_decay: Annotated[float, Field(gt=0, lt=1), BeforeValidator(_number)] | None = None
    """Decay of an exponential moving average of the trainable weights, which validation and the artifact then
    use; null: no average."""
    max_skipped_steps: NaturalInt = 10
    """Optimizer steps that may be skipped because of a loss or gradient that is not finite, before the run
    ends."""

    @model_validator(mode="after")
    def _best_metric_is_made(self):
        if self.best_metric != "loss" and self.evaluate_every is None:
            raise ValueError(
                f"best_metric {self.best_metric} is computed by the evaluations in training; set evaluate_every, too"
            )
        return self


class LoggingConfig(Section):
    """What is logged, and where to."""

    every: PositiveInt = 10
    """Optimizer steps between lines on the screen and writes to metrics.jsonl."""
    tensorboard: bool = True
    """Whether to write TensorBoard files to the run folder."""
    wandb_project: str | None = None
    """Weights & Biases project to log to; null: none."""
    stall_seconds: PositiveFloat = 60.0
    """Seconds of waiting for data after which a rank logs the samples it waits for."""


class KindFactors(Section):
    """One factor for each kind of trainable parameter."""

    projector: NonNegativeFloat = 1.0
    """The projector."""
    lora_a: NonNegativeFloat = 1.0
    """LoRA's matrices A."""
    lora_b: NonNegativeFloat = 1.0
    """LoRA's matrices B; LoRA+ proposes 16 for the learning rate (arXiv:2402.12354)."""
    magnitude: NonNegativeFloat = 1.0
    """DoRA's magnitude vectors."""


class StageConfig(Section):
    """One stage of the schedule. Stages run in order."""

    name: Name
    """Name of the stage, its checkpoints and its artifact."""
    train: list[Literal["projector", "peft"]]
    """Parts to train: the projector, the adapter (peft), or both."""
    lr: PositiveFloat
    """Peak learning rate."""
    epochs: PositiveFloat | None = None
    """Length in epochs of split train. Set either epochs or steps."""
    steps: PositiveInt | None = None
    """Length in optimizer steps. Set either epochs or steps."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps in which the learning rate rises linearly from 0."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Learning-rate schedule after the warm-up. wsd: constant, then linear decay (arXiv:2404.06395)."""
    min_lr_ratio: Fraction = 0.0
    """Final learning rate of the decay, as a share of lr."""
    decay_ratio: Fraction = 0.1
    """Share of the steps in the decay of wsd."""
    lr_factors: KindFactors = KindFactors()
    """Factors of ``lr`` for each kind of parameter."""
    weight_decay_factors: KindFactors = KindFactors()
    """Factors of ``training.weight_decay`` for each kind of parameter."""
    data: StageData | None = None
    """Data and prompt of this stage, in place of the experiment's ``data``; null: the experiment's."""

    @model_validator(mode="after")
    def _trains_something_for_some_time(self):
        if not self.train:
            raise ValueError("train is empty: this stage trains nothing; list projector, peft or both")
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        return self


class Experiment(Section):
    """One experiment, fully resolved. A run folder records its ``model_dump()``."""

    name: Name
    """Name of the experiment in reports, and of its run folder (runs/NAME)."""
    owner: str | None = None
    """Person who runs it; ``vlmds sweep --owner`` selects by it."""
    priority: int | None = None
    """Order in ``vlmds sweep``: low numbers run first."""
    vision: VisionConfig
    """The frozen vision tower."""
    projector: ProjectorConfig
    """The module that turns patch features into visual tokens; its other keys depend on ``type``."""
    llm: LanguageConfig
    """The frozen language model."""
    peft: PeftSection
    """The adapter of the language model."""
    data: DataConfig = DataConfig()
    """The packed data, and how samples are read from it."""
    training: TrainingConfig = TrainingConfig()
    """Batches, optimizer, validation, checkpoints and limits."""
    logging: LoggingConfig = LoggingConfig()
    """What is logged, and where to."""
    stages: Annotated[list[StageConfig], Field(min_length=1)]
    """The schedule: one or more stages, in order. It replaces the list of the extended file."""

    @model_validator(mode="after")
    def _stage_names_differ(self):
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"two stages have the same name: {', '.join(names)}")
        return self

    def for_stage(self, name: str) -> Experiment:
        """This experiment with the stage's own path or blend, and prompt, in ``data``; the experiment itself
        if the stage has none."""
        own = next((stage.data for stage in self.stages if stage.name == name), None)
        if own is None:
            return self
        replaced: dict[str, Any] = {}
        if own.given:
            replaced |= {"path": own.path, "blend": own.blend}
        if own.prompt is not None:
            replaced["prompt"] = own.prompt
        return self.model_copy(update={"data": self.data.model_copy(update=replaced)})
