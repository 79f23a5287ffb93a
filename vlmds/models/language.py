"""The language model: Qwen3 in NF4 or plain precision, and its LoRA or DoRA adapter."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vlmds.console.quiet import quietly
from vlmds.errors import InputError
from vlmds.experiments.schema import LanguageConfig, PeftSection
from vlmds.models.attention import attention_for
from vlmds.models.dora import use_dora
from vlmds.models.fetch import model_folder
from vlmds.models.hub import cached_folder
from vlmds.models.pretrained import load_config, load_weights, loading


def load_tokenizer(llm: LanguageConfig, local_files_only: bool = False) -> PreTrainedTokenizerBase:
    """The language model's tokenizer. local_files_only: without a download, also where the weights are
    missing.

    Raises:
        InputError: there is none, or it has no chat template.
    """
    folder = cached_folder(llm)
    if folder is None and not local_files_only:
        folder = model_folder(llm)
    with loading("llm.model", llm.model):
        tokenizer = (
            AutoTokenizer.from_pretrained(folder)
            if folder
            else (AutoTokenizer.from_pretrained(llm.model, revision=llm.revision, local_files_only=True))
        )
    if not tokenizer.chat_template:
        raise InputError(f"llm.model: the tokenizer of {llm.model} has no chat template")
    return tokenizer


def load_language_model(llm: LanguageConfig, device: torch.device, micro_batch: int | None = None) -> PreTrainedModel:
    """Load the LLM frozen onto ``device``, quantised to NF4 when ``llm.load_in_4bit``.

    Args:
        micro_batch: ``training.micro_batch``, None if nothing is trained; see :func:`attention_for`.

    Raises:
        InputError: missing or damaged folder, shapes that do not fit its config.json, or an
            ``llm.attention`` that cannot run here.
    """
    folder = model_folder(llm)
    config = load_config(llm)
    dtype = getattr(torch, llm.dtype)
    quantisation = None
    if llm.load_in_4bit:
        # bnb_4bit_quant_storage stays uint8: the engine's cast to bf16 would corrupt a float one.
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    model = load_weights(
        AutoModelForCausalLM,
        llm,
        folder,
        config=config,
        dtype=dtype,
        quantization_config=quantisation,
        device_map={"": device},
        attn_implementation=attention_for(llm, micro_batch, device)[0],
    )
    model.requires_grad_(False)
    if llm.load_in_4bit:
        _keep_4bit_weights_packed(model)
    return model


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise :class:`InputError` if the tokenizer has more ids than the model's embedding has rows."""
    rows = model.get_input_embeddings().get_parameter("weight").shape[0]
    if len(tokenizer) > rows:
        raise InputError(
            f"llm.model: {name}: the tokenizer has {len(tokenizer)} tokens, but the model's embedding has {rows} rows"
        )


def lora_config(peft: PeftSection) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=peft.r,
        lora_alpha=peft.alpha,  # type: ignore[arg-type]  # PEFT only divides it
        lora_dropout=peft.dropout,
        target_modules=list(peft.target_modules),
        use_dora=peft.type == "dora",
        use_rslora=peft.rslora,
        bias="none",
    )


def add_adapter(model: PreTrainedModel, peft: PeftSection) -> PeftModel:
    """Wrap the LLM with a fresh LoRA or DoRA adapter, which is its only trainable part.

    Raises:
        InputError: ``peft.target_modules`` names no module of this model.
    """
    try:
        with quietly():
            adapted = get_peft_model(model, lora_config(peft), autocast_adapter_dtype=False)
    except ValueError as error:
        raise InputError(f"peft.target_modules: {' '.join(str(error).split())[:300]}") from error
    use_dora(adapted)
    return adapted


def _keep_4bit_weights_packed(model: PreTrainedModel) -> None:
    """Switch off, in each layer, that bitsandbytes repacks weights: on CPUs with AVX512-BF16 it does so in
    the first eval forward, after which training gives no gradient."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
