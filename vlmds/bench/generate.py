"""`vlmds bench generate`: captions a second, batched against one video at a time.

The models are the experiment's, or with `--tiny` small random ones with the full vocabulary. The
projector and the adapter are fresh, because their weights change neither shapes nor the work. Frames
are random and in memory; `vlmds bench data` measures decoding. All captions have the same number of
tokens: no earlier end of turn is allowed. The ways of generating run in turns; the least time of
each counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPVisionModel, Qwen3ForCausalLM
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vlmds.bench.measure import in_turns, save, table
from vlmds.bench.workload import TINY_LLM, TINY_VISION, tiny_settings
from vlmds.demo.pretrain import train_tokenizer
from vlmds.experiments.reading import load_experiment
from vlmds.experiments.schema import Experiment
from vlmds.inference.generation import GenerationOptions, generation_config
from vlmds.inference.video_captioner import VideoCaptioner
from vlmds.models.assemble import Model, experiment_projector, load_model
from vlmds.models.captioner import Captioner
from vlmds.models.language import add_adapter
from vlmds.models.vision import VisionTower

NAIVE, BASELINE = "one by one, no KV cache", "one by one"


def bench_generate(
    output: Path,
    exp: str = "e7",
    *,
    tiny: bool = False,
    tokens: int = 48,
    batches: Sequence[int] = (4, 16),
    repeats: int = 3,
    overrides: Sequence[str] = (),
) -> dict[str, dict[str, float]]:
    """Run it, print the table, and write generate.json to `output`.

    Args:
        tokens: of each caption. batches: batch sizes to try; the largest is the number of videos.

    Returns:
        For each way: captions and tokens a second, their ratio to one by one, the shares of CLIP,
        prefill (prompt, visual tokens and the first token) and decoding in the time, and the share
        of captions with the same tokens as one by one, which in bfloat16 may be below 1.
    """
    captioner = (_tiny if tiny else _real)(exp, overrides)
    side, count = captioner.model.image_size, captioner.experiment.data.num_frames
    videos = max(batches)
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (videos, count, 3, side, side), np.uint8))
    jobs, captions = _jobs(captioner, frames, tokens, batches)
    for job in jobs.values():  # the first call chooses kernels and allocates memory
        job()
    seconds = in_turns(jobs, repeats)
    ways = list(captions)
    speeds = {way: _count(way, videos) / seconds[way, "all"] for way in ways}
    result = {}
    for way in ways:
        whole = seconds[way, "all"]
        vision, first = seconds[way, "vision"], seconds[way, "first token"]
        result[way] = {
            "captions_per_s": speeds[way],
            "tokens_per_s": tokens * speeds[way],
            "ratio": speeds[way] / speeds[BASELINE],
            "vision": vision / whole,
            "prefill": (first - vision) / whole,
            "decode": (whole - first) / whole,
            "same_captions": float(np.mean([a == b for a, b in zip(captions[way], captions[BASELINE])])),
        }
    _show(captioner, result, tokens, videos)
    print(
        save(
            output,
            "generate",
            {
                "exp": exp,
                "tiny": tiny,
                "tokens": tokens,
                "videos": videos,
                "frames": count,
                "device": _device_name(captioner.device),
                "ways": result,
            },
        )
    )
    return result


def _jobs(
    captioner: VideoCaptioner, frames: torch.Tensor, tokens: int, batches: Sequence[int]
) -> tuple[dict[tuple[str, str], Callable[[], None]], dict[str, list[str]]]:
    """({(way, part of the work): job}, {way: the captions of its last run})."""
    jobs: dict[tuple[str, str], Callable[[], None]] = {}
    captions: dict[str, list[str]] = {}

    def add(way: str, size: int, cached: bool) -> None:
        part = frames[: _count(way, len(frames))]
        captions[way] = []

        def vision() -> None:
            for batch in part.split(size):
                captioner.model.features({"frames": batch})
            _wait(captioner.device)

        def write(length: int) -> None:
            captions[way].clear()
            for batch in part.split(size):
                captions[way].extend(_write(captioner, batch, length, cached))
            _wait(captioner.device)

        jobs[way, "vision"] = vision
        jobs[way, "first token"] = lambda: write(1)
        jobs[way, "all"] = lambda: write(tokens)

    add(NAIVE, 1, cached=False)
    add(BASELINE, 1, cached=True)
    for size in batches:
        add(f"batches of {size}", size, cached=True)
    return jobs, captions


def _count(way: str, videos: int) -> int:
    """Number of videos: a few one by one, where each takes the same time."""
    return min({NAIVE: 2, BASELINE: 4}.get(way, videos), videos)


@torch.no_grad()
def _write(captioner: VideoCaptioner, frames: torch.Tensor, tokens: int, cached: bool) -> list[str]:
    """Captions of exactly ``tokens`` tokens, as text of their ids."""
    builder, model = captioner.builder, captioner.model.captioner
    prompts = builder.collate_generation([None] * len(frames))
    features = captioner.model.features({"frames": frames})
    assert isinstance(features, torch.Tensor)
    prompt = prompts["input_ids"]
    if cached:
        config = generation_config(GenerationOptions(max_new_tokens=tokens), builder.eos_token_id, builder.pad_token_id)
        config.min_new_tokens = tokens
        mask = prompts["attention_mask"].to(captioner.device)
        ids = model.generate(features, prompt, mask, config)
    else:
        ids = _write_naively(captioner, features, prompt, tokens)
    return [str(row) for row in ids.tolist()]  # ids: different ids may have the same text


def _write_naively(
    captioner: VideoCaptioner, features: torch.Tensor, prompt: torch.Tensor, tokens: int
) -> torch.Tensor:
    """A straightforward loop: the whole sequence again for each token. int64 [B, tokens]"""
    model = captioner.model.captioner
    embeds, ids = model.embed(features, prompt), []
    for _ in range(tokens):
        logits = model.llm(inputs_embeds=embeds, use_cache=False, logits_to_keep=1).logits[:, -1]
        logits[:, captioner.builder.eos_token_id] = float("-inf")
        ids.append(logits.argmax(-1, keepdim=True))
        embeds = torch.cat([embeds, model.llm.get_input_embeddings()(ids[-1])], dim=1)
    return torch.cat(ids, dim=1)


def _real(exp: str, overrides: Sequence[str]) -> VideoCaptioner:
    experiment = load_experiment(exp, list(overrides))
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    return _with_adapter(experiment, load_model(experiment, device), device)


def _tiny(exp: str, overrides: Sequence[str]) -> VideoCaptioner:
    experiment = load_experiment(exp, [*tiny_settings(exp), *overrides])
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    clip: Any = CLIPVisionModel(TINY_VISION)
    tower = VisionTower(
        clip.to(device), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, experiment.vision.feature_layer, pool=experiment.vision.pool
    )
    llm: Any = Qwen3ForCausalLM(TINY_LLM)
    with torch.no_grad():  # else all captions of random weights are alike
        llm.get_input_embeddings().weight.mul_(20)
    captioner = Captioner(experiment_projector(experiment, TINY_VISION, TINY_LLM), llm).to(device)
    tokenizer = train_tokenizer([experiment.data.prompt], vocab_size=600)
    return _with_adapter(experiment, Model(tower, captioner, tokenizer, tower.image_size), device)


def _with_adapter(experiment: Experiment, model: Model, device: torch.device) -> VideoCaptioner:
    llm: Any = add_adapter(model.captioner.llm.requires_grad_(False), experiment.peft)
    model.captioner.llm = llm
    model.captioner.to(device)
    return VideoCaptioner(experiment, model, device)


def _show(captioner: VideoCaptioner, result: dict, tokens: int, videos: int) -> None:
    projector = captioner.model.captioner.projector
    print(
        f"{captioner.experiment.name}: {videos} videos, {projector.num_tokens:,} visual tokens, "
        f"captions of {tokens} tokens, on {_device_name(captioner.device)}"
    )
    print(
        table(
            [
                {
                    "": way,
                    "captions/s": f"{r['ratio']:.3g} x",
                    "measured, captions/s": f"{r['captions_per_s']:.3g}",
                    "tokens/s": f"{r['tokens_per_s']:.3g}",
                    "CLIP": f"{r['vision']:.0%}",
                    "prefill": f"{r['prefill']:.0%}",
                    "decoding": f"{r['decode']:.0%}",
                    "same captions": f"{r['same_captions']:.0%}",
                }
                for way, r in result.items()
            ]
        )
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
