"""Captions by a model that vlmds did not train: any of transformers' image-text-to-text models."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from vlmds.console.progress import phase
from vlmds.errors import InputError
from vlmds.inference.generation import generation_config, logits_processors
from vlmds.inference.options import GenerationOptions
from vlmds.models.outside import KEY
from vlmds.models.pretrained import loading

SIDE = 448
"""Pixels of the longer side of the frames that the model gets; its own processor resizes them as it needs."""


class ZeroShotCaptioner:
    """A model with its processor, in evaluation mode.

    The frames of a clip are given as a video where the processor takes videos, else as pictures in their order.

    Args:
        folder: of the model. name: for messages. dtype: "bfloat16" or another one of torch.

    Raises:
        InputError: it cannot be loaded, takes no pictures, or its processor needs a package that is missing.
    """

    def __init__(self, folder: Path, name: str, device: torch.device, dtype: str, options: GenerationOptions):
        self.name, self.device, self.options = name, device, options
        self.processor: Any = load_processor(folder, name)
        if getattr(self.processor, "image_processor", None) is None:
            raise InputError(f"{KEY} {name}: takes no pictures; name a model for images or videos and text")
        self.takes_videos = getattr(self.processor, "video_processor", None) is not None
        tokenizer = self.processor.tokenizer
        if not (getattr(self.processor, "chat_template", None) or tokenizer.chat_template):
            raise InputError(f"{KEY} {name}: has no chat template; name an instruction-tuned model")
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        with loading(KEY, name), phase(f"loading {name}"):
            model = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=getattr(torch, dtype), device_map={"": device}
            )
        self.model = model.eval()
        self.control = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}

    def check_prompt(self, prompt: str) -> None:
        """Raise InputError if the prompt has a control token, which the processor would parse."""
        if found := next((token for token in sorted(self.control) if token in prompt), None):
            raise InputError(f"{KEY} {self.name}: the prompt contains {found!r}, a control token of this model")

    @torch.no_grad()
    def captions(
        self, clips: Sequence[np.ndarray], prompts: Sequence[str], seconds: Sequence[float | None]
    ) -> list[str]:
        """One caption for each clip.

        Args:
            clips: frames of each, uint8 [F, 3, H, W].
            prompts: of each. seconds: duration of each, None if not known.
        """
        inputs = self._inputs(clips, prompts, seconds).to(self.device)
        for name, value in inputs.items():
            if torch.is_tensor(value) and value.is_floating_point():
                inputs[name] = value.to(self.model.dtype)
        tokenizer, config = self.processor.tokenizer, self.model.generation_config
        eos = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
        made = self.model.generate(
            **inputs,
            generation_config=generation_config(self.options, eos, tokenizer.pad_token_id),
            logits_processor=logits_processors(self.options),
        )
        made = made[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in tokenizer.batch_decode(made, skip_special_tokens=True)]

    def _inputs(self, clips: Sequence[np.ndarray], prompts: Sequence[str], seconds: Sequence[float | None]) -> Any:
        texts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": self._content(len(clip), prompt)}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for clip, prompt in zip(clips, prompts, strict=True)
        ]
        pixels = [np.ascontiguousarray(clip.transpose(0, 2, 3, 1)) for clip in clips]
        if not self.takes_videos:
            images = [[Image.fromarray(frame) for frame in clip] for clip in pixels]
            return self.processor(text=texts, images=images, padding=True, return_tensors="pt")
        described = [
            {
                "fps": len(clip) / (length or len(clip)),
                "duration": float(length or len(clip)),
                "total_num_frames": len(clip),
                "frames_indices": list(range(len(clip))),
            }
            for clip, length in zip(clips, seconds, strict=True)
        ]
        return self.processor(
            text=texts,
            videos=pixels,
            video_metadata=described,
            do_sample_frames=False,
            padding=True,
            return_tensors="pt",
        )

    def _content(self, frames: int, prompt: str) -> list[dict[str, str]]:
        shown = [{"type": "video"}] if self.takes_videos else [{"type": "image"}] * frames
        return [*shown, {"type": "text", "text": prompt}]


def load_processor(folder: Path, name: str) -> Any:
    """The model's processor; where torchvision is missing, which transformers' processors of videos need, one that
    takes pictures alone (torchvision must be the build for the installed torch).

    Raises:
        InputError: it cannot be loaded, or another package is missing.
    """
    with loading(KEY, name):
        try:
            return AutoProcessor.from_pretrained(folder)
        except ImportError as error:
            reason = _first_line(error)
        model_type = AutoConfig.from_pretrained(folder).model_type
        kind: Any = getattr(transformers, PROCESSOR_MAPPING_NAMES.get(model_type, ""), None)
        accepted = inspect.signature(kind.__init__).parameters if kind else {}
        if "video_processor" not in accepted:
            raise InputError(
                f"{KEY} {name}: its processor needs a package that is not installed: {reason}; install that package"
            )
        # Without a processor of videos transformers' check of the parts itself fails.
        unchecked = {"check_argument_for_proper_class": lambda self, argument_name, argument: type(argument)}
        parts = {
            "image_processor": AutoImageProcessor.from_pretrained(folder),
            "tokenizer": AutoTokenizer.from_pretrained(folder),
            "video_processor": None,
        }
        config, _ = kind.get_processor_dict(folder)
        given = {key: value for key, value in config.items() if key in accepted and key not in parts}
        return type(kind.__name__, (kind,), unchecked)(**parts, **given)


def without_bars(frames: np.ndarray, width: int, height: int) -> np.ndarray:
    """The picture inside frames that were padded to a square: uint8 [F, 3, S, S] -> [F, 3, H, W].

    Args:
        width, height: of the picture as displayed, in any unit.
    """
    side = frames.shape[-1]
    across = max(1, round(side * width / max(width, height)))
    down = max(1, round(side * height / max(width, height)))
    left, top = (side - across) // 2, (side - down) // 2
    return frames[:, :, top : top + down, left : left + across]


def _first_line(error: ImportError) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
