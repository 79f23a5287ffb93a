"""The baseline "hf" of `vlmds bench train`: Hugging Face's Trainer on LLaVA and PEFT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

from vlmds.bench.baselines import micro_batches, prepared
from vlmds.bench.workload import Workload
from vlmds.experiments.schema import Experiment
from vlmds.models.assemble import Model
from vlmds.models.captioner import VISUAL


def measure_hf(work: Workload, recorder, device: torch.device) -> dict:
    """Train LLaVA with the Trainer, in a process of its own."""
    experiment, stage = work.experiment, work.experiment.stages[work.stage]
    training = experiment.training
    model = prepared(work, device)
    image_token = model.captioner.llm.config.vocab_size - 1  # in no text
    samples = [
        {
            "pixel_values": batch["pixels"][row],
            "input_ids": batch["input_ids"][row].masked_fill(batch["input_ids"][row] == VISUAL, image_token),
            "labels": batch["labels"][row],
        }
        for batch in micro_batches(work, model)
        for row in range(len(batch["labels"]))
    ]
    llava = build_llava(experiment, model, image_token)
    low = experiment.llm.dtype == "bfloat16"
    for parameter in llava.parameters():
        if parameter.requires_grad and low:  # PEFT's default: trainables in fp32 under autocast
            parameter.data = parameter.data.float()
    recording = _Recording(recorder)
    trainer = RecordingTrainer(
        model=llava,
        train_dataset=samples,
        data_collator=_collate,
        callbacks=[recording],
        args=TrainingArguments(
            output_dir=str(work.folder / "hf"),
            max_steps=work.total_steps,
            bf16=low,
            per_device_train_batch_size=training.micro_batch,
            gradient_accumulation_steps=training.gradient_accumulation,
            learning_rate=stage.lr,
            lr_scheduler_type="constant",
            adam_beta1=training.betas[0],
            adam_beta2=training.betas[1],
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            use_cpu=device.type == "cpu",
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
        ),
    )
    trainer.recording = recording
    trainer.train()
    return {}


def build_llava(experiment: Experiment, model: Model, image_token: int) -> nn.Module:
    """LLaVA around the weights of `model`, whose language model already has its adapter."""
    llm = model.captioner.llm
    projector: Any = model.captioner.projector  # Linear or MLP
    assert model.tower is not None
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=model.tower.clip.config,
                text_config=llm.config,
                image_token_index=image_token,
                projector_hidden_act="gelu",
                vision_feature_select_strategy="default",
                vision_feature_layer=experiment.vision.feature_layer,
            )
        )
    llava.model.vision_tower, llava.model.language_model = model.tower.clip, llm.get_decoder()
    llava.lm_head = llm.get_output_embeddings()
    if experiment.projector.type == "linear":
        llava.model.multi_modal_projector = projector.net
    else:
        theirs = llava.model.multi_modal_projector
        theirs.linear_1, theirs.linear_2 = projector.net[0], projector.net[2]
    return llava


class RecordingTrainer(Trainer):
    """A Trainer that records the losses of a step's micro-batches, each a share of the step's mean."""

    recording: _Recording

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
    return {
        "pixel_values": torch.cat([sample["pixel_values"] for sample in samples]),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.stack([sample["labels"] for sample in samples]),
    }
