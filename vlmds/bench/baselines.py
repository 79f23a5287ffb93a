"""What vlmds is measured against: the same model, weights and samples, trained otherwise.

reference   the textbook form, as a straightforward implementation would have it: CLIP frame by
            frame, embeddings concatenated, an attention mask, logits at every position, the mean
            loss; PEFT and plain DeepSpeed.
hf          Hugging Face's Trainer on LlavaForConditionalGeneration and PEFT; projectors linear and
            mlp.

Both find their samples decoded and tokenised in memory, so they never wait for data.
"""

from __future__ import annotations

from itertools import islice

import torch
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from vlmds.bench.workload import Workload
from vlmds.config import Experiment
from vlmds.data.dataset import open_dataset
from vlmds.data.loader import SampleReader, TrainingPositions
from vlmds.data.prompt import SequenceBuilder
from vlmds.errors import InputError
from vlmds.models.artifact import load_artifact
from vlmds.models.assemble import Model, load_model
from vlmds.models.captioner import IGNORE, VISUAL
from vlmds.models.dora import Dora
from vlmds.training.activations import checkpoint_activations, checkpointed_layers
from vlmds.training.engine import build_engine
from vlmds.training.main import default_ds_config
from vlmds.training.optimizer import freeze

HF_PROJECTORS = ("linear", "mlp")


def check_baseline(name: str, experiment: Experiment) -> None:
    """Raise :class:`InputError` if this baseline cannot train the experiment."""
    if name == "hf" and experiment.projector.type not in HF_PROJECTORS:
        raise InputError(f"--baseline hf: LLaVA has no {experiment.projector.type} projector; take "
                         "an experiment with linear or mlp, or --baseline reference")
    if name == "hf" and experiment.vision.pool > 1:
        raise InputError("--baseline hf: LLaVA cannot pool patches; leave vision.pool at 1")


class Textbook(nn.Module):
    """CLIP, projector and language model in one module.

    Args:
        clip, projector, llm: as the captioner has them.
        feature_layer: see :class:`~vlmds.models.vision.VisionTower`.
    """

    def __init__(self, clip: nn.Module, projector: nn.Module, llm: nn.Module, feature_layer: int):
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
        return self.llm(inputs_embeds=embeds, attention_mask=mask, use_cache=False,
                        labels=torch.cat([nothing, labels], dim=1)).loss


def measure_reference(work: Workload, recorder, device: torch.device) -> dict:
    """Train the textbook form; called in a process of its own."""
    experiment, stage, clock = work.experiment, work.experiment.stages[work.stage], recorder.clock
    model = _prepared(work, device)
    textbook = Textbook(model.tower.clip, model.captioner.projector, model.captioner.llm,
                        experiment.vision.feature_layer)
    textbook.clip.forward = clock.timed("CLIP", textbook.clip.forward)
    batches = [_pieces(batch, device) for batch in _micro_batches(work, model)]
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
    """Arguments of :class:`Textbook`: the ids around the visual tokens."""
    ids, labels = batch["input_ids"], batch["labels"]
    places = (ids[0] == VISUAL).nonzero().flatten()
    first, end = int(places[0]), int(places[-1]) + 1
    return [tensor.to(device) for tensor in (
        batch["pixels"], ids[:, :first], ids[:, end:], labels[:, end:])]


def measure_hf(work: Workload, recorder, device: torch.device) -> dict:
    """Train LLaVA with the Trainer; called in a process of its own."""
    experiment, stage = work.experiment, work.experiment.stages[work.stage]
    training = experiment.training
    model = _prepared(work, device)
    image_token = model.captioner.llm.get_base_model().config.vocab_size - 1  # that no text has
    samples = [
        {"pixel_values": batch["pixels"][row],
         "input_ids": batch["input_ids"][row].masked_fill(
             batch["input_ids"][row] == VISUAL, image_token),
         "labels": batch["labels"][row]}
        for batch in _micro_batches(work, model) for row in range(len(batch["labels"]))]
    llava = build_llava(experiment, model, image_token)
    low = experiment.llm.dtype == "bfloat16"
    for parameter in llava.parameters():
        if parameter.requires_grad and low:  # as PEFT does: trainables in fp32 under autocast
            parameter.data = parameter.data.float()
    recording = _Recording(recorder)
    trainer = RecordingTrainer(
        model=llava, train_dataset=samples, data_collator=_collate, callbacks=[recording],
        args=TrainingArguments(
            output_dir=str(work.folder / "hf"), max_steps=work.total_steps, bf16=low,
            per_device_train_batch_size=training.micro_batch,
            gradient_accumulation_steps=training.gradient_accumulation,
            learning_rate=stage.lr, lr_scheduler_type="constant",
            adam_beta1=training.betas[0], adam_beta2=training.betas[1],
            weight_decay=training.weight_decay, max_grad_norm=training.max_grad_norm,
            train_sampling_strategy="sequential", remove_unused_columns=False,
            use_cpu=device.type == "cpu", disable_tqdm=True, report_to="none",
            save_strategy="no", logging_strategy="no"))
    trainer.recording = recording
    trainer.train()
    return {}


