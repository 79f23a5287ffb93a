"""Tokenizer, chat template and image processor of an exported model.

From a list of frames and a prompt they make exactly the sequence that vlmds trains on.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from vlmds.errors import InputError
from vlmds.models.captioner import VISUAL
from vlmds.models.projectors import Projector
from vlmds.models.sequences import SequenceBuilder
from vlmds.models.vision import VisionTower

IMAGE_TOKENS = ("<|image_pad|>", "<image>")
"""Tokens that stand for a visual token; the first that the vocabulary has is used."""

# Stands before the base model's own template, which takes text only. A message's content may be
# text, or a list of images and texts; thinking is off unless it is requested, as in training.
PREAMBLE = """\
{%- if enable_thinking is not defined %}{%- set enable_thinking = false %}{%- endif %}
{%- set plain = namespace(messages=[]) %}
{%- for message in messages %}
{%- if message['content'] is string %}
{%- set plain.messages = plain.messages + [message] %}
{%- else %}
{%- set text = namespace(value='') %}
{%- for item in message['content'] %}
{%- if item['type'] == 'text' %}
{%- set text.value = text.value + item['text'] %}
{%- else %}
{%- set text.value = text.value + 'IMAGE_TOKEN' %}
{%- endif %}
{%- endfor %}
{%- set plain.messages = plain.messages + [dict(message, content=text.value)] %}
{%- endif %}
{%- endfor %}
{%- set messages = plain.messages %}
"""


def exported_tokenizer(
    tokenizer: PreTrainedTokenizerBase, llm: PreTrainedModel, model: str
) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer, changed to take images in chats and to pad on the left; and its image token.

    Args:
        llm: the language model. model: its name.

    Raises:
        InputError: the vocabulary has no token to stand for an image, and the model's embedding no
            row for a new one.
    """
    vocabulary = tokenizer.get_vocab()
    token = next((t for t in IMAGE_TOKENS if t in vocabulary), None)
    if token is None:
        if len(tokenizer) >= len(llm.get_input_embeddings().get_parameter("weight")):
            raise InputError(
                f"llm.model: {model}: its vocabulary has neither of "
                f"{', '.join(IMAGE_TOKENS)}, and the model has no row to spare"
            )
        token = IMAGE_TOKENS[-1]
        tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    tokenizer.chat_template = PREAMBLE.replace("IMAGE_TOKEN", token) + tokenizer.chat_template
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, token


def image_processor(tower: VisionTower, fit: str) -> CLIPImageProcessorPil | LlavaImageProcessorPil:
    """Resizes as :func:`vlmds.video.fit.resize_frames` does, bit for bit, then normalises. (It pads with
    the tower's mean colour: for a tower with another one than CLIP's, the bars differ.)"""
    size = tower.image_size
    square = {"height": size, "width": size}
    options: dict[str, Any] = {
        "size": square if fit == "stretch" else {"shortest_edge": size},
        "crop_size": square,
        "image_mean": tower.get_buffer("mean").flatten().tolist(),
        "image_std": tower.get_buffer("std").flatten().tolist(),
    }
    return LlavaImageProcessorPil(do_pad=True, **options) if fit == "pad" else CLIPImageProcessorPil(**options)


def user_message(prompt: str, num_frames: int) -> list[dict]:
    """The chat of one clip, for ``apply_chat_template``."""
    return [{"role": "user", "content": [{"type": "image"}] * num_frames + [{"type": "text", "text": prompt}]}]


def check_sequence(processor, builder: SequenceBuilder, projector: Projector, image_size: int) -> None:
    """Raise :class:`InputError` unless the exported processor gives the builder's token ids, for a clip and for a
    still picture."""
    from PIL import Image

    for number in (projector.num_frames, 1):
        text = processor.apply_chat_template(user_message(builder.prompt, number), add_generation_prompt=True)
        frames = [Image.new("RGB", (image_size, image_size))] * number
        ids = processor(images=frames, text=text)["input_ids"][0]
        image, visual = processor.image_token_id, projector.tokens_of(number * projector.patches)
        if list(ids) != [image if i == VISUAL else i for i in builder.prompt_ids(None, visual)]:
            raise InputError(
                "llm.model: its chat template cannot be carried over: with images in the message it renders another "
                "text"
            )
