"""Tiny CLIP and Qwen3 folders for the demo, with a little real pre-training.

The demo freezes both, as a real run does, so both need knowledge first, as the large ones have.
CLIP learns from drawn frames: contrastive image-text loss, plus an auxiliary head that names
colour, shape and place for every patch. The real CLIP's patches know these after 400M pictures; one
minute on a CPU needs direct supervision. The head is not saved.
The language model learns the demo's sentences and the chat format (`observations.py`).
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vlmds.demo import clips, observations
from vlmds.files import usual_modes

VERSION = 2
"""Part of the settings' hash: a higher number discards saved models."""

SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
SPLIT = (  # Qwen's pre-tokenizer pattern
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""

PATCH = 16
VISION = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4)
TEXT = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
LLM: dict[str, Any] = dict(
    hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=48, tie_word_embeddings=True, max_position_embeddings=4096,
)  # fmt: skip


@dataclass(frozen=True)
class TinyModels:
    """Model folders for `from_pretrained`."""

    vision: Path
    llm: Path


@dataclass(frozen=True)
class Subject:
    """What the tiny models learn.

    sentences: texts for the tokenizer's training. draw: (count, image_size, seed) -> frames with `pixels` and
    `texts` as :class:`Frames` has. head: (width) -> a module with `loss(patches, frames, rows)` as
    :class:`PatchHead` has. lessons: of the language model.
    """

    name: str
    sentences: Callable[[], list[str]]
    draw: Callable[[int, int, int], Any]
    head: Callable[[int], Any]
    lessons: type[observations.Lessons]


