"""NVIDIA's cards by exact product: memory, speed and bandwidth from the data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from vlmds.errors import InputError


@dataclass(frozen=True)
class Card:
    """A card. memory: bytes. flops: dense bfloat16 with fp32 accumulation, operations a second (half
    the rate where a data sheet gives it with sparsity only). bandwidth: bytes a second. device: the
    name of ``torch.cuda.get_device_name``, without "NVIDIA "."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    device: str


CARDS = {
    card.name: card
    for card in (
        Card("b200", 180e9, 2250e12, 8.0e12, "B200"),
        Card("h200-sxm", 141e9, 989e12, 4.8e12, "H200"),
        Card("h200-nvl", 141e9, 835e12, 4.8e12, "H200 NVL"),
        Card("h100-sxm", 80e9, 989e12, 3.35e12, "H100 80GB HBM3"),
        Card("h100-nvl", 94e9, 835e12, 3.9e12, "H100 NVL"),
        Card("h100-pcie", 80e9, 756e12, 2.0e12, "H100 PCIe"),
        Card("a100-80-sxm", 80e9, 312e12, 2.04e12, "A100-SXM4-80GB"),
        Card("a100-80-pcie", 80e9, 312e12, 1.94e12, "A100 80GB PCIe"),
        Card("a100-40-sxm", 40e9, 312e12, 1.56e12, "A100-SXM4-40GB"),
        Card("a100-40-pcie", 40e9, 312e12, 1.56e12, "A100-PCIE-40GB"),
        Card("l40s", 48e9, 362e12, 0.86e12, "L40S"),
        Card("a6000", 48e9, 155e12, 0.77e12, "RTX A6000"),
        Card("rtx5090", 32e9, 209e12, 1.79e12, "GeForce RTX 5090"),
        Card("rtx4090", 24e9, 165e12, 1.01e12, "GeForce RTX 4090"),
        Card("rtx3090", 24e9, 71e12, 0.94e12, "GeForce RTX 3090"),
    )
}
SHORT = {"h200": "h200-sxm", "h100": "h100-sxm", "a100-80": "a100-80-sxm", "a100-40": "a100-40-sxm"}
"""Short names of the SXM form."""
_DEVICES = {card.device.lower(): card for card in CARDS.values()}


def find_card(name: str) -> Card:
    """The card of that name, or of that CUDA name. Raises InputError."""
    lower = name.lower()
    card = CARDS.get(SHORT.get(lower, lower)) or device_card(name)
    if card is None:
        raise InputError(f"--gpu {name}: not known; known are {', '.join(CARDS)}")
    return card


def device_card(device_name: str) -> Card | None:
    """The card of an exact CUDA name, such as "NVIDIA H100 80GB HBM3", else None: another product or
    a MIG slice may have a similar name and other figures."""
    return _DEVICES.get(device_name.strip().lower().removeprefix("nvidia "))
