"""What NVIDIA's data sheets say of its cards."""

from __future__ import annotations

from dataclasses import dataclass

from vlmds.errors import InputError


@dataclass(frozen=True)
class Card:
    """memory: bytes. flops: dense bfloat16 with fp32 accumulation, operations a second. bandwidth:
    bytes a second."""

    name: str
    memory: float
    flops: float
    bandwidth: float


CARDS = {card.name: card for card in (
    Card("b200", 180e9, 2250e12, 8.0e12), Card("h200", 141e9, 989e12, 4.8e12),
    Card("h100", 80e9, 989e12, 3.35e12), Card("a100-80", 80e9, 312e12, 2.04e12),
    Card("a100-40", 40e9, 312e12, 1.56e12), Card("l40s", 48e9, 362e12, 0.86e12),
    Card("a6000", 48e9, 155e12, 0.77e12), Card("rtx5090", 32e9, 209e12, 1.79e12),
    Card("rtx4090", 24e9, 165e12, 1.01e12), Card("rtx3090", 24e9, 71e12, 0.94e12),
)}


def find_card(name: str) -> Card:
    """Raises InputError."""
    card = CARDS.get(name.lower())
    if card is None:
        raise InputError(f"--gpu {name}: not known; known are {', '.join(CARDS)}")
    return card


def device_card(device_name: str) -> Card | None:
    """The card that CUDA calls so, such as "NVIDIA H100 80GB HBM3"; None if it is not known."""
    words = device_name.lower().replace("geforce rtx ", "rtx").replace("rtx a6000", "a6000")
    for name, card in CARDS.items():
        family, _, size = name.partition("-")
        if family in words and size in words:
            return card
    return None
