"""Quantities as a person reads them."""

from __future__ import annotations


def size_text(count: float) -> str:
    """Bytes with three digits and a decimal unit: "6.07 GB", "121 MB", "1.53 kB", "12 B"."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        shown = float(f"{count / size:.3g}")  # 999.6 MB are 1.00 GB
        if shown >= 1:
            return f"{count / size:,.{2 if shown < 10 else 1 if shown < 100 else 0}f} {unit}"
    return f"{count:,.0f} B"
