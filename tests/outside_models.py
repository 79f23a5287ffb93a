"""Tiny random models of other families in Hugging Face format, as `vlmds evaluate --model` loads them."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)

from vlmds.demo.pretrain import train_tokenizer

CONTENT = (
    "{%% for message in messages %%}<|im_start|>{{ message.role }}\n"
    "{%% for part in message.content %%}{%% if part.type == 'text' %%}{{ part.text }}"
    "{%% elif part.type == 'video' %%}%s{%% else %%}%s{%% endif %%}{%% endfor %%}<|im_end|>\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
)
TEXT = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=4096,
)


def _tokenizer(*special: str) -> PreTrainedTokenizerBase:
    tokenizer = train_tokenizer(["0번 영상입니다."], vocab_size=600)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *special]})
    return tokenizer


def llava(folder: Path) -> None:
    """LLaVA, which takes several pictures."""
    from transformers import LlavaProcessor

    tokenizer = _tokenizer("<image>")
    image = tokenizer.convert_tokens_to_ids("<image>")
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=Qwen2Config(vocab_size=len(tokenizer), **TEXT),
        image_token_index=image,
        image_seq_length=4,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CONTENT % ("<image>", "<image>"),
    ).save_pretrained(folder)


def llava_onevision(folder: Path) -> None:
    """LLaVA-OneVision, whose processor needs torchvision for videos."""
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    tokenizer = _tokenizer("<image>", "<video>")
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=Qwen2Config(vocab_size=len(tokenizer), **TEXT),
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=[[28, 28]],
    )
    LlavaOnevisionForConditionalGeneration(config).save_pretrained(folder)
    pictures = LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, image_grid_pinpoints=[[28, 28]])
    _save(
        folder,
        tokenizer,
        pictures,
        CONTENT % ("<video>", "<image>"),
        {"processor_class": "LlavaOnevisionProcessor", "num_image_tokens": 4, "vision_feature_select_strategy": "full"},
    )


def qwen3_vl(folder: Path) -> None:
    """Qwen3-VL, whose processor needs torchvision for videos."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = _tokenizer(*names)
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(names))
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            head_dim=16,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            **TEXT,
        ),
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=32,
            num_heads=2,
            out_hidden_size=32,
            patch_size=16,
            spatial_merge_size=2,
            temporal_patch_size=2,
            num_position_embeddings=16,
            deepstack_visual_indexes=[0],
        ),
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    pictures = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64}, patch_size=16, merge_size=2, temporal_patch_size=2
    )
    template = CONTENT % tuple(f"<|vision_start|>{pad}<|vision_end|>" for pad in ("<|video_pad|>", "<|image_pad|>"))
    _save(folder, tokenizer, pictures, template, {"processor_class": "Qwen3VLProcessor"})


def _save(folder: Path, tokenizer: PreTrainedTokenizerBase, pictures, template: str, config: dict) -> None:
    """A processor's files, of which one for videos would need torchvision to be made."""
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    pictures.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(config))


FAMILIES: dict[str, Callable[[Path], None]] = {"llava": llava, "llava-onevision": llava_onevision, "qwen3-vl": qwen3_vl}


def make(family: str, folder: Path) -> Path:
    """Write the model and its processor, and a model card with a licence; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        FAMILIES[family](folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A tiny model\n", encoding="utf-8")
    return folder
