"""LLaVA folders: `--format hf-llava` of the linear and the MLP projector without pooling.

Plain transformers loads such a folder as ``LlavaForConditionalGeneration``. The frames of a clip
are the images of one user message. LLaVA puts each image's patch tokens where its placeholder
stands, so a clip's tokens are contiguous, frame by frame, as in vlmds.

vLLM loads it too. From its source: ``model_executor/models/llava.py`` takes any ``text_config``
that it has a model for, Qwen3 included, several images per prompt (``limit_mm_per_prompt``),
feature layers -1 and -2 without the last LayerNorm, strategy "default".
``model_executor/layers/activation.py`` has gelu and relu but not linear: see
:func:`linear_as_mlp`. ``lora/peft_helper.py`` refuses a DoRA adapter ("vLLM does not yet support
DoRA"; a pull request, vllm-project/vllm#47395, is open): the adapter is folded in.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaProcessor

from vlmds.experiments.schema import Experiment
from vlmds.export.processor import check_sequence, exported_tokenizer, image_processor
from vlmds.export.weights import named, nameless, write_model
from vlmds.models.assemble import Model
from vlmds.models.projectors import MLP, Linear, Projector
from vlmds.models.sequences import SequenceBuilder


def fits_llava(model: Model) -> bool:
    """Whether LLaVA's architecture can express the model."""
    tower = model.tower
    return isinstance(model.captioner.projector, (Linear, MLP)) and tower is not None and tower.pool == 1


def write_llava(folder: Path, model: Model, experiment: Experiment, builder: SequenceBuilder) -> str:
    """Write model (adapter folded in, projector linear or MLP) and processor into ``folder``;
    returns the activation of LLaVA's projector.

    Raises:
        InputError: see :mod:`vlmds.export.processor`.
    """
    tower, llm, projector = model.tower, model.captioner.llm, model.captioner.projector
    assert tower is not None  # None only where features are stored
    tokenizer, token = exported_tokenizer(model.tokenizer, llm, experiment.llm.model)
    act, first, second = projector_as_llava(projector)
    config = LlavaConfig(
        vision_config=nameless(tower.clip.config),
        text_config=nameless(llm.config),
        image_token_index=tokenizer.get_vocab()[token],
        image_seq_length=tower.patches,
        projector_hidden_act=act,
        vision_feature_select_strategy="default",
        vision_feature_layer=tower.feature_layer,
        tie_word_embeddings=llm.config.tie_word_embeddings,
        dtype=llm.dtype,
        architectures=["LlavaForConditionalGeneration"],
    )
    # The names that the hub's LLaVA checkpoints have; vLLM reads no others.
    weights = named("vision_tower.vision_model", tower.clip) | named("language_model", llm)
    weights |= named("multi_modal_projector.linear_1", first)
    weights |= named("multi_modal_projector.linear_2", second)
    write_model(folder, config, weights, builder)
    processor = LlavaProcessor(
        image_processor(tower, experiment.data.fit),
        tokenizer,
        patch_size=tower.clip.config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token
        image_token=token,
        chat_template=tokenizer.chat_template,
    )
    check_sequence(processor, builder, projector, tower.image_size)
    processor.save_pretrained(folder)
    return act


def projector_as_llava(projector: Projector) -> tuple[str, nn.Linear, nn.Linear]:
    """(activation, linear_1, linear_2) of LLaVA's projector that compute the same."""
    if isinstance(projector, MLP):
        first, _, second = projector.net
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
        return "gelu", first, second  # both are the exact GELU, not tanh's
    assert isinstance(projector, Linear)
    return linear_as_mlp(projector.net)


def linear_as_mlp(linear: nn.Linear) -> tuple[str, nn.Linear, nn.Linear]:
    """W x + b as LLaVA's Linear, activation, Linear, exactly.

    x = relu(x) - relu(-x), of which one term is always zero. So linear_1 gives x and -x, and
    linear_2 is [W, -W], if the language model is at least twice as wide as the tower. Else the
    activation is transformers' "linear" and linear_2 the identity; vLLM has no such activation.
    """
    weight, bias = linear.weight.data, linear.bias.data  # [D, V], [D]
    wide, narrow = weight.shape
    eye = torch.eye(narrow, dtype=weight.dtype, device=weight.device)
    if wide < 2 * narrow:
        identity = torch.eye(wide, dtype=weight.dtype, device=weight.device)
        return "linear", _linear(weight, bias), _linear(identity, torch.zeros_like(bias))
    first = weight.new_zeros(wide, narrow)
    first[:narrow], first[narrow : 2 * narrow] = eye, -eye
    second = weight.new_zeros(wide, wide)
    second[:, :narrow], second[:, narrow : 2 * narrow] = weight, -weight
    return "relu", _linear(first, torch.zeros_like(bias)), _linear(second, bias)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
