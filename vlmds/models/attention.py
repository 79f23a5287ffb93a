"""The choice of the language model's attention implementation."""

from __future__ import annotations

import torch
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from vlmds.errors import InputError
from vlmds.experiments.schema import LanguageConfig

SDPA = "sdpa"
FLASH = {  # name: (package, major compute capabilities that its kernels are made for); newest first
    "flash_attention_3": ("flash-attn-3", range(9, 10)),  # Hopper
    "flash_attention_2": ("flash-attn", range(8, 100)),  # Ampere and later
}
"""FlashAttention (arXiv:2307.08691, arXiv:2407.08608), as its README names the cards."""


def installed_flash() -> set[str]:
    """The names in FLASH that are installed here and that transformers can use."""
    available = {"flash_attention_2": is_flash_attn_2_available(), "flash_attention_3": is_flash_attn_3_available()}
    return {name for name, there in available.items() if there}


def attention_for(llm: LanguageConfig, micro_batch: int | None, device: torch.device) -> tuple[str, str]:
    """:func:`choose_attention` for this device."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None
    return choose_attention(llm.attention, llm.dtype, micro_batch, major, installed_flash())


def choose_attention(
    wanted: str, dtype: str, micro_batch: int | None, major: int | None, installed: set[str]
) -> tuple[str, str]:
    """``auto``: the newest FlashAttention that is installed and made for the card, else SDPA; SDPA
    also for micro-batches of 1, for which transformers' FlashAttention reads the positions on the host
    in every layer, to find out whether a row has several sequences.

    Args:
        wanted, dtype, micro_batch: ``llm.attention``, ``llm.dtype`` and ``training.micro_batch`` (None
            if nothing is trained).
        major: the card's major compute capability; None on a CPU.
        installed: names in FLASH.

    Returns:
        ``attn_implementation`` for transformers, and a remark for the user, or "".

    Raises:
        InputError: an implementation that the experiment names cannot run here.
    """
    problems = {name: _problem(name, dtype, major, installed) for name in FLASH}
    if wanted == "auto":
        flash = next((name for name, problem in problems.items() if problem is None), None)
        if flash and micro_batch == 1:
            return SDPA, f"{flash} waits for the GPU in every layer if training.micro_batch is 1"
        return flash or SDPA, ""
    if problem := problems.get(wanted):
        raise InputError(f"llm.attention: {wanted} {problem}, or set llm.attention to auto")
    if wanted in FLASH and micro_batch == 1:
        return wanted, (
            f"WARNING: {wanted} waits for the GPU in every layer if "
            "training.micro_batch is 1; set llm.attention to auto, or "
            "training.micro_batch to 2 or more"
        )
    return wanted, ""


def _problem(name: str, dtype: str, major: int | None, installed: set[str]) -> str | None:
    """Why it cannot run here, and the fix; None if it can."""
    package, majors = FLASH[name]
    if major is None:
        return "needs a GPU; train on one"
    if dtype == "float32":
        return "computes in half precision only; set llm.dtype to bfloat16"
    if major not in majors:
        return f"is not made for cards of compute capability {major}.x; take another card"
    if name not in installed:
        return f"is not installed; pip install {package}"
    return None
