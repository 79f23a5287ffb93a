"""Which implementation of attention the language model runs on."""

from __future__ import annotations

import torch
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from vlmds.config import LanguageConfig
from vlmds.errors import InputError

SDPA = "sdpa"
FLASH = {  # name: (package, major compute capabilities that its kernels are made for); newest first
    "flash_attention_3": ("flash-attn-3", range(9, 10)),  # Hopper
    "flash_attention_2": ("flash-attn", range(8, 100)),  # Ampere and later
}
"""FlashAttention (arXiv:2307.08691, arXiv:2407.08608), as its README names the cards."""


def installed_flash() -> set[str]:
    """Those of FLASH that are installed here and that transformers can use."""
    available = {"flash_attention_2": is_flash_attn_2_available(),
                 "flash_attention_3": is_flash_attn_3_available()}
    return {name for name, there in available.items() if there}


def attention_for(llm: LanguageConfig, device: torch.device) -> str:
    """What ``attn_implementation`` of transformers is to be. Raises InputError."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None
    return choose_attention(llm.attention, llm.dtype, major, installed_flash())


def choose_attention(wanted: str, dtype: str, major: int | None, installed: set[str]) -> str:
    """``auto``: the newest FlashAttention that is installed and made for the card, else SDPA.

    Args:
        wanted, dtype: ``llm.attention`` and ``llm.dtype``.
        major: the card's compute capability; None on a CPU.
        installed: of FLASH.

    Raises:
        InputError: one that was asked for by name cannot run here.
    """
    problems = {name: _problem(name, dtype, major, installed) for name in FLASH}
    if wanted == "auto":
        return next((name for name, problem in problems.items() if problem is None), SDPA)
    if problem := problems.get(wanted):
        raise InputError(f"llm.attention: {wanted} {problem}, or set llm.attention to auto")
    return wanted


def _problem(name: str, dtype: str, major: int | None, installed: set[str]) -> str | None:
    """What keeps it from running, and the mend."""
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
