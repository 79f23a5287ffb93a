"""Baselines of `vlmds bench train`: the same model, weights and samples, trained in other ways.

reference   a straightforward implementation: CLIP frame by frame, embeddings concatenated, an
            attention mask, logits at every position, the mean loss; PEFT and plain DeepSpeed.
hf          Hugging Face's Trainer on LlavaForConditionalGeneration and PEFT; projectors linear and
            mlp. In :mod:`vlmds.bench.baseline_hf`, for its imports.

Their samples are decoded and tokenised in memory: they never wait for data.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmds.bench.workload import Workload
from vlmds.data.dataset import open_dataset
from vlmds.data.loader import SampleReader, TrainingPositions
from vlmds.errors import InputError
from vlmds.experiments.schema import Experiment
from vlmds.models.artifact import load_artifact
from vlmds.models.assemble import Model, load_model
from vlmds.models.captioner import IGNORE, VISUAL
from vlmds.models.dora import Dora
from vlmds.models.sequences import SequenceBuilder
from vlmds.models.trainable import freeze
from vlmds.training.activations import checkpoint_activations, checkpointed_layers
from vlmds.training.ds_config import default_ds_config
from vlmds.training.engine import build_engine

HF_PROJECTORS = ("linear", "mlp")


def check_baseline(name: str, experiment: Experiment) -> None:
    """Raise :class:`InputError` if this baseline cannot train the experiment."""
    if name == "hf" and experiment.projector.type not in HF_PROJECTORS:
        raise InputError(
            f"--baseline hf: LLaVA has no {experiment.projector.type} projector; take "
            "an experiment with linear or mlp, or --baseline reference"
        )
    if name == "hf" and experiment.vision.pool > 1:
        raise InputError("--baseline hf: LLaVA cannot pool patches; leave vision.pool at 1")


class Textbook(nn.Module):
    """CLIP, projector and language model in one module: the baseline "reference".

    Args:
        clip, projector, llm: as the captioner has them.
        feature_layer: see :class:`~vlmds.models.vision.VisionTower`.
    """

    def __init__(self, clip: nn.Module, projector: nn.Module, llm: PreTrainedModel, feature_layer: int):
        super().__init__()
        self.clip, self.projector, self.llm = clip, projector, llm
        self.feature_layer = feature_layer

    def forward(self, pixels: Tensor, before: Tensor, after: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy, 0-d.

        Args:
            pixels: normalised [B, F, 3, S, S].
            before, after: token ids around the visual tokens, int64 [B, L1] and [B, L2].
            labels: int64 [B, L2], IGNORE where there is no loss.
        """
        frames = []
        with torch.no_grad():
            for number in range(pixels.shape[1]):
                hidden = self.clip(pixels[:, number], output_hidden_states=True).hidden_states
                frames.append(hidden[self.feature_layer][:, 1:])
        visual = self.projector(torch.cat(frames, dim=1))
        embed = self.llm.get_input_embeddings()
        embeds = torch.cat([embed(before), visual, embed(after)], dim=1)
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
        nothing = labels.new_full((len(labels), embeds.shape[1] - labels.shape[1]), IGNORE)
        return self.llm(
            inputs_embeds=embeds, attention_mask=mask, use_cache=False, labels=torch.cat([nothing, labels], dim=1)
        ).loss


def measure_reference(work: Workload, recorder, device: torch.device) -> dict:
    """Train the baseline "reference", in a process of its own."""
    experiment, stage, clock = work.experiment, work.experiment.stages[work.stage], recorder.clock
    model = prepared(work, device)
    assert model.tower is not None
    textbook = Textbook(
        model.tower.clip, model.captioner.projector, model.captioner.llm, experiment.vision.feature_layer
    )
    textbook.clip.forward = clock.timed("CLIP", textbook.clip.forward)
    batches = [_pieces(batch, device) for batch in micro_batches(work, model)]
    accumulation = experiment.training.gradient_accumulation
    engine = build_engine(textbook, experiment, stage, default_ds_config(), accumulation)
    textbook.clip.eval()
    reading = iter(batches)
    recorder.start()
    for step in range(work.total_steps):
        losses = []
        for batch in islice(reading, accumulation):
            with clock.phase("forward"):
                loss = engine(*batch)
            with clock.phase("backward"):
                engine.backward(loss)
            with clock.phase("optimizer"):
                engine.step()
            losses.append(loss.detach())
        recorder.step(step, loss=torch.stack(losses).mean())
    return {}


def _pieces(batch: dict[str, Tensor], device: torch.device) -> list[Tensor]:
    """Arguments of :class:`Textbook`: the pixels, the ids around the visual tokens, the labels."""
    ids, labels = batch["input_ids"], batch["labels"]
    places = (ids[0] == VISUAL).nonzero().flatten()
    first, end = int(places[0]), int(places[-1]) + 1
    return [tensor.to(device) for tensor in (batch["pixels"], ids[:, :first], ids[:, end:], labels[:, end:])]


def prepared(work: Workload, device: torch.device) -> Model:
    """The model with the stage's weights, frozen as in the stage."""
    experiment = work.experiment
    model = load_model(experiment, device)
    load_artifact(work.artifact, model.captioner)
    for module in model.captioner.llm.modules():  # PEFT's own DoRA
        variants: Any = getattr(module, "lora_variant", {})
        for adapter, variant in variants.items():
            if isinstance(variant, Dora):
                variants[adapter] = DoraLinearVariant()
    freeze(model.captioner, experiment.stages[work.stage])
    checkpoint_activations(
        model.captioner, checkpointed_layers(experiment, experiment.stages[work.stage], False, device)
    )
    model.captioner.train()
    return model


def micro_batches(work: Workload, model: Model) -> list[dict[str, Tensor]]:
    """All micro-batches of the stage on one rank, in the stage's order, with normalised pixels
    [B, F, 3, S, S] on the host."""
    experiment = work.experiment
    data, training = experiment.data, experiment.training
    reader = SampleReader(
        open_dataset(data),
        "train",
        data.num_frames,
        model.image_size,
        seed=training.seed + (work.stage << 32),
        window=data.shuffle_window,
        fit=data.fit,
    )
    positions = TrainingPositions(
        0,
        work.total_steps,
        training.gradient_accumulation,
        0,
        global_batch=work.run(1).global_batch,
        micro_batch=training.micro_batch,
        world_size=1,
    )
    builder = SequenceBuilder(
        model.tokenizer, data.prompt, model.captioner.projector.num_tokens, data.max_caption_tokens
    )
    tower: Any = model.tower  # always loaded here
    mean, std = tower.mean.cpu(), tower.std.cpu()
    batches = []
    for number in range(len(positions)):
        samples = [reader.load(position) for position in positions[number]]
        frames = torch.stack([torch.from_numpy(sample.frames) for sample in samples])
        batches.append(
            {
                **builder.collate_training([builder.training(s.caption, s.prompt) for s in samples]),
                "pixels": ((frames.float() / 255 - mean) / std).to(tower.clip.dtype),
            }
        )
    return batches