def build_llava(experiment: Experiment, model: Model, image_token: int) -> nn.Module:
    """LLaVA around the weights of `model`, whose language model carries PEFT's adapter already."""
    llm, projector = model.captioner.llm.get_base_model(), model.captioner.projector
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(LlavaConfig(
            vision_config=model.tower.clip.config, text_config=llm.config,
            image_token_index=image_token, projector_hidden_act="gelu",
            vision_feature_select_strategy="default",
            vision_feature_layer=experiment.vision.feature_layer))
    llava.model.vision_tower, llava.model.language_model = model.tower.clip, llm.model
    llava.lm_head = llm.lm_head
    if experiment.projector.type == "linear":
        llava.model.multi_modal_projector = projector.net
    else:
        theirs = llava.model.multi_modal_projector
        theirs.linear_1, theirs.linear_2 = projector.net[0], projector.net[2]
    return llava


class RecordingTrainer(Trainer):
    """Tells the callback the losses of a step's micro-batches, each a share of the step's mean."""

    recording: "_Recording"

    def training_step(self, *arguments, **keywords):
        loss = super().training_step(*arguments, **keywords)
        self.recording.losses.append(loss)
        return loss


class _Recording(TrainerCallback):
    def __init__(self, recorder):
        self.recorder, self.losses = recorder, []

    def on_train_begin(self, *_, **__):
        self.recorder.start()

    def on_step_end(self, args, state, control, **_):
        loss, self.losses = sum(self.losses), []
        self.recorder.step(state.global_step - 1, loss=loss)


def _collate(samples: list[dict]) -> dict[str, Tensor]:
    ids = torch.stack([sample["input_ids"] for sample in samples])
    return {"pixel_values": torch.cat([sample["pixel_values"] for sample in samples]),
            "input_ids": ids, "attention_mask": torch.ones_like(ids),
            "labels": torch.stack([sample["labels"] for sample in samples])}


def _prepared(work: Workload, device: torch.device) -> Model:
    """The stage's weights, frozen as it says."""
    experiment = work.experiment
    model = load_model(experiment, device)
    load_artifact(work.artifact, model.captioner)
    for module in model.captioner.llm.modules():  # DoRA as PEFT has it
        for adapter, variant in getattr(module, "lora_variant", {}).items():
            if isinstance(variant, Dora):
                module.lora_variant[adapter] = DoraLinearVariant()
    freeze(model.captioner, experiment.stages[work.stage])
    checkpoint_activations(model.captioner, checkpointed_layers(
        experiment, experiment.stages[work.stage], False, device))
    model.captioner.train()
    return model


def _micro_batches(work: Workload, model: Model) -> list[dict[str, Tensor]]:
    """All micro-batches of the stage on one rank, as the stage itself reads them, with normalised
    pixels [B, F, 3, S, S] on the host."""
    experiment = work.experiment
    data, training = experiment.data, experiment.training
    reader = SampleReader(
        open_dataset(data), "train", data.num_frames, model.image_size,
        seed=training.seed + (work.stage << 32), window=data.shuffle_window)
    positions = TrainingPositions(
        0, work.total_steps, training.gradient_accumulation, 0,
        global_batch=work.run(1).global_batch, micro_batch=training.micro_batch, world_size=1)
    builder = SequenceBuilder(model.tokenizer, data.prompt, model.captioner.projector.num_tokens,
                              data.max_caption_tokens)
    mean, std = model.tower.mean.cpu(), model.tower.std.cpu()
    batches = []
    for number in range(len(positions)):
        samples = [reader.load(position) for position in positions[number]]
        frames = torch.stack([torch.from_numpy(sample.frames) for sample in samples])
        batches.append({
            **builder.collate_training([builder.training(s.caption, s.prompt) for s in samples]),
            "pixels": ((frames.float() / 255 - mean) / std).to(model.tower.clip.dtype)})
    return batches