def make_tiny_models(
    out: Path,
    *,
    texts: Sequence[str] = (),
    seed: int = 0,
    tokenizer: Path | None = None,
    image_size: int = 64,
    clip_steps: int = 700,
    llm_steps: int = 400,
    subject: Subject | None = None,
) -> TinyModels:
    """Make, or reuse, `out`/clip and `out`/qwen3; the report goes to `out`/pretraining.json.

    Args:
        texts: sentences that the tokenizer and the language model learn besides the demo's own.
        tokenizer: a tokenizer folder for the language model; None trains a small one.
        image_size: CLIP's input side in pixels, a multiple of 16.
        clip_steps, llm_steps: optimizer steps of the two pre-trainings.
        subject: default: the demo's.
    """
    out, subject = Path(out), subject or DEMO
    made = TinyModels(vision=out / "clip", llm=out / "qwen3")
    settings = dict(
        version=VERSION, seed=seed, image_size=image_size, clip_steps=clip_steps,
        llm_steps=llm_steps, texts=list(texts), tokenizer=_digest(tokenizer),
        vision=VISION, text=TEXT, llm=LLM,
    )  # fmt: skip
    if subject is not DEMO:
        settings["subject"] = subject.name
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    report_path = out / "pretraining.json"
    if report_path.is_file() and json.loads(report_path.read_text())["settings_sha256"] == key:
        return made
    report_path.unlink(missing_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        small = train_tokenizer(texts, sentences=subject.sentences())
        clip_report = pretrain_clip(made.vision, small, image_size, clip_steps, seed, subject)
        chosen = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else small
        llm_report = pretrain_llm(made.llm, chosen, subject.lessons(chosen, texts, seed), llm_steps)
    report = {"settings_sha256": key, "clip": clip_report, "llm": llm_report}
    report_path.write_text(json.dumps(report, indent=2) + "\n")
    return made


def _digest(folder: Path | None) -> str | None:
    if folder is None:
        return None
    return hashlib.sha256((Path(folder) / "tokenizer.json").read_bytes()).hexdigest()


def train_tokenizer(
    texts: Sequence[str], vocab_size: int = 1000, sentences: Sequence[str] | None = None
) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with Qwen's special tokens and a chat template like Qwen3's.

    Args:
        texts: it learns from, besides the sentences (default: the demo's).
    """
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    known = observations.all_sentences() if sentences is None else sentences
    tokenizer.train_from_iterator([*known, *texts], trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL_TOKENS[1:],
        chat_template=CHAT_TEMPLATE,
    )


def _optimise(step_loss, parameters, steps: int, lr: float) -> dict:
    """Minimise `step_loss(step) -> scalar loss` by AdamW with warm-up and cosine decay. Returns a report."""
    started = time.perf_counter()
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=max(steps, 2), pct_start=0.1)
    losses = []
    for step in range(steps):
        loss = step_loss(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    window = max(1, min(20, steps // 4))
    return {
        "steps": steps,
        "seconds": round(time.perf_counter() - started, 1),
        "first_loss": round(float(np.mean(losses[:window])), 4),
        "last_loss": round(float(np.mean(losses[-window:])), 4),
    }


# --- CLIP --------------------------------------------------------------------------------------


@dataclass
class Frames:
    """Drawn frames and their content; g is the number of patches along a side.

    pixels uint8 [n, 3, side, side]; colour, shape int64 [n]; covered bool [n, g·g]: the shape lies
    on the patch; centre float32 [n, 2]: the shape's middle, 0…1; texts: one description a frame.
    """

    pixels: torch.Tensor
    colour: torch.Tensor
    shape: torch.Tensor
    covered: torch.Tensor
    centre: torch.Tensor
    texts: list[str]


def draw_frames(count: int, image_size: int, seed: int) -> Frames:
    """Frames of random scenes at random moments, all 36 colours × shapes equally likely; half of them
    with JPEG's colour subsampling and block noise, as decoded video has."""
    rng = np.random.default_rng([seed, 1])
    colours, shapes, directions = (list(t) for t in (clips.COLOURS, clips.SHAPES, clips.DIRECTIONS))
    grid = image_size // PATCH
    pixels, colour, shape, covered, centre, texts = [], [], [], [], [], []
    for _ in range(count):
        c, s, d = (int(rng.integers(len(names))) for names in (colours, shapes, directions))
        scene = clips.sample_scene(clips.Attributes(colours[c], shapes[s], directions[d]), rng)
        mask = clips.shape_mask(shapes[s], scene.shape_size, scene.angle)
        frame, (x, y) = clips.draw_frame(scene, mask, float(rng.random()), rng)
        image: Image.Image = Image.fromarray(frame)
        if rng.random() < 0.5:
            buffer = BytesIO()
            image.save(buffer, "JPEG", quality=int(rng.integers(70, 95)))
            image = Image.open(buffer)
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
        pixels.append(np.asarray(image).transpose(2, 0, 1))
        canvas = np.zeros((scene.side, scene.side), np.float32)
        canvas[y : y + scene.shape_size, x : x + scene.shape_size] = mask
        on_patch = np.asarray(Image.fromarray(canvas).resize((grid, grid), Image.Resampling.BOX))
        covered.append(on_patch.reshape(-1) > 0.08)
        middle = (np.array([x, y]) + scene.shape_size / 2) / scene.side
        centre.append(middle)
        colour.append(c)
        shape.append(s)
        texts.append(observations.describe_place(colours[c], shapes[s], *middle))
    return Frames(
        torch.from_numpy(np.stack(pixels)), torch.tensor(colour), torch.tensor(shape),
        torch.from_numpy(np.stack(covered)), torch.tensor(np.stack(centre), dtype=torch.float32),
        texts,
    )  # fmt: skip


class PatchHead(nn.Module):
    """A linear head on every patch token: the frame's colour, shape and place, and whether the shape
    is on this patch; training only."""

    def __init__(self, width: int):
        super().__init__()
        self.sizes = (len(clips.COLOURS), len(clips.SHAPES), 2, 1)
        self.linear = nn.Linear(width, sum(self.sizes))

    def loss(self, patches: torch.Tensor, frames: Frames, rows: torch.Tensor) -> torch.Tensor:
        """patches [B, g·g, width], exactly what a projector will get; rows int64 [B]."""
        colour, shape, centre, covered = self.linear(patches).split(self.sizes, dim=-1)
        total = 5 * F.smooth_l1_loss(centre, frames.centre[rows][:, None].expand_as(centre), beta=0.05)
        total = total + F.binary_cross_entropy_with_logits(covered[..., 0], frames.covered[rows].float())
        for logits, truth in ((colour, frames.colour), (shape, frames.shape)):
            label = truth[rows][:, None].expand(logits.shape[:2])
            total = total + F.cross_entropy(logits.flatten(0, 1), label.flatten())
        return total


def pretrain_clip(
    out: Path, tokenizer: PreTrainedTokenizerBase, image_size: int, steps: int, seed: int, subject: Subject
) -> dict:
    """Train and save a CLIPModel with its image processor; returns the report."""
    eos = tokenizer.eos_token_id
    config = CLIPConfig(
        vision_config=dict(VISION, image_size=image_size, patch_size=PATCH, projection_dim=64),
        text_config=dict(
            TEXT, vocab_size=len(tokenizer), max_position_embeddings=32, projection_dim=64,
            bos_token_id=None, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id,
        ),
        projection_dim=64,
    )  # fmt: skip
    model = CLIPModel(config).train()
    head = subject.head(VISION["hidden_size"])
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    started = time.perf_counter()
    frames = subject.draw(max(64, min(9000, steps * 16)), image_size, seed)
    drawn = time.perf_counter() - started
    names = sorted(set(frames.texts))
    text_of = torch.tensor([names.index(text) for text in frames.texts])
    encoded = tokenizer([n + tokenizer.eos_token for n in names], padding=True, return_tensors="pt")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    pick = torch.Generator().manual_seed(seed)

    def step_loss(step: int) -> torch.Tensor:
        rows = torch.randint(len(frames.texts), (96,), generator=pick)
        pixels = (frames.pixels[rows] / 255 - mean) / std
        vision = model.vision_model(pixel_values=pixels)
        shown, which = text_of[rows].unique(return_inverse=True)  # one text may fit many frames
        text = model.text_model(encoded.input_ids[shown], encoded.attention_mask[shown])
        image_out = F.normalize(model.visual_projection(vision.pooler_output), dim=-1)
        text_out = F.normalize(model.text_projection(text.pooler_output), dim=-1)
        logits = model.logit_scale.exp() * image_out @ text_out.T
        matches = F.one_hot(which, len(shown)).float()
        contrast = F.cross_entropy(logits, which) + F.cross_entropy(logits.T, matches.T / matches.sum(0)[:, None])
        patches = vision.last_hidden_state[:, 1:]  # before the final LayerNorm, CLS dropped
        return contrast / 4 + head.loss(patches, frames, rows)

    parameters = [*model.parameters(), *head.parameters()]
    report = _optimise(step_loss, parameters, steps, lr=2e-3)
    report["drawing_seconds"] = round(drawn, 1)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    tokenizer.save_pretrained(out)
    usual_modes(out)
    return report


# --- the language model --------------------------------------------------------------------------


def pretrain_llm(out: Path, tokenizer: PreTrainedTokenizerBase, lessons: observations.Lessons, steps: int) -> dict:
    """Train and save a Qwen3ForCausalLM with its tokenizer; returns the report."""
    model = Qwen3ForCausalLM(
        Qwen3Config(
            **LLM, vocab_size=len(tokenizer), rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    ).train()  # fmt: skip
    embedding = model.get_input_embeddings()

    def step_loss(step: int) -> torch.Tensor:
        ease = max(0.0, 1 - 2 * step / steps)
        batch = lessons.draw(2400, ease)
        embeds = batch.embed(embedding, ease)
        keep = batch.labels != -100
        logits = model(inputs_embeds=embeds, use_cache=False, logits_to_keep=keep).logits
        losses = F.cross_entropy(logits.flatten(0, -2), batch.labels[keep], reduction="none")
        # Separate means: there are many more observations than words of answers.
        observed = batch.noisy[keep]
        return losses[~observed].mean() + losses[observed].mean() / 4

    report = _optimise(step_loss, list(model.parameters()), steps, lr=2e-3)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    usual_modes(out)
    return report


DEMO = Subject("demo", observations.all_sentences, draw_frames, PatchHead, observations.Lessons)
"""Of `vlmds demo`."""
